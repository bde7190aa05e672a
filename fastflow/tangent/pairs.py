"""A tensor and its tangent as one object, which goes through unchanged network code.

Functions of torch hand a call with such an argument to `Pair.__torch_function__`, which looks up
the rule of that function (`fastflow.tangent.rules`). Primals keep their autograd graph and are
computed by the very same calls as without tangents; tangents are computed without gradient.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastflow.errors import ConfigError

Rule = Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]
"""From a torch function and its arguments to its result, pairs where pairs went in."""

RULES: dict[str, Rule] = {}
"""By the function's `__name__`, which torch.f, torch.nn.functional.f and Tensor.f share."""

_gradients: ContextVar[bool | None] = ContextVar("gradients", default=None)
"""Within `propagating`: whether gradients were on where it began."""


@contextlib.contextmanager
def propagating() -> Iterator[None]:
    """Within: functions of pairs are pairs. Elsewhere they are functions of the primals.

    So a backward pass that computes activations anew (checkpointing) leaves the tangents out.
    """
    token = _gradients.set(torch.is_grad_enabled())
    try:
        yield
    finally:
        _gradients.reset(token)


# FSDP's hooks look for tensors inside of dataclasses and pytrees, and so does checkpointing: a
# plain class would hide the graph from them, and gradients would be wrong without an error.
@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """x and dx, of one shape, type and device; stands for a tensor in calls of torch functions.

    Attributes:
        primal: the value, with its graph.
        tangent: its derivative along the direction asked for, without a graph.
    """

    primal: Tensor
    tangent: Tensor

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        gradients = _gradients.get()
        if gradients is None:
            return function(*primals(args), **primals(kwargs))
        if gradients and not torch.is_grad_enabled():
            _refuse_without_graph()
        name = function.__name__
        if name not in RULES or kwargs.get("out") is not None:
            refuse(f"no rule for {name}()")
        return RULES[name](function, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Methods and attributes of `Tensor`."""
        found = getattr(torch.Tensor, name, None)
        if name.startswith("_") or found is None:
            raise AttributeError(f"a pair of tensors has no {name!r}")
        if callable(found):
            return functools.partial(_call, found, self)
        if name in ("shape", "dtype", "device", "ndim", "layout") or name.startswith("is_"):
            return getattr(self.primal, name)
        if name != "mT":
            refuse(f"no rule for the attribute {name!r}")
        return _call(torch.Tensor.transpose, self, -2, -1)

    def __len__(self) -> int:
        return len(self.primal)

    def __iter__(self) -> Iterator[Any]:
        return iter(_call(torch.Tensor.unbind, self))

    def __bool__(self) -> bool:
        refuse("no rule for a decision by a value (if, and, or, not)")


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return Pair.__torch_function__(function, (), args, kwargs)


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: _call(function, *args)


_OPERATORS: dict[str, Any] = {
    "__neg__": torch.Tensor.neg,
    "__abs__": torch.Tensor.abs,
    "__add__": torch.Tensor.add,
    "__radd__": torch.Tensor.add,
    "__sub__": torch.Tensor.sub,
    "__rsub__": torch.Tensor.__rsub__,
    "__mul__": torch.Tensor.mul,
    "__rmul__": torch.Tensor.mul,
    "__truediv__": torch.Tensor.div,
    "__rtruediv__": torch.Tensor.__rdiv__,
    "__pow__": torch.Tensor.pow,
    "__rpow__": torch.Tensor.__rpow__,
    "__matmul__": torch.Tensor.matmul,
    "__getitem__": torch.Tensor.__getitem__,
    "__setitem__": torch.Tensor.__setitem__,
    # No rule is for these. Left out, Python would put a new pair in the place of the changed one,
    # and what else shares its memory would keep the old value.
    "__iadd__": torch.Tensor.__iadd__,
    "__isub__": torch.Tensor.__isub__,
    "__imul__": torch.Tensor.__imul__,
    "__itruediv__": torch.Tensor.__itruediv__,
    "__ipow__": torch.Tensor.__ipow__,
    "__lt__": torch.Tensor.lt,
    "__le__": torch.Tensor.le,
    "__gt__": torch.Tensor.gt,
    "__ge__": torch.Tensor.ge,
    "__eq__": torch.Tensor.eq,
    "__ne__": torch.Tensor.ne,
}
for _name, _function in _OPERATORS.items():
    setattr(Pair, _name, _operator(_function))
Pair.__hash__ = object.__hash__  # type: ignore[method-assign]

pytree.register_pytree_node(
    Pair,
    lambda pair: ([pair.primal, pair.tangent], None),
    lambda parts, _: Pair(*parts),
    serialized_type_name="fastflow.tangent.Pair",
)


def primals(value: Any) -> Any:
    """`value` with the primal in place of every pair, also inside of lists, tuples and dicts."""
    if isinstance(value, Pair):
        return value.primal
    if isinstance(value, list | tuple):
        items = [primals(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: primals(item) for key, item in value.items()}
    return value


def holds_pair(value: Any) -> bool:
    """Whether `value` is a pair, or a list, tuple or dict with one inside."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(holds_pair(item) for item in value)
    return isinstance(value, Pair)


def _refuse_without_graph() -> NoReturn:
    """Raise: the value would lack this part of its graph, and weights before it their gradient.

    An autograd.Function takes pairs for mere objects, whose graph it does not record; reentrant
    checkpointing is one.
    """
    raise ConfigError(
        "engine Pairs: f switches gradients off inside (an autograd.Function, reentrant "
        "checkpointing or no_grad), which would cut the graph of its value; use "
        "engine=DualNumbers(), and use_reentrant=False for checkpointing"
    )


def refuse(what: str) -> NoReturn:
    """Raise: a tangent would be lost."""
    raise ConfigError(
        f"engine Pairs: {what}; use engine=DualNumbers(), which needs none, or add one to "
        f"fastflow/tangent/rules.py"
    )
