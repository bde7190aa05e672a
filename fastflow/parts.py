"""What an experiment is made of: parts, which are values, and lazies, which are built later.

A `Part` is a frozen dataclass whose fields are checked when it is written. A `Lazy` is a class
with its arguments, checked against the constructor's signature when it is written; it stands for
something heavy or stateful (a network, a dataset, an optimizer, a callback). Both say on one line
which argument is wrong, what was given and what is accepted.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar, cast

from fastflow.annotations import Deferred, T_co, coerce, describe, join, kinds, one_line, shown
from fastflow.errors import ConfigError, one_of

T = TypeVar("T")

REQUIRED = inspect.Parameter.empty
"""The `Parameter.default` of an argument that has none."""


class PartType(abc.ABCMeta):
    """The class of part classes: refuses wrong argument names with a `ConfigError`."""

    @property
    def __signature__(cls) -> inspect.Signature:
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        _require_instantiable(cls)
        accepted = parameters(cls)
        if args:
            raise ConfigError(
                f"{cls.__name__}: {shown(args[0])} given without a name; arguments are given by "
                f"name, accepted: {', '.join(accepted) or 'none'}"
            )
        require_names(cls, kwargs, cls.__name__)
        require_given(cls, kwargs, cls.__name__)
        return cast(T, type.__call__(cls, **kwargs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part(metaclass=PartType):
    """A piece of an experiment: a frozen, keyword-only dataclass, checked when it is written.

    Subclasses are dataclasses of the same kind. Range checks go into `__post_init__` after
    `super().__post_init__()` and raise `ConfigError`. A field that holds something built later
    is annotated `Lazy` or `Lazy[Base]`.
    """

    def __post_init__(self) -> None:
        for name, value in checked(type(self), _fields_of(self), type(self).__name__).items():
            object.__setattr__(self, name, value)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Lazy(Deferred[T_co]):
    """A class and its arguments, to be built later. Made with `lazy(cls, **kwargs)`.

    Attributes are read as `node.lr`. Equal nodes have the same class and equal arguments.

    Attributes:
        target: the class.
        kwargs: its arguments by name, read-only: those given and the constructor's defaults.
            Only required arguments that were not given are absent.
    """

    target: type[T_co]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_lazy_target(self.target)
        where = self.target.__name__
        require_names(self.target, self.kwargs, where)
        defaults = {n: p.default for n, p in parameters(self.target).items()}
        given = {n: self.kwargs.get(n, default) for n, default in defaults.items()}
        present = {n: v for n, v in given.items() if v is not REQUIRED}
        values = checked(self.target, present, where)
        object.__setattr__(self, "kwargs", types.MappingProxyType(values))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("target", "kwargs"):
            raise AttributeError(name)
        if name not in self.kwargs:
            raise AttributeError(
                f"lazy({self.target.__name__}) has no {name!r}: {one_of(name, self.kwargs)}"
            )
        return self.kwargs[name]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Lazy):
            return NotImplemented
        return self.target is other.target and dict(self.kwargs) == dict(other.kwargs)

    def __hash__(self) -> int:
        return hash((self.target, tuple(self.kwargs)))

    def __repr__(self) -> str:
        arguments = [f"{n}={v!r}" for n, v in self.kwargs.items()]
        return f"lazy({', '.join([self.target.__name__, *arguments])})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Lazy, (self.target, dict(self.kwargs))

    def replace(self, /, **kwargs: Any) -> Lazy[T_co]:
        """The same node with some arguments changed, checked again."""
        return Lazy(self.target, {**self.kwargs, **kwargs})


def lazy(target: type[T], /, **kwargs: Any) -> Lazy[T]:
    """Describe an object of class `target` without making it.

    Arguments the run supplies when it builds the object (an optimizer's `params`, say) are left
    out. Arguments annotated with a class also take a `lazy` of it or of a subclass.

    Raises:
        ConfigError: the target is not a class of a module, or is a `Part`; an argument is unknown
            or of a wrong type.
    """
    return Lazy(target, kwargs)


# What a class accepts


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What a constructor accepts under one name; `default` is `REQUIRED` where it has none."""

    annotation: Any
    default: Any


def parameters(cls: type) -> Mapping[str, Parameter]:
    """The arguments that a class takes by name, in order."""
    return _parameters(cls)


@functools.cache
def _parameters(cls: type) -> Mapping[str, Parameter]:
    is_dataclass = dataclasses.is_dataclass(cls)
    own = vars(cls)
    if issubclass(cls, Part) and "__annotations__" in own and "__dataclass_fields__" not in own:
        raise TypeError(f"{cls.__name__} lacks its @dataclass(frozen=True, kw_only=True)")
    hints = annotations_of(cls if is_dataclass else cls.__init__)  # type: ignore[misc]
    factories = {f.name: f.default_factory for f in dataclasses.fields(cls)} if is_dataclass else {}
    found = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            continue
        factory = factories.get(name, dataclasses.MISSING)
        default = parameter.default if factory is dataclasses.MISSING else factory()
        found[name] = Parameter(hints.get(name, _type_of(default)), default)
    return types.MappingProxyType(found)


@functools.cache
def annotations_of(owner: Any) -> dict[str, Any]:
    """Resolved annotations of a dataclass's fields or of a callable's parameters."""
    try:
        return typing.get_type_hints(owner)
    except NameError as error:
        raise TypeError(
            f"the annotations of {owner.__qualname__} in {owner.__module__} name {error.name!r}, "
            f"which does not exist at run time; import it outside `if TYPE_CHECKING`"
        ) from error


def checked(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` as `cls` takes them, or a `ConfigError` that names `where` and the argument."""
    accepted = parameters(cls)
    return {n: coerce(v, accepted[n].annotation, join(where, n)) for n, v in values.items()}


def require_names(cls: type, names: Iterable[str], where: str) -> None:
    """Refuse arguments that `cls` does not take."""
    accepted = parameters(cls)
    for name in names:
        if name not in accepted:
            raise ConfigError(
                f"{join(where, name)}: {cls.__name__} takes no {name!r}; {one_of(name, accepted)}"
            )


def require_given(cls: type, names: Collection[str], where: str) -> None:
    """Refuse to go on without the arguments that `cls` has no default for."""
    accepted = parameters(cls)
    absent = [n for n, p in accepted.items() if p.default is REQUIRED and n not in names]
    if absent:
        wanted = ", ".join(f"{n} ({describe(accepted[n].annotation)})" for n in absent)
        text = f"{cls.__name__} needs {wanted}, which is not given"
        raise ConfigError(text if where == cls.__name__ else f"{where}: {text}")


def located(error: ConfigError, cls: type, where: str) -> ConfigError:
    """What the constructor of `cls` says of its arguments, by their keys from the root."""
    text = str(error)
    head = re.match(r"(?:[A-Z]\w*\.)?([a-z]\w*)(?:\.\w+)*: ", text)
    if not where or text.startswith((f"{where}:", f"{where}.")):
        return error
    if head is not None and head[1] in parameters(cls):
        return ConfigError(join(where, text[head.start(1) :]))
    return ConfigError(f"{where}: {text.removeprefix(f'{cls.__name__}: ')}")


def _fields_of(part: Part) -> dict[str, Any]:
    return {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init}


def _type_of(default: Any) -> Any:
    """The type accepted for an argument without annotation."""
    if default is REQUIRED or default is None:
        return Any
    return int | float if type(default) is int else type(default)


def _require_instantiable(cls: type) -> None:
    if inspect.isabstract(cls):
        raise ConfigError(
            f"{cls.__name__} is abstract; one of its kinds is accepted: "
            f"{', '.join(kinds(cls)) or 'none is imported'}"
        )


def _require_lazy_target(target: object) -> None:
    if not isinstance(target, type):
        raise ConfigError(
            f"lazy({one_line(repr(target))}): {type(target).__name__} given, a class "
            f"accepted, because a saved experiment names it as module:Class"
        )
    if issubclass(target, Part):
        raise ConfigError(
            f"lazy({target.__name__}): a Part is a value; write {target.__name__}(...) itself"
        )
    if "." in target.__qualname__:
        raise ConfigError(
            f"lazy({target.__qualname__}): a class inside a function or class cannot be named "
            f"in a saved experiment; move it to the top of its module"
        )
    _require_instantiable(target)
