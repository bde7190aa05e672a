"""Annotations at run time: values checked against them, converted and described.

Every mismatch is one line that names the key, what was given and what is accepted.
"""

from __future__ import annotations

import abc
import collections.abc
import inspect
import math
import pathlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, Literal, Union

from fastflow.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    T_co = TypeVar("T_co", covariant=True, default=Any)
else:
    T_co = typing.TypeVar("T_co", covariant=True)


class Deferred(Generic[T_co]):
    """Stands for an object of class `target` that is made later: what `fastflow.parts.Lazy` is."""

    target: type[T_co]


_CALLABLE: Any = collections.abc.Callable
_SEQUENCES = (
    collections.abc.Sequence,
    collections.abc.Collection,
    collections.abc.Iterable,
    tuple,
)
_MAPPINGS = (dict, collections.abc.Mapping)
_PLAIN = ("builtins", "collections.abc", "pathlib", "typing")


# Told in errors


def join(where: str, name: object) -> str:
    """A dotted key one level deeper."""
    return f"{where}.{name}" if where else str(name)


def one_line(text: object) -> str:
    """A text without its line breaks."""
    return " ".join(str(text).split())


def shown(value: object) -> str:
    """A value and its type, on one line of bounded length."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = one_line(repr(value))
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def describe(annotation: Any) -> str:
    """Name a type as a person would write it; an abstract class of ours with its kinds."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        return "None"
    if annotation is Ellipsis:
        return "..."
    if origin is Literal:
        return " | ".join(repr(a) for a in args)
    if origin in (Union, types.UnionType):
        return " | ".join(describe(a) for a in args)
    if _is_deferred(origin or annotation):
        return f"lazy({describe(args[0]) if args else 'class'}, ...)"
    if isinstance(origin, type) and origin is not _CALLABLE:
        return f"{origin.__name__}[{', '.join(describe(a) for a in args)}]"
    if isinstance(annotation, abc.ABCMeta) and _is_component(annotation):
        found = kinds(annotation)
        return annotation.__name__ + (f" (one of {', '.join(found)})" if found else "")
    if isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("collections.abc.", "")


def kinds(base: type) -> list[str]:
    """What can be given for `base`: its imported concrete subclasses, as `module:Class`.

    Empty if there is nothing to choose: no subclass.
    """
    found = {
        f"{cls.__module__}:{cls.__name__}"
        for cls in (base, *_subclasses(base))
        if not inspect.isabstract(cls) and "." not in cls.__qualname__
    }
    return sorted(found) if base.__subclasses__() else []


def _subclasses(base: type) -> Iterator[type]:
    children: list[type] = base.__subclasses__()
    for cls in children:
        yield cls
        yield from _subclasses(cls)


# Read


def wants_component(annotation: Any) -> bool:
    """Whether a class of ours or of a library is asked for, and no text."""
    options = _options(annotation)
    return str not in options and any(_is_component(o) for o in options)


def item_annotation(annotation: Any, index: int | None) -> Any:
    """What an item of a sequence (at `index`) or of a mapping is annotated with."""
    for option in _options(annotation):
        origin, args = typing.get_origin(option), typing.get_args(option)
        if not args or _is_deferred(origin) or not isinstance(origin, type):
            continue
        if index is None or not issubclass(origin, tuple):
            return args[-1]
        return args[0] if args[-1] is Ellipsis else args[min(index, len(args) - 1)]
    return Any


def _options(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _is_component(annotation: Any) -> bool:
    kind = typing.get_origin(annotation) or annotation
    return kind is _CALLABLE or (isinstance(kind, type) and kind.__module__ not in _PLAIN)


def _is_deferred(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Deferred)


# Checked


class _Mismatch(Exception):
    pass


def coerce(value: Any, annotation: Any, where: str) -> Any:
    """Return `value` as `annotation`, or raise a `ConfigError` that names `where`.

    Only conversions that lose nothing are made: int to float, str to Path, between list and
    tuple. A bool is never taken for a number. Where a class is asked for, a `lazy` of it or of a
    subclass is accepted.
    """
    try:
        return _coerce(value, annotation, where)
    except _Mismatch:
        raise ConfigError(
            f"{where}: {shown(value)} given, {describe(annotation)} accepted"
        ) from None


def _coerce(value: Any, annotation: Any, where: str) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    kind = origin or annotation
    if annotation is Any or isinstance(annotation, typing.TypeVar):
        return _without_lists(value)
    if kind in (Union, types.UnionType):
        return _any_of(value, args, where)
    if kind is Literal:
        return _require(any(value == a and type(value) is type(a) for a in args), value)
    if annotation is None or annotation is type(None):
        return _require(value is None, value)
    if kind is bool or kind is str:
        return _require(isinstance(value, kind), value)
    if kind is int:
        return _require(isinstance(value, int) and not isinstance(value, bool), value)
    if kind is float:
        _require(isinstance(value, int | float) and not isinstance(value, bool), value)
        if math.isnan(value):
            raise ConfigError(f"{where}: nan given, a number accepted")
        return float(value)
    if kind is pathlib.Path:
        return pathlib.Path(_require(isinstance(value, str | pathlib.Path), value))
    if kind in _SEQUENCES or kind is list:
        return _sequence(value, list if kind is list else tuple, args, where)
    if kind in _MAPPINGS:
        _require(isinstance(value, Mapping), value)
        each_key, each = args or (Any, Any)
        return {
            _coerce(k, each_key, where): coerce(v, each, join(where, k)) for k, v in value.items()
        }
    if kind is _CALLABLE:
        return _require(callable(value) and not isinstance(value, type), value)
    if _is_deferred(kind):
        base = args[0] if args and isinstance(args[0], type) else object
        return _require(isinstance(value, kind) and issubclass(value.target, base), value)
    return _instance(value, kind) if isinstance(kind, type) else value


def _require(ok: bool, value: Any) -> Any:
    if not ok:
        raise _Mismatch
    return value


def _instance(value: Any, cls: type) -> Any:
    """An object of a class, or a lazy that will become one."""
    made = value.target if isinstance(value, Deferred) else type(value)
    if not getattr(cls, "_is_protocol", False):
        return _require(isinstance(value, cls) or issubclass(made, cls), value)
    protocols = [base for base in cls.__mro__ if getattr(base, "_is_protocol", False)]
    asked = {n for base in protocols for n, member in vars(base).items() if _is_asked(n, member)}
    _require(not isinstance(value, type), value)
    # Not hasattr: every class has the __call__ of its own class.
    return _require(asked <= {name for base in made.__mro__ for name in vars(base)}, value)


def _is_asked(name: str, member: object) -> bool:
    return isinstance(member, types.FunctionType) and (name == "__call__" or name[0] != "_")


def _any_of(value: Any, options: tuple[Any, ...], where: str) -> Any:
    """The first option that takes the value as it is, else the first that converts it."""
    converted: list[Any] = []
    errors: list[ConfigError] = []
    for option in options:
        try:
            result = _coerce(value, option, where)
        except ConfigError as error:
            errors.append(error)
        except _Mismatch:
            continue
        else:
            if type(result) is type(value):
                return result
            converted.append(result)
    if converted:
        return converted[0]
    if len(errors) == 1:
        raise errors[0]
    raise _Mismatch


def _sequence(value: Any, kind: Callable[[Any], Any], args: tuple[Any, ...], where: str) -> Any:
    _require(isinstance(value, list | tuple), value)
    if kind is tuple and len(args) > 1 and args[1] is not Ellipsis:
        if len(value) != len(args):
            raise ConfigError(f"{where}: {len(value)} values given, {len(args)} accepted")
        each = args
    else:
        each = (args[0] if args else Any,) * len(value)
    items = zip(value, each, strict=True)
    return kind(coerce(v, a, join(where, i)) for i, (v, a) in enumerate(items))


def _without_lists(value: Any) -> Any:
    """A value of unknown type, immutable where that is simple."""
    if isinstance(value, list | tuple):
        return tuple(_without_lists(v) for v in value)
    if isinstance(value, Mapping):
        return {k: _without_lists(v) for k, v in value.items()}
    return value
