"""Four ways to a tangent, and what none of them may be given."""

from __future__ import annotations

import abc
import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from fastflow.errors import ConfigError
from fastflow.parts import Part
from fastflow.rng import PairedRNG
from fastflow.tangent.pairs import Pair, propagating
from fastflow.tangent.rules import dual, dual_numbers

Function = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class TangentEngine(Part, abc.ABC):
    """A way to take a value and a tangent together. Call it by `value_and_jvp`, which checks.

    Attributes:
        exact: whether the tangent is right to rounding.
        compiled: whether networks may be compiled.
    """

    exact: ClassVar[bool] = True
    compiled: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What results show."""

    @abc.abstractmethod
    def __call__(
        self, f: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """f(*primals) with its graph, and its tangent without one."""


@dataclass(frozen=True, kw_only=True)
class Pairs(TangentEngine):
    """Carries (primal, tangent) through the network in one pass, by a table of rules.

    About 1.5 times an ordinary step, at its memory: the value's graph is that of an ordinary
    forward pass, to the bit, and nothing of the tangents is kept. Works with dropout (one mask),
    autocast, fused attention, FSDP2 and non-reentrant checkpointing, whose inputs are kept with
    their tangents. A function without a rule is refused by its name, changes in place too; and so
    is what would cut the graph of the value: an autograd.Function, reentrant checkpointing.
    """

    @property
    def name(self) -> str:
        return "exact, pairs"

    def __call__(
        self, f: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        inputs = [p if t is None else Pair(p, t) for p, t in zip(primals, tangents, strict=True)]
        with propagating(), _uncompiled():
            out: object = f(*inputs)
        if not isinstance(out, Pair):
            _lost(self, out)
        return out.primal, out.tangent


@dataclass(frozen=True, kw_only=True)
class DualNumbers(TangentEngine):
    """An ordinary forward pass, then one of torch's dual numbers without graph.

    About 2.3 times an ordinary step, at its memory. For networks that `Pairs` has no rules for.
    Both passes draw the same dropout masks; attention runs unfused in the second.
    """

    @property
    def name(self) -> str:
        return "exact, dual numbers"

    def __call__(
        self, f: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        masks = PairedRNG.snapshot(primals[0].device)
        # First, for autocast would hand on weights that the other pass has cast without graph.
        value = f(*primals)
        with masks.replay(), _forward_mode(), dual_numbers():
            pairs = zip(primals, tangents, strict=True)
            inputs = [p if t is None else dual(p, t) for p, t in pairs]
            with _NoAttentionDropout():
                return value, _tangent_of(f(*inputs), self)


@dataclass(frozen=True, kw_only=True)
class FunctionalJVP(TangentEngine):
    """`torch.func.jvp` in one pass: the reference.

    About 2.8 times an ordinary step, with the most memory of all, because the tangent's graph is
    built too. Not with activation checkpointing, whose backward pass would fail.
    """

    @property
    def name(self) -> str:
        return "exact, func.jvp"

    def __call__(
        self, f: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        moving = [i for i, t in enumerate(tangents) if t is not None]

        def along(*values: Tensor) -> Tensor:
            inputs = list(primals)
            for i, value in zip(moving, values, strict=True):
                inputs[i] = value
            out = f(*inputs)
            _tangent_of(out, self)
            return out

        with _forward_mode(), _no_checkpointing():
            points, directions = (tuple(given[i] for i in moving) for given in (primals, tangents))
            value, tangent = cast(tuple[Tensor, Tensor], torch.func.jvp(along, points, directions))
        return value, tangent.detach()


@dataclass(frozen=True, kw_only=True)
class FiniteDifference(TangentEngine):
    """(f(x + h dx) - f(x - h dx)) / 2h, or (f(x + h dx) - f(x)) / h: not exact.

    A choice by name for networks that nothing else takes. All passes draw the same dropout masks.
    The error is the curvature along the direction times a power of h, plus rounding over h, so h
    belongs to a network and its precision. Measured on a U-Net of 10 M parameters, relative to an
    exact tangent, with the best of several h:

    | | embedded time up to 1000 | up to 8 |
    |---|---|---|
    | exact, float32 | 1.2e-5 | 6e-7 |
    | central, float32 | 1.4e-3 (h = 1e-4) | 9.9e-5 (h = 5e-3) |
    | forward, float32 | 7e-3 | 1.2e-3 |
    | exact, bfloat16 autocast | 3.7e-2 | 1.4e-2 |
    | central, bfloat16 autocast | 0.43 (h = 1e-3) | 5.6e-2 (h = 0.1) |

    A step ten times off can cost a factor 10 to 1000. f is called at t + h dt and t - h dt, also
    beyond the range of times.

    Attributes:
        step: h, in units of the tangents: with dt = 1, in units of time.
        scheme: "central", two more forward passes without graph; "forward", one.
    """

    exact: ClassVar[bool] = False
    compiled: ClassVar[bool] = True

    step: float
    scheme: Literal["central", "forward"] = "central"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.step < float("inf"):
            raise ConfigError(
                f"FiniteDifference.step: {self.step} given, accepted: above 0, e.g. 5e-3 for "
                f"times that reach the network as numbers up to 10, 1e-4 for up to 1000"
            )

    @property
    def name(self) -> str:
        return f"finite differences ({self.scheme}, h={self.step:g})"

    def __call__(
        self, f: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        masks = PairedRNG.snapshot(primals[0].device)
        value = f(*primals)  # first, see DualNumbers

        def shifted(h: float) -> Tensor:
            with masks.replay(), torch.no_grad():
                inputs = zip(primals, tangents, strict=True)
                return f(*(p if t is None else p + h * t for p, t in inputs))

        h = self.step
        if self.scheme == "forward":
            return value, (shifted(h) - value.detach()) / h
        return value, (shifted(h) - shifted(-h)) / (2 * h)


_DEFAULT = Pairs()


def value_and_jvp(
    f: Function,
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    engine: TangentEngine = _DEFAULT,
) -> tuple[Tensor, Tensor]:
    """f(*primals) with its graph, and its derivative along the tangents without one.

    Within no_grad or inference mode the value has no graph either, and the tangent is the same.

    Args:
        f: from tensors to one tensor; a function around a network.
        primals: where, e.g. (x [B, ...], t [B]). Times in float32 or wider.
        tangents: along what; each in shape and type of its primal, or None for zero. None costs
            less than a tensor of zeros.
        engine: how, see the module's docstring.

    Returns:
        (value, tangent), of one shape and type.

    Raises:
        ConfigError: arguments that do not fit each other, a network that is compiled or wrapped in
            DDP, an f on whose way tangents are lost, or that the engine cannot take.
    """
    _check_arguments(primals, tangents)
    _check_networks(f, engine)
    directions = [None if t is None else t.detach() for t in tangents]
    value, tangent = engine(f, primals, directions)
    assert tangent.shape == value.shape
    assert not tangent.requires_grad
    return value, tangent.to(value.dtype)


def _check_arguments(primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> None:
    if len(primals) != len(tangents):
        raise ConfigError(
            f"tangents: {len(tangents)} given, accepted: {len(primals)}, one for each primal (None "
            f"for zero)"
        )
    if all(tangent is None for tangent in tangents):
        raise ConfigError("tangents: none given, accepted: at least one that is not None")
    for i, (primal, tangent) in enumerate(zip(primals, tangents, strict=True)):
        if primal.ndim < 2 and primal.dtype in (torch.float16, torch.bfloat16):
            raise ConfigError(
                f"primals[{i}]: times in {primal.dtype} given, accepted: torch.float32 or "
                f"torch.float64; a narrow type has rounded them"
            )
        if tangent is None:
            continue
        if not primal.is_floating_point():
            raise ConfigError(
                f"primals[{i}]: {primal.dtype} given with a tangent, accepted: a floating-point "
                f"type; convert times with .float()"
            )
        if (tangent.shape, tangent.dtype) != (primal.shape, primal.dtype):
            raise ConfigError(
                f"tangents[{i}]: {tuple(tangent.shape)} in {tangent.dtype} given, accepted: "
                f"{tuple(primal.shape)} in {primal.dtype}, as its primal"
            )


def _check_networks(f: Function, engine: TangentEngine) -> None:
    """Refuse networks that f holds and for which tangents or gradients get lost in silence."""
    for found in _held_by(f):
        modules = found.modules() if isinstance(found, nn.Module) else [found]
        for module in modules:
            if isinstance(module, DistributedDataParallel):
                raise ConfigError(
                    "network: wrapped in DistributedDataParallel, whose gradients would not be "
                    "averaged; shard it with fastflow.distributed.shard instead (FSDP2, also for "
                    "plain data parallelism)"
                )
            if not engine.compiled and _is_compiled(module):
                raise ConfigError(
                    f"network: {type(module).__name__} is compiled, which loses tangents with "
                    f"engine={type(engine).__name__}; compile with Parallel(compile=True), which "
                    f"knows of tangents, or use engine=FiniteDifference(step=...)"
                )


def _is_compiled(module: Any) -> bool:
    """Whether torch.compile made this function or module, or was applied to it in place."""
    own = getattr(module, "__dict__", {})
    return (
        "_orig_mod" in own.get("_modules", ())
        or own.get("_compiled_call_impl") is not None
        or "_torchdynamo_orig_callable" in own
        or "_torchdynamo_orig_callable" in getattr(own.get("forward"), "__dict__", ())
    )


_DEPTH = 6


def _held_by(f: object) -> Iterator[Any]:
    """The modules and functions that f holds: bound, partially applied, in closures, in fields."""
    seen: set[int] = set()
    todo: list[tuple[object, int]] = [(f, 0)]
    while todo:
        item, depth = todo.pop()
        if id(item) in seen or depth > _DEPTH:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module) or inspect.isfunction(item):
            yield item
        todo += [(inner, depth + 1) for inner in _inside(item)]


def _inside(item: object) -> Iterable[object]:
    if isinstance(item, nn.Module | Tensor | type) or inspect.ismodule(item):
        return ()
    if isinstance(item, Mapping):
        return item.values()
    if isinstance(item, list | tuple):
        return item
    if isinstance(item, functools.partial):
        return (item.func, *item.args, *item.keywords.values())
    if inspect.ismethod(item):
        return (item.__self__, item.__func__)
    if inspect.isfunction(item):
        cells = (cell.cell_contents for cell in item.__closure__ or () if _filled(cell))
        names = (item.__globals__.get(name) for name in item.__code__.co_names)
        known = (value for value in names if isinstance(value, nn.Module) or _is_compiled(value))
        return (*cells, *(item.__defaults__ or ()), *known, *vars(item).values())
    return getattr(item, "__dict__", {}).values()


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018, empty until its name is assigned
    except ValueError:
        return False
    return True


def _tangent_of(out: Tensor, engine: TangentEngine) -> Tensor:
    """The tangent of what f returned for dual numbers."""
    tangent: Tensor | None = None
    if isinstance(out, Tensor):
        tangent = forward_ad.unpack_dual(out).tangent
    if tangent is None:
        _lost(engine, out)
    return tangent


def _lost(engine: TangentEngine, out: object) -> NoReturn:
    """Raise: what f returns does not depend on its inputs, as far as the engine can see."""
    if not isinstance(out, Tensor | Pair):
        raise ConfigError(f"f: {type(out).__name__} returned, accepted: one tensor")
    raise ConfigError(
        f"f: its tangent is lost with engine={type(engine).__name__}: no input with a tangent "
        f"reaches the output; look for detach(), .data, a round trip through numbers or a compiled "
        f"network inside of f"
    )


@contextlib.contextmanager
def _forward_mode() -> Iterator[None]:
    """For networks that are not ours: only the unfused kernel of attention has a forward mode."""
    with sdpa_kernel(SDPBackend.MATH), _uncompiled():
        yield


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Compiled code that `_check_networks` did not find runs uncompiled: it would lose tangents."""
    if "torch._dynamo" not in sys.modules:  # slow to import; without it nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _NoAttentionDropout(TorchFunctionMode):
    """Refuses masks that a fused kernel drew in the first pass and that no other can draw again."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            dropout = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
            if dropout > 0:
                raise ConfigError(
                    f"network: attention with dropout_p={dropout} given, accepted with "
                    f"engine=DualNumbers: 0, for its masks cannot be drawn twice; set it to 0 or "
                    f"use engine=FunctionalJVP()"
                )
        return func(*args, **kwargs)


_CHECKPOINTED = (
    "network: activation checkpointing given, not accepted by engine=FunctionalJVP, whose backward "
    "pass would fail; use engine=Pairs() or DualNumbers(), or leave checkpointing out"
)


@contextlib.contextmanager
def _no_checkpointing() -> Iterator[None]:
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_CHECKPOINTED):
            yield
    except RuntimeError as error:
        if _CHECKPOINTED in str(error):
            raise ConfigError(_CHECKPOINTED) from error
        raise
