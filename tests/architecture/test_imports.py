"""The dependency rules: who may import whom, and what an import may cost."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("fastflow", "methods", "networks", "callbacks", "configs")

# configs -> {methods, networks, callbacks} -> fastflow
MAY_IMPORT = {
    "fastflow": {"fastflow"},
    "methods": {"fastflow"},
    "networks": {"fastflow", "networks"},  # architectures share layers
    "callbacks": {"fastflow"},
    "configs": {"fastflow", "methods", "networks", "callbacks", "configs"},
}
MATHEMATICS = ("path", "precond", "times", "schedules", "tangent", "sampling", "oracle")
RUNTIME = ("trainer", "distributed", "checkpoint", "data", "evaluation", "state", "callback", "cli")
# Cheap enough to be imported by every module; all others only inside functions that use them.
CORE = {"torch", "numpy", "omegaconf", "yaml", "safetensors", "einops", "tqdm"}
HEAVY = {
    *("wandb", "tensorboard", "torchvision", "torch_fidelity", "lpips", "fvcore", "diffusers"),
    *("matplotlib", "PIL", "sklearn", "skimage", "scipy", "torch.utils.tensorboard"),
}
METHOD_LINES = 200


class Import(NamedTuple):
    """`module` is imported by `path`; `lazy` if that happens inside a function or for types."""

    path: str
    line: int
    module: str
    lazy: bool


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports_of(path: str, source: str) -> Iterator[Import]:
    """Every import statement of a file; `from a import b` yields a and a.b."""
    package = module_name(path).split(".")
    if not path.endswith("/__init__.py"):
        package = package[:-1]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, lazy)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield Import(path, node.lineno, base, lazy)
            for alias in node.names:
                yield Import(path, node.lineno, f"{base}.{alias.name}", lazy)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            lazy = True
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, lazy)
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    yield from visit(ast.parse(source), False)


def layer_violations(files: Mapping[str, str]) -> list[str]:
    """Imports against the direction of dependency."""
    found = []
    for path, source in files.items():
        allowed = MAY_IMPORT[path.split("/")[0]]
        for item in imports_of(path, source):
            top = item.module.split(".")[0]
            own = module_name(path)
            if top in PACKAGES and top not in allowed and item.module != own:
                found.append(f"{path}:{item.line} imports {item.module}")
    return found


def mathematics_violations(files: Mapping[str, str]) -> list[str]:
    """Chains of imports that lead from mathematics to the runtime."""
    modules = {module_name(path): path for path in files}
    graph = {
        name: {i.module for i in imports_of(path, files[path]) if i.module in modules}
        for name, path in modules.items()
    }

    def is_runtime(name: str) -> bool:
        return name.startswith("fastflow.") and name.split(".")[1] in RUNTIME

    found = []
    for start in (f"fastflow.{part}" for part in MATHEMATICS):
        chains, seen = [[start]], {start}
        while chains:
            chain = chains.pop()
            if is_runtime(chain[-1]):
                found.append(" -> ".join(chain))
                continue
            for name in sorted(graph.get(chain[-1], set()) - seen):
                seen.add(name)
                chains.append([*chain, name])
    return found


def weight_violations(files: Mapping[str, str]) -> list[str]:
    """Imports at module level of anything but the standard library, ourselves and the core."""
    allowed = CORE | set(PACKAGES) | set(sys.stdlib_module_names)
    return [
        f"{item.path}:{item.line} imports {item.module} at module level"
        for path, source in files.items()
        for item in imports_of(path, source)
        if not item.lazy and (item.module.split(".")[0] not in allowed or item.module in HEAVY)
    ]


def our_files() -> dict[str, str]:
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return our_files()


def test_layers(files):
    assert layer_violations(files) == []


def test_mathematics_stays_free_of_the_runtime(files):
    assert {f"fastflow/{part}.py" for part in ("path", "precond", "sampling")} <= set(files)
    assert mathematics_violations(files) == []


def test_heavy_packages_are_imported_where_they_are_used(files):
    assert weight_violations(files) == []


def test_method_files_are_short(files):
    lines = {p: len(s.splitlines()) for p, s in files.items() if p.startswith("methods/")}
    assert {path: n for path, n in lines.items() if n > METHOD_LINES} == {}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("fastflow/trainer.py", "import methods.cm"),
        ("fastflow/sub/deep.py", "def f():\n    from networks import mlp"),
        ("fastflow/x.py", "if TYPE_CHECKING:\n    from callbacks.ema import EMACallback"),
        ("methods/cm.py", "from networks.mlp import MLP"),
        ("methods/ict.py", "from methods.cm import CM"),
        ("methods/ict.py", "from .cm import CM"),
        ("networks/mlp.py", "from configs.experiments import Toy"),
        ("callbacks/a.py", "from callbacks.b import B"),
    ],
)
def test_a_wrong_layer_is_found(path, source):
    assert len(layer_violations({path: source})) >= 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("configs/experiments/Toy/a.py", "from methods.cm import CM\nfrom fastflow import path"),
        ("networks/song_unet.py", "from networks.layers import Linear"),
        ("methods/cm.py", "from fastflow.method import FlowMapMethod"),
    ],
)
def test_a_right_layer_is_not_reported(path, source):
    assert layer_violations({path: source}) == []


def test_mathematics_reaching_the_runtime_is_found():
    files = {
        "fastflow/path.py": "from fastflow import helper",
        "fastflow/helper.py": "def f():\n    from fastflow.data import batch",
        "fastflow/data/__init__.py": "",
        "fastflow/data/batch.py": "",
    }
    assert mathematics_violations(files) == [
        "fastflow.path -> fastflow.helper -> fastflow.data.batch",
        "fastflow.path -> fastflow.helper -> fastflow.data",
    ]


@pytest.mark.parametrize(
    "source",
    [
        "import wandb",
        "from PIL import Image",
        "class A:\n    import scipy.linalg",
        "try:\n    import sklearn\nexcept ImportError:\n    sklearn = None",
        "from torch.utils import tensorboard",
    ],
)
def test_a_heavy_import_is_found(source):
    assert len(weight_violations({"fastflow/x.py": source})) >= 1


def test_a_lazy_heavy_import_is_not_reported():
    source = "import torch\nif TYPE_CHECKING:\n    import wandb\ndef f():\n    import scipy"
    assert weight_violations({"fastflow/x.py": source}) == []


LOADED = """
import json, sys
import torch
before = set(sys.modules)
{work}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def modules_of(work: str) -> set[str]:
    """The modules that `work` loads after `import torch`, in a fresh interpreter."""
    out = subprocess.run(
        [sys.executable, "-c", LOADED.format(work=work)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    return set(json.loads(out.stdout.splitlines()[-1]))


def test_importing_fastflow_loads_nothing_heavy():
    loaded = modules_of("import fastflow")
    assert "fastflow" in loaded
    assert loaded & HEAVY == set()


def test_loading_configurations_loads_nothing_heavy():
    paths = sorted(map(str, ROOT.glob("configs/experiments/*/config_*.py")))
    loaded = modules_of(
        f"from fastflow.config import load_experiment\n"
        f"for path in {paths!r}:\n"
        f"    load_experiment(path)"
    )
    assert "fastflow.experiment" in loaded
    assert loaded & HEAVY == set()
