"""Processes, devices and sharding: one path for one process and for many."""

from __future__ import annotations

import dataclasses
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from fastflow.annotations import one_line
from fastflow.errors import ConfigError, FastflowError
from fastflow.network import Network

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class World:
    """Where this process stands: its rank, the number of processes, its device."""

    rank: int = 0
    size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @property
    def hardware(self) -> str:
        """The devices that compute: "2 x NVIDIA H100", "1 x AMD EPYC 9B14, 2 threads"."""
        if self.device.type == "cuda":
            return f"{self.size} x {torch.cuda.get_device_name(self.device)}"
        return f"{self.size} x {_cpu()}, {torch.get_num_threads()} threads"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes; every process must call it."""
        return self.sum(value) / self.size if self.size > 1 else value

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes; every process must call it."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on the main process, or its error, on every process.

        For files that all processes share: one reads or writes them, and no process waits in
        vain for one that failed. Every process must call it.
        """
        if self.size == 1:
            return action()
        outcome: list[T | FastflowError | OSError | None] = [None]
        if self.is_main:
            try:
                outcome = [action()]
            except (FastflowError, OSError) as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], FastflowError | OSError):
            raise outcome[0]
        return cast(T, outcome[0])


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """The world torchrun describes in the environment, or one process.

    Args:
        device: "auto" (CUDA when there is one), "cpu", "cuda" or "cuda:1".

    Raises:
        ConfigError: the device is not there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    place = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield World(device=place)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    try:
        yield World(rank=dist.get_rank(), size=size, device=place)
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
    network: Network, world: World, size: int, *, recompute: bool = False, compile: bool = False
) -> None:
    """Shard a network over `size` processes and replicate the shards over the rest, in place.

    Each unit of `network.shard_units()` is sharded by itself, the rest with the root; `forward`
    and `logvar` of the sharded network gather what they need. With one process the network stays
    a plain module.

    Args:
        network: student or companion, on the world's device; its weights must be equal on all
            processes.
        world: the processes.
        size: processes that share one copy; must divide the number of processes.
        recompute: recompute each unit's activations in the backward pass.
        compile: compile each unit; see `Parallel`.

    Raises:
        ConfigError: `size` does not divide the number of processes, the network has no units, or
            torch.compile does not work on this device.
    """
    if world.size % size:
        raise ConfigError(
            f"parallel.shard: {size} given for {world.size} processes, accepted: a divisor of "
            f"{world.size}"
        )
    units = network.shard_units()
    for key, asked in (("checkpoint", recompute), ("compile", compile)):
        if asked and not units:
            raise ConfigError(
                f"parallel.{key}: true given, accepted for {type(network).__name__}: false, for "
                f"its shard_units() names no blocks"
            )
    if compile:
        _require_compiler(world.device)
    for unit in units:
        if compile:
            unit.forward = _compiled(unit.forward)
        if recompute:  # outside of compiled code, which would draw other dropout masks again
            unit.forward = functools.partial(torch_checkpoint, unit.forward, use_reentrant=False)
    if world.size == 1:
        return
    distribute(network, world.device.type, world.size // size, size)


def distribute(network: Network, device: str, replicas: int, size: int) -> None:
    """Shard a network over `size` processes, the shards replicated `replicas` times, in place."""
    mesh = init_device_mesh(device, (replicas, size), mesh_dim_names=("replicate", "shard"))
    for unit in network.shard_units():
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    if network.has_logvar:
        register_fsdp_forward_method(network, "logvar")


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
        network: without any tensor outside of its state dict.
        weights: its full state dict.
        device: where it goes.

    Raises:
        ConfigError: a tensor of the network is not in its state dict.
    """
    tensors = itertools.chain(network.named_parameters(), network.named_buffers())
    outside = sorted({name for name, _ in tensors} - network.state_dict().keys())
    if outside:
        raise ConfigError(
            f"network: {type(network).__name__} holds {outside[0]!r} outside of its state_dict(), "
            f"which cannot be restored; register it with persistent=True"
        )
    network.to_empty(device=device)
    network.load_state_dict(weights)


def synchronise(network: nn.Module, now: bool) -> None:
    """Whether the next backward pass of a sharded network exchanges gradients."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(now)


def reshard(network: nn.Module) -> None:
    """Shard a network's weights again after a forward pass without backward.

    The root keeps its weights whole after such a pass; arithmetic on the shards (EMA, targets)
    would then mix plain and sharded tensors.
    """
    if isinstance(network, FSDPModule):
        network.reshard()


@functools.cache
def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
