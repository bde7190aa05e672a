"""Building experiments, and the files that describe them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
import torch
from config_sample import Denoiser, Ema, Log, Net, Run, Suite, refused, sample

from fastflow.config import (
    build,
    from_plain,
    lazy,
    load_experiment,
    read_yaml,
    save_yaml,
    to_plain,
)
from fastflow.errors import ConfigError
from fastflow.parts import Part

# Building


def test_build_makes_everything_inside():
    built = build(sample().network.replace(label="x"))
    assert isinstance(built, Denoiser)
    assert built.model.args == (4, (1, 2), 0.1)
    assert (built.sigma_data, built.label) == (0.5, "x")
    emas = lazy(Suite, members=(lazy(Ema, decay=0.5),), named={"a": lazy(Ema, decay=0.25)})
    suite = build(emas)
    assert suite.members[0].decay == 0.5
    assert suite.named["a"].decay == 0.25
    assert [type(c) for c in build(sample().callbacks)] == [Ema, Log]


def test_build_takes_what_only_the_run_knows():
    weights = torch.nn.Linear(2, 2).parameters()
    optimizer = build(sample().optimizer, weights, eps=1e-3)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert optimizer.param_groups[0]["eps"] == 1e-3
    assert build(lazy(Net), 7, dropout=0.5).args == (7, (1, 2), 0.5)
    assert build(lazy(Net, channels=1), 7).args[0] == 7


def test_build_names_what_is_missing():
    node = lazy(Suite, members=(lazy(Ema, decay=0.5), lazy(Ema)))
    refused(lambda: build(node), "Suite.members.1: Ema needs decay (float)")
    refused(lambda: build(lazy(Denoiser, model=lazy(Net))), "Denoiser.model: Net needs channels")
    refused(lambda: build(sample().optimizer), "Adam needs params")
    with pytest.raises(ConfigError, match=r"^Net.channels: 0 given, at least 1 accepted$"):
        build(lazy(Net, channels=0))


# Configuration files

FILE = """from __future__ import annotations
import dataclasses
from fastflow.parts import Part

@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(Part):
    x: int = 1

def experiment():
    return Mine({arguments})
"""


def test_a_python_file_anywhere_is_loaded(tmp_path, monkeypatch):
    path = tmp_path / "my config.py"
    path.write_text(FILE.format(arguments="x=2"))
    assert load_experiment(path).x == 2
    monkeypatch.chdir(tmp_path)
    assert load_experiment("./my config.py").x == 2
    loaded = load_experiment("my config.py")
    assert pickle.loads(pickle.dumps(loaded)) == loaded
    path.write_text(FILE.format(arguments="x=3"))
    assert load_experiment(path).x == 3
    assert os.listdir(tmp_path) == ["my config.py"]


def test_a_file_of_our_packages_is_imported_under_its_name(tmp_path, monkeypatch):
    package = tmp_path / "configs" / "experiments"
    package.mkdir(parents=True)
    (tmp_path / "configs" / "__init__.py").write_text("")
    (package / "config_x.py").write_text(FILE.format(arguments=""))
    for name in [n for n in sys.modules if n.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    elsewhere = load_experiment(package / "config_x.py")
    assert type(elsewhere).__module__.startswith("fastflow_config_")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        loaded = load_experiment(package / "config_x.py")
        assert type(loaded).__module__ == "configs.experiments.config_x"
        assert from_plain(to_plain(loaded)) == loaded
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == "configs"]:
            del sys.modules[name]


def test_a_yaml_file_is_loaded(tmp_path):
    save_yaml(lazy(torch.optim.Adam), tmp_path / "x.yaml")
    refused(lambda: load_experiment(tmp_path / "x.yaml"), "describes lazy(Adam", "Part")


HEAD = "from fastflow.errors import ConfigError\nimport torch\nfrom fastflow.config import lazy\n"
FAILING = [
    ("def experiment(:\n", ":4: SyntaxError: "),
    ("x = 'a\n", ":4: SyntaxError: unterminated string"),
    (
        "import nothing_of_this_name\n",
        "named 'nothing_of_this_name'; install it, or set PYTHONPATH",
    ),
    ("raise ConfigError('k: 3 given, 4 accepted')\n", ":4: k: 3 given, 4 accepted"),
    ("def experiment():\n    return 1 / 0\n", ":5: ZeroDivisionError: division by zero"),
    ("def experiment():\n    raise ValueError('a\\nb')\n", ":5: ValueError: a b"),
    (
        "def experiment():\n    return lazy(torch.optim.Adam, lrr=1)\n",
        ":5: Adam.lrr: Adam takes no 'lrr'; did you mean 'lr'?",
    ),
    ("def experimnt():\n    pass\n", ": has no function experiment(); did you mean 'experimnt'?"),
    ("experiment = 3\n", ": has no function experiment(); accepted: none"),
    ("def experiment(x):\n    pass\n", "missing 1 required positional argument: 'x'"),
    ("def experiment():\n    return 3\n", ": describes 3 (int), Part"),
    ("def experiment():\n    pass\n", ": describes None, Part"),
]


@pytest.mark.parametrize(("text", "message"), FAILING)
def test_a_failing_file_is_told_with_its_line(text, message, tmp_path):
    path = tmp_path / "config_x.py"
    path.write_text(HEAD + text)
    told = refused(lambda: load_experiment(path), message)
    assert "config_x.py" in told or message.startswith("missing")


def test_the_kind_of_an_experiment_is_checked(tmp_path):
    path = tmp_path / "config_x.py"
    path.write_text(FILE.format(arguments=""))
    refused(lambda: load_experiment(path, kind=Run), "describes Mine(x=1) (Mine), Run accepted")
    assert load_experiment(path, kind=Part).x == 1


def test_unreadable_paths_are_named_with_their_neighbours(tmp_path):
    (tmp_path / "config_cm.py").write_text("")
    (tmp_path / "notes.txt").write_text("")
    near = "no such file in", "did you mean 'config_cm.py'? accepted: config_cm.py"
    refused(lambda: load_experiment(tmp_path / "config_cn.py"), *near)
    refused(lambda: load_experiment(tmp_path / "no" / "x.py"), "no folder")
    refused(lambda: load_experiment(tmp_path), "is a folder", "accepted: config_cm.py")
    refused(lambda: load_experiment(tmp_path / "notes.txt"), ".txt given, .py or .yaml accepted")
    refused(lambda: read_yaml(tmp_path / "x.yaml"), "x.yaml: cannot be read: No such file")


def test_importing_config_stays_cheap():
    code = "import fastflow.config, sys; print('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
