"""Processes, devices and sharding: one path for one process and for many."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from fastflow.annotations import one_line
from fastflow.errors import ConfigError, FastflowError
from fastflow.meeting import meet
from fastflow.network import Network
from fastflow.peers import answered

T = TypeVar("T")

TIMEOUT = 1800.0
"""Seconds that processes wait for each other unless told otherwise."""


@dataclasses.dataclass(frozen=True)
class World:
    """Where this process stands: its rank, the number of processes, its device.

    Attributes:
        rank, size: this process, and how many there are.
        device: where it computes.
        timeout: seconds that it waits for the others before it gives up.
        group: what its collectives go over; None is torch's default group.
        side: a gloo group beside that one, whose collectives never mix with training's.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    timeout: float = TIMEOUT
    group: dist.ProcessGroup | None = None
    side: dist.ProcessGroup | None = None

    @property
    def hardware(self) -> str:
        """The devices that compute: "2 x NVIDIA H100", "1 x AMD EPYC 9B14, 2 threads"."""
        if self.device.type == "cuda":
            return f"{self.size} x {torch.cuda.get_device_name(self.device)}"
        return f"{self.size} x {_cpu()}, {torch.get_num_threads()} threads"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def beside(self) -> World:
        """The same processes over the group beside training's, for use in another thread."""
        assert self.size == 1 or self.side is not None, "several processes have a group beside"
        return dataclasses.replace(self, group=self.side)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes; every process must call it."""
        return self.sum(value) / self.size if self.size > 1 else value

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes; every process must call it."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """The largest of a tensor's values over all processes; every process must call it."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value, how, group=self.group)
        return value

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on the main process, or its error, on every process.

        For files that all processes share: one reads or writes them, and no process waits in
        vain for one that failed. Every process must call it.
        """
        if self.size == 1:
            return action()
        outcome = [_outcome(action) if self.is_main else None]
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        return _results(outcome)[0]

    def on_all(self, action: Callable[[], T]) -> list[T]:
        """What `action` returns on each process, by rank, or the first error, on every process.

        For files that the processes divide among them. Every process must call it.
        """
        if self.size == 1:
            return [action()]
        outcomes: list[T | _Failure | None] = [None] * self.size
        dist.all_gather_object(outcomes, _outcome(action), group=self.group)
        return _results(outcomes)


_Failure = FastflowError | OSError


def _outcome(action: Callable[[], T]) -> T | _Failure:
    try:
        return action()
    except (FastflowError, OSError) as error:
        return error


def _results(outcomes: list[T | _Failure | None]) -> list[T]:
    for outcome in outcomes:
        if isinstance(outcome, _Failure):
            raise outcome
    return cast(list[T], outcomes)


@contextmanager
def world(device: str = "auto", timeout: float = TIMEOUT) -> Iterator[World]:
    """The world torchrun describes in the environment, or one process.

    Args:
        device: "auto" (CUDA when there is one), "cpu", "cuda" or "cuda:1".
        timeout: seconds that a process waits for the others before it gives up.

    Raises:
        ConfigError: the device is not there.
        LostProcessError: (inside, too) another process died or did not answer in time.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    place = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield World(device=place, timeout=timeout)
        return
    here = World(int(os.environ["RANK"]), size, place, timeout)
    limit = datetime.timedelta(seconds=timeout)
    with answered(here, lambda: "meeting the others"):
        store, rank, size = meet(timeout)
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        here = dataclasses.replace(here, side=dist.new_group(backend="gloo", timeout=limit))
    try:
        with answered(here, lambda: "before or after training"):
            yield here
    finally:
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ConfigError(f"device: {name!r} given, accepted: auto, cpu, cuda, cuda:N")
    place = torch.device(name)
    if place.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank if place.index is None else place.index
        if index >= count:
            raise ConfigError(f"device: {name!r} given, but this machine has {count} CUDA devices")
        return torch.device("cuda", index)
    return place


def full_tensor(value: Tensor) -> Tensor:
    """The whole of a sharded tensor (every process must call it); a plain tensor as it is."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    return value


def shard(
    network: Network,
    world: World,
    size: int,
    *,
    recompute: bool = False,
    compile: bool = False,
    narrow: torch.dtype | None = None,
) -> None:
    """Put a network on its device, sharded over `size` processes and replicated over the rest.

    Each unit of `network.shard_units()` is sharded by itself, the rest with the root; `forward`
    and `logvar` of the sharded network gather what they need. With one process the network stays
    a plain module. The weights are those of the main process: each process gets its shard of them,
    one tensor after the other, and never holds the whole.

    Args:
        network: student or companion, changed in place; on the meta device where the process is
            not the main one.
        world: the processes.
        size: processes that share one copy; must divide the number of processes.
        recompute: recompute each unit's activations in the backward pass.
        compile: compile each unit; see `Parallel`.
        narrow: type that `forward` computes in, by autocast, and in which the weights of units are
            gathered; None computes in the type of the weights. Weights, gradients and all of the
            root keep their own type.

    Raises:
        ConfigError: `size` does not divide the number of processes, the network has no units,
            torch.compile does not work on this device, or a tensor of the network cannot be
            restored from its state dict.
    """
    require_divisor(size, world.size)
    prepare(network, world.device, recompute=recompute, compile=compile, narrow=narrow)
    if world.size == 1:
        network.to(world.device)
        return
    _require_restorable(network)
    weights = network.state_dict() if world.is_main else {}
    network.to("meta")
    distribute(network, world.device.type, world.size // size, size, narrow)
    network.to_empty(device=world.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, weights, options=options)


def require_divisor(size: int, processes: int) -> None:
    """Raise ConfigError unless `parallel.shard` divides the processes."""
    if processes % size:
        raise ConfigError(
            f"parallel.shard: {size} given for {processes} processes, accepted: a divisor of "
            f"{processes}"
        )


def prepare(
    network: Network,
    device: torch.device,
    *,
    recompute: bool = False,
    compile: bool = False,
    narrow: torch.dtype | None = None,
) -> None:
    """What `shard` does to a network on any number of processes, before it is sharded.

    Args and errors are those of `shard`.
    """
    units = network.shard_units()
    for key, asked in (("checkpoint", recompute), ("compile", compile)):
        if asked and not units:
            raise ConfigError(
                f"parallel.{key}: true given, accepted for {type(network).__name__}: false, for "
                f"its shard_units() names no blocks"
            )
    if compile:
        _require_compiler(device)
    for unit in units:
        if compile:
            unit.forward = _compiled(unit.forward)
        if recompute:  # outside of compiled code, which would draw other dropout masks again
            unit.forward = functools.partial(torch_checkpoint, unit.forward, use_reentrant=False)
    if narrow is not None:
        network.forward = _narrowed(network.forward, device.type, narrow)  # type: ignore[method-assign]


def distribute(
    network: Network, device: str, replicas: int, size: int, narrow: torch.dtype | None = None
) -> None:
    """Shard a network over `size` processes, the shards replicated `replicas` times, in place.

    Args:
        network: on any device; sharding a real one keeps its weights, which must be equal on all
            processes.
        device: kind of the processes' devices.
        replicas: copies.
        size: processes that share a copy.
        narrow: type in which the weights of units are gathered; their gradients are still summed
            over processes in float32.
    """
    mesh = init_device_mesh(device, (replicas, size), mesh_dim_names=("replicate", "shard"))
    if replicas == 1:  # nothing is to be summed over copies
        mesh = mesh["shard"]
    # Inputs are autocast's business: cast here, times and embeddings would be narrowed too.
    policy = MixedPrecisionPolicy(
        param_dtype=narrow,
        reduce_dtype=None if narrow is None else torch.float32,
        cast_forward_inputs=False,
    )
    for unit in network.shard_units():
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    if network.has_logvar:
        register_fsdp_forward_method(network, "logvar")


def _narrowed(forward: Callable[..., T], device: str, dtype: torch.dtype) -> Callable[..., T]:
    """`forward` under autocast, whoever calls it."""

    def run(*args: Any, **kwargs: Any) -> T:
        with torch.autocast(device, dtype):
            return forward(*args, **kwargs)

    return run


# Dropout must draw what it draws uncompiled: evaluations that share their masks may run either
# way. Units are instances of few classes, whose variants would use up a common limit and make
# each other's fixed shapes symbolic, which the compiler of CPUs fails on.
_COMPILER: dict[str, Any] = {
    "options": {"fallback_random": True},
    "isolate_recompiles": True,
    "dynamic": False,
}


def _compiled(eager: Callable[..., T]) -> Callable[..., T]:
    compiled = torch.compile(eager, **_COMPILER)

    def forward(*args: Tensor) -> T:
        # In forward mode and for what stands in for tensors: compiled code loses the tangents.
        if forward_ad._current_level >= 0 or not all(isinstance(a, Tensor) for a in args):
            return eager(*args)
        # Compiled for CPUs, a transposed argument gives gradients that are off by percents.
        return compiled(*(a.contiguous() for a in args))

    return forward


def _require_compiler(device: torch.device) -> None:
    """Compile a trifle; ConfigError where that fails, for want of a C++ compiler, say."""
    try:
        torch.compile(torch.sin, **_COMPILER)(torch.zeros(2, device=device))
    except Exception as error:  # whatever compilers raise
        raise ConfigError(
            f"parallel.compile: true given, accepted here: false, for torch.compile fails on "
            f"{device.type}: {type(error).__name__}: {one_line(error)}"
        ) from error


def materialise(network: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Give a network that was built on the meta device its weights, in place.

        with torch.device("meta"):
            network = build(description)
        materialise(network, other.state_dict(), device)

    Args:
        network: every tensor of it in its state dict, once.
        weights: its full state dict.
        device: where it goes.

    Raises:
        ConfigError: a tensor of the network is not in its state dict, or there twice.
    """
    _require_restorable(network)
    network.to_empty(device=device)
    network.load_state_dict(weights)


def _require_restorable(network: nn.Module) -> None:
    """Raise ConfigError unless a state dict alone makes a network on the meta device whole."""
    kind, stored, names = type(network).__name__, network.state_dict().keys(), dict[int, str]()
    for name, tensor in itertools.chain(
        network.named_parameters(remove_duplicate=False),
        network.named_buffers(remove_duplicate=False),
    ):
        if name not in stored:
            raise ConfigError(
                f"network: {kind} holds {name!r} outside of its state_dict(), which cannot be "
                f"restored; register it with persistent=True"
            )
        first = names.setdefault(id(tensor), name)
        if first != name:
            raise ConfigError(
                f"network: {kind} holds one tensor as {first!r} and as {name!r}, which would be "
                f"restored as two; keep it in one module and call that twice"
            )


def synchronise(network: nn.Module, now: bool) -> None:
    """Whether the next backward pass of a sharded network exchanges gradients."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(now)


def reshard(network: nn.Module) -> None:
    """Shard the weights of a network again after a forward pass without backward.

    Also of networks inside of it, as in what a method samples with. Depending on torch's version a
    root keeps its weights whole after such a pass; arithmetic on the shards (EMA, targets) would
    then mix plain and sharded tensors.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@functools.cache
def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
