"""Trees of parts and lazies as plain data, as YAML, and compared.

Every node becomes `{_target_: module:Class, ...}` with every argument. Reading looks up classes
of allowed packages only and runs every check again; each error is one line that starts with the
full key. YAML is read and written by OmegaConf; `${...}` and `???` stay text.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import pathlib
import pkgutil
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastflow.annotations import join, one_line, shown
from fastflow.errors import ConfigError, FastflowError, one_of
from fastflow.parts import Lazy, Part, checked, located, require_given, require_names

ALLOWED = ("fastflow", "methods", "networks", "callbacks", "configs", "torch.optim")
"""Packages whose classes a YAML file or an override may name."""

TARGET = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)", re.ASCII)
"""How a class is named: module:Class."""

_SCALARS = (bool, int, float, str, type(None))
_MOST_NESTED = 10_000


# Plain data and back


def arguments(node: Part | Lazy) -> Mapping[str, Any]:
    """The arguments of a node by name."""
    if isinstance(node, Lazy):
        return node.kwargs
    return {f.name: getattr(node, f.name) for f in dataclasses.fields(node) if f.init}


def to_plain(value: Any, where: str = "") -> Any:
    """A tree as mappings, lists and scalars; a node as `{"_target_": "module:Class", ...}`.

    Raises:
        ConfigError: something cannot be saved (a tensor, a function, a class without a name of
            its own in a module), with its dotted key.
    """
    if type(value) in _SCALARS:
        return value
    if isinstance(value, Part | Lazy):
        cls = value.target if isinstance(value, Lazy) else type(value)
        if "." in cls.__qualname__:
            raise ConfigError(
                f"{where or cls.__name__}: {cls.__qualname__} cannot be named in a saved "
                f"experiment; move the class to the top of its module"
            )
        fields = {n: to_plain(v, join(where, n)) for n, v in arguments(value).items()}
        return {"_target_": f"{cls.__module__}:{cls.__qualname__}", **fields}
    if isinstance(value, list | tuple):
        return [to_plain(v, join(where, i)) for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        return {k: to_plain(v, join(where, k)) for k, v in value.items()}
    if isinstance(value, pathlib.Path):
        return str(value)
    raise ConfigError(
        f"{where or 'experiment'}: {shown(value)} cannot be saved; accepted: None, bool, int, "
        f"float, str, list, tuple, mapping, Part, lazy(...)"
    )


def from_plain(data: Any, allow: Iterable[str] = (), where: str = "") -> Any:
    """The tree that `to_plain` made plain, every check run again.

    Args:
        data: mappings, lists and scalars.
        allow: packages beside `ALLOWED` whose classes may be named.
        where: dotted key of `data`, for errors.

    Raises:
        ConfigError: a target is refused or does not exist, or an argument is not accepted.
    """
    if isinstance(data, list | tuple):
        return [from_plain(v, allow, join(where, i)) for i, v in enumerate(data)]
    if not isinstance(data, Mapping):
        return data
    values = {k: from_plain(v, allow, join(where, k)) for k, v in data.items() if k != "_target_"}
    if "_target_" not in data:
        return values
    cls = _resolve(data["_target_"], (*ALLOWED, *allow), join(where, "_target_"))
    require_names(cls, values, where)
    values = checked(cls, values, where)
    if issubclass(cls, Part):
        require_given(cls, values, where or cls.__name__)
    try:
        return cls(**values) if issubclass(cls, Part) else Lazy(cls, values)
    except ConfigError as error:
        raise located(error, cls, where) from error


def targets_of(root: Any) -> tuple[str, ...]:
    """The classes a tree is made of, each as module:Class."""
    return tuple(sorted(set(_targets(to_plain(root)))))


def packages_of(root: Any) -> tuple[str, ...]:
    """The modules whose classes a tree is made of: what must be allowed to read it again."""
    return tuple(sorted({target.partition(":")[0] for target in targets_of(root)}))


def own_packages_of(root: Any) -> tuple[str, ...]:
    """The modules of a tree that `ALLOWED` does not hold: those a reader must allow."""
    return tuple(module for module in packages_of(root) if not _is_of(module, ALLOWED))


def _is_of(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _targets(plain: Any) -> Iterator[str]:
    if isinstance(plain, dict):
        yield from (v for k, v in plain.items() if k == "_target_")
        plain = list(plain.values())
    if isinstance(plain, list):
        for value in plain:
            yield from _targets(value)


def _resolve(target: Any, allowed: tuple[str, ...], where: str) -> type:
    """The class a text names, if it is one of ours; nothing else is ever looked up."""
    match = TARGET.fullmatch(target) if isinstance(target, str) else None
    if match is None:
        raise ConfigError(f"{where}: {shown(target)} given, module:Class accepted")
    module_name, name = match.groups()
    _require_allowed(module_name, allowed, f"{where}: {target!r}")
    module = _imported(module_name, f"{where}: {target!r}")
    cls = vars(module).get(name)
    if not isinstance(cls, type):
        found = {n: v for n, v in vars(module).items() if inspect.isclass(v)}
        own = [n for n, v in found.items() if f"{v.__module__}.".startswith(f"{module_name}.")]
        raise ConfigError(f"{where}: {module_name} has no class {name!r}; {one_of(name, own)}")
    home = cls.__module__
    _require_allowed(home, allowed, f"{where}: {target!r} comes from {home}, which")
    return cls


def _require_allowed(module: str, allowed: tuple[str, ...], text: str) -> None:
    if not _is_of(module, allowed):
        raise ConfigError(
            f"{text} is refused; classes of these packages are accepted: {', '.join(allowed)}; "
            f"--allow PACKAGE (in Python, allow=) adds one that you trust"
        )


def _imported(name: str, text: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except FastflowError:
        raise
    except ModuleNotFoundError as error:
        parent, _, last = name.rpartition(".")
        if error.name != name or not parent:
            raise ConfigError(f"{text} cannot be imported: {error}") from error
        search = vars(importlib.import_module(parent)).get("__path__", ())
        siblings = [m.name for m in pkgutil.iter_modules(search)]
        raise ConfigError(
            f"{text}: {parent} has no module {last!r}; {one_of(last, siblings)}"
        ) from error
    except ImportError as error:
        raise ConfigError(f"{text} cannot be imported: {one_line(error)}") from error


# YAML


def parse(text: str, source: str) -> Any:
    """The plain data of a YAML text, as OmegaConf reads a dotlist value; 1e-4 is a number.

    Raises:
        ConfigError: it is not valid YAML, repeats a key or asks for an object; the text starts
            with `source`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import MarkedYAMLError, YAMLError

    if sum(map(text.count, "[{-?")) > _MOST_NESTED:
        # PyYAML's C parser recurses without a limit and would end the process.
        raise ConfigError(f"{source}: not valid YAML: too many brackets or dashes")
    try:
        read = OmegaConf.from_dotlist([f"value={text}"])
        return OmegaConf.to_container(read, resolve=False)["value"]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: not valid YAML: {_refusal(error)}") from error
    except MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{source}: not valid YAML:{line} {one_line(error.problem)}") from error
    except (YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # Not only its own errors: !!int "" ends in an IndexError, !!bool x in a KeyError.
        raise ConfigError(f"{source}: not valid YAML: {one_line(error)}") from error


def _refusal(error: Any) -> str:
    """What OmegaConf says of a value, mostly that '${' begins no whole '${...}', with its key."""
    key = (error.full_key or "").removeprefix("value").removeprefix(".")
    problem = str(error).partition("\n")[0]
    return f"{key}: {problem}" if key else problem


def to_yaml(root: Any) -> str:
    """A tree as YAML text, which `from_plain` takes back once it is parsed.

    Raises:
        ConfigError: something cannot be saved: what `to_plain` refuses, a text with an
            unfinished `${`, a key of another type than str, int, float or bool.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return str(OmegaConf.to_yaml(OmegaConf.create(to_plain(root))))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_refusal(error)}; it cannot be saved") from error


def save_yaml(root: Any, path: str | os.PathLike[str]) -> None:
    """Write a tree; the file appears complete or not at all."""
    text = to_yaml(root)
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The plain data of a YAML file; nothing it names is imported."""
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    return parse(text, str(path))


def load_yaml(path: str | os.PathLike[str], allow: Iterable[str] = ()) -> Any:
    """Read a tree written by `save_yaml`, with the checks and the allow-list of `from_plain`."""
    data = read_yaml(path)
    try:
        return from_plain(data, allow)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


# Comparison


def diff(a: Any, b: Any) -> list[str]:
    """The differences of two trees, or of their plain data, as lines `key: old -> new`."""
    return list(_differences(to_plain(a), to_plain(b), ""))


_ABSENT = object()


def _differences(old: Any, new: Any, where: str) -> Iterator[str]:
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not (
        isinstance(old, dict)
        and isinstance(new, dict)
        and old.get("_target_") == new.get("_target_")
    ):
        # repr, so that 1 differs from True and nan does not differ from nan.
        if repr(old) != repr(new):
            yield f"{where or 'experiment'}: {_brief(old)} -> {_brief(new)}"
        return
    for key in dict.fromkeys([*old, *new]):
        yield from _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), join(where, key))


def _brief(plain: Any) -> str:
    if plain is _ABSENT:
        return "(absent)"
    if isinstance(plain, dict) and "_target_" in plain:
        fields = [f"{k}={_brief(v)}" for k, v in plain.items() if k != "_target_"]
        text = f"{plain['_target_']}({', '.join(fields)})"
    elif isinstance(plain, list):
        text = f"[{', '.join(_brief(v) for v in plain)}]"
    else:
        text = repr(plain)
    return text if len(text) <= 200 else f"{text[:197]}..."
