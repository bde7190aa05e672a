"""Experiments as trees of parts and lazies: described in Python files, built, and everything else.

A configuration is a Python file with one function `experiment()`. The tree it returns is checked
when it is written; overrides from the command line go through the same checks
(`fastflow.overrides`); the resolved tree is saved as YAML and can be read again and compared
(`fastflow.plain`). All of it is imported from here. Each error is one line.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from fastflow.annotations import describe, join, one_line, shown
from fastflow.errors import ConfigError, FastflowError, one_of
from fastflow.overrides import override
from fastflow.parts import Lazy, Part, lazy, located, parameters, require_given
from fastflow.plain import (
    ALLOWED,
    diff,
    from_plain,
    load_yaml,
    own_packages_of,
    packages_of,
    read_yaml,
    save_yaml,
    targets_of,
    to_plain,
    to_yaml,
)

__all__ = [
    "Lazy",
    "build",
    "diff",
    "from_plain",
    "lazy",
    "load_experiment",
    "load_yaml",
    "override",
    "own_packages_of",
    "packages_of",
    "read_yaml",
    "save_yaml",
    "targets_of",
    "to_plain",
    "to_yaml",
]

FILE_MODULE = "fastflow_config_"
"""How the module of a configuration file outside our packages begins; nothing can import it."""

P = TypeVar("P", bound=Part)
T = TypeVar("T")


# Building


@typing.overload
def build(node: Lazy[T], /, *args: Any, at: str = "", **extra: Any) -> T: ...
@typing.overload
def build(node: Any, /, *args: Any, at: str = "", **extra: Any) -> Any: ...
def build(node: Any, /, *args: Any, at: str = "", **extra: Any) -> Any:
    """Make the object that a node describes, and those inside it.

    Parts and plain values are returned as they are; tuples, lists and mappings are built item by
    item.

    Args:
        node: what to build.
        args: first arguments of the constructor that only the run knows.
        at: dotted key of `node`, for errors; empty takes the name of its class.
        extra: further such arguments by name; they take precedence over those of the node.

    Raises:
        ConfigError: a required argument is missing or a constructor refuses one, by its dotted
            key.
        Exception: whatever else a constructor raises.
    """
    return _built(node, at or (node.target.__name__ if isinstance(node, Lazy) else ""), args, extra)


def _built(node: Any, where: str, args: tuple[Any, ...], extra: Mapping[str, Any]) -> Any:
    if isinstance(node, list | tuple):
        return type(node)(_built(v, join(where, i), (), {}) for i, v in enumerate(node))
    if isinstance(node, Mapping):
        return {k: _built(v, join(where, k), (), {}) for k, v in node.items()}
    if not isinstance(node, Lazy):
        return node
    supplied = {*list(parameters(node.target))[: len(args)], *extra}
    require_given(node.target, supplied | node.kwargs.keys(), where)
    own = {n: v for n, v in node.kwargs.items() if n not in supplied}
    inner = {n: _built(v, join(where, n), (), {}) for n, v in own.items()}
    try:
        return node.target(*args, **inner, **extra)
    except ConfigError as error:
        raise located(error, node.target, where) from error


# Configuration files


@typing.overload
def load_experiment(path: str | os.PathLike[str], *, allow: Iterable[str] = ()) -> Part: ...
@typing.overload
def load_experiment(
    path: str | os.PathLike[str], *, kind: type[P], allow: Iterable[str] = ()
) -> P: ...
def load_experiment(
    path: str | os.PathLike[str], *, kind: type[Part] = Part, allow: Iterable[str] = ()
) -> Part:
    """The experiment that a file describes.

    Args:
        path: a Python file with a function `experiment()`, or a YAML file of `save_yaml`.
        kind: what is accepted, e.g. `Experiment`.
        allow: packages of your own that a YAML file may name classes of.

    Raises:
        ConfigError: the file is missing or fails, or describes something else; the text has file,
            line and message.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ConfigError(_no_file(path))
    if path.suffix in (".yaml", ".yml"):
        root = load_yaml(path, allow)
    elif path.suffix == ".py":
        root = _run_file(path.resolve(), str(path))
    else:
        raise ConfigError(f"{path}: {path.suffix or 'no suffix'} given, .py or .yaml accepted")
    if not isinstance(root, kind):
        raise ConfigError(f"{path}: describes {shown(root)}, {describe(kind)} accepted")
    return root


def _no_file(path: pathlib.Path) -> str:
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return f"{path}: no such file, and no folder {folder}"
    files = (f.name for f in folder.iterdir() if f.suffix in (".py", ".yaml", ".yml"))
    names = [name for name in files if name != "__init__.py"]
    # What a folder's configurations share stands beside them.
    names = [name for name in names if name.startswith("config_")] or names
    problem = "is a folder, a file accepted" if path.is_dir() else f"no such file in {folder}"
    return f"{path}: {problem}; {one_of(path.name, names)}"


def _run_file(path: pathlib.Path, shown_as: str) -> Any:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{shown_as}: cannot be read: {error.strerror}") from error
    try:
        module = _module_of(path, source)
        found = vars(module).get("experiment")
        if not isinstance(found, types.FunctionType):
            functions = [n for n, v in vars(module).items() if inspect.isfunction(v)]
            functions = [n for n in functions if vars(module)[n].__module__ == module.__name__]
            raise ConfigError(
                f"{shown_as}: has no function experiment(); {one_of('experiment', functions)}"
            )
        return found()
    except SyntaxError as error:
        file = shown_as if error.filename in (None, str(path)) else error.filename
        line = "" if error.lineno is None else f":{error.lineno}"
        raise ConfigError(f"{file}{line}: SyntaxError: {error.msg}") from error
    except (Exception, SystemExit) as error:
        # The file is the user's program: whatever it raises is told with its place.
        raise ConfigError(_told(error, path, shown_as)) from error


def _told(error: BaseException, path: pathlib.Path, shown_as: str) -> str:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    text = str(error) if isinstance(error, FastflowError) else f"{type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError):
        text += "; install it, or set PYTHONPATH to the folder that holds it"
    if not lines:
        return one_line(f"{shown_as}: {text.removeprefix(f'{shown_as}: ')}")
    return f"{shown_as}:{lines[-1]}: {one_line(text)}"


def _module_of(path: pathlib.Path, source: bytes) -> types.ModuleType:
    name = _package_name(path)
    if name is not None:
        return importlib.import_module(name)
    name = f"{FILE_MODULE}{hashlib.sha256(bytes(path)).hexdigest()[:12]}"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    # Dataclasses look their module up while the file runs.
    sys.modules[name] = module
    try:
        exec(compile(source, path, "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _package_name(path: pathlib.Path) -> str | None:
    """The dotted name of a file inside one of our packages, e.g. configs.experiments.EDM.x."""
    for package in ALLOWED:
        for folder in path.parents:
            if folder.name != package:
                continue
            spec = importlib.util.find_spec(package)
            places = spec.submodule_search_locations if spec is not None else None
            if places and folder in [pathlib.Path(place).resolve() for place in places]:
                parts = path.relative_to(folder.parent).with_suffix("").parts
                return ".".join(parts) if all(part.isidentifier() for part in parts) else None
    return None
