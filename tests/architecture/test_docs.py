"""The documentation is true: links and paths resolve, code imports, how-tos can be followed.

In a how-to, a python block whose first line is `# some/path.py` is a file to write, and a bash
block holds commands to run, in the order of the page.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("fastflow", "methods", "networks", "callbacks", "configs")
FOLDERS = (*PACKAGES, "docs", "tests", "benchmarks")
HOW_TOS = ("add_a_method", "add_a_network", "add_a_callback")
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", *(f"{folder}/*.md" for folder in PACKAGES))
    for path in ROOT.glob(pattern)
)


class Block(NamedTuple):
    """A fenced block: its language, the file it is to become (or None) and its text."""

    language: str
    file: str | None
    text: str


def blocks(page: str) -> Iterator[Block]:
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        first = re.match(r"# (\S+\.py)$", text.splitlines()[0]) if text else None
        yield Block(language, first[1] if first and language == "python" else None, text)


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)


def slug(heading: str) -> str:
    """The anchor that a heading gets on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def broken_links(page: str, folder: Path) -> list[str]:
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path if path else None
        text = page if target is None else ""
        if target is not None:
            if not target.exists():
                found.append(link)
                continue
            text = target.read_text() if target.suffix == ".md" else ""
        headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
        if anchor and anchor not in map(slug, headings):
            found.append(link)
    return found


def missing_paths(page: str, root: Path) -> list[str]:
    """Paths in backticks that look like ours and do not exist.

    Left out: files that the page creates, and examples named my_something.
    """
    created = {block.file for block in blocks(page)}
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    paths = {s for s in spans if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]+", s)}
    real = (p for p in paths - created if not p.split("/")[-1].startswith("my_"))
    return sorted(p for p in real if not (root / p).exists())


def missing_imports(page: str) -> list[str]:
    """Names imported from our packages by python blocks that are not there."""
    pages = list(blocks(page))
    created = {b.file.removesuffix(".py").replace("/", ".") for b in pages if b.file}
    found = []
    for block in pages:
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if not isinstance(node, ast.ImportFrom) or node.module in created:
                continue
            if (node.module or "").split(".")[0] in PACKAGES:
                module = importlib.import_module(node.module or "")
                missing = (a.name for a in node.names if not hasattr(module, a.name))
                found += [f"{node.module}.{name}" for name in missing]
    return found


@pytest.mark.parametrize("name", PAGES)
def test_links(name):
    path = ROOT / name
    assert broken_links(path.read_text(), path.parent) == []


@pytest.mark.parametrize("name", PAGES)
def test_paths(name):
    assert missing_paths((ROOT / name).read_text(), ROOT) == []


@pytest.mark.parametrize("name", PAGES)
def test_imports(name):
    assert missing_imports((ROOT / name).read_text()) == []


def test_what_is_broken_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# A heading, here\n")
    page = "[a](gone.md) [b](there.md#a-heading-here) [c](there.md#other) [d](https://x.y/z)"
    assert broken_links(page, tmp_path) == ["gone.md", "there.md#other"]
    assert missing_paths("`fastflow/gone.py` and `methods/`", ROOT) == ["fastflow/gone.py"]
    code = "```python\nfrom fastflow.errors import ConfigError, Gone\n```"
    assert missing_imports(code) == ["fastflow.errors.Gone"]


@pytest.mark.parametrize("name", HOW_TOS)
def test_how_to(name, tmp_path):
    """Follow the page in a copy of the project: write its files, run its commands."""
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    shutil.copy(ROOT / "train.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    steps = list(blocks((ROOT / "docs" / f"{name}.md").read_text()))
    for block in steps:
        if block.file is not None:
            path = tmp_path / block.file
            assert not path.exists(), f"{block.file} would replace a file of the project"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
    commands = [block.text for block in steps if block.language == "bash"]
    assert commands
    out = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(tmp_path),
            "OMP_NUM_THREADS": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stdout + out.stderr
