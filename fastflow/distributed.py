"""Processes, devices and sharding: one path for one process and for many."""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as torch_checkpoint

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


def shard(network: Network, world: World, size: int, recompute: bool) -> None:
    """Shard a network over `size` processes and replicate the shards over the rest, in place.

    Each unit of `network.shard_units()` is sharded by itself, the rest with the root. With one
    process the network stays a plain module.

    Args:
        network: student or companion; its weights must be equal on all processes.
        world: the processes.
        size: processes that share one copy; must divide the number of processes.
        recompute: recompute each unit's activations in the backward pass.

    Raises:
        ConfigError: `size` does not divide the number of processes.
    """
    if world.size % size:
        raise ConfigError(
            f"parallel.shard: {size} given for {world.size} processes, accepted: a divisor of "
            f"{world.size}"
        )
    if recompute:
        for unit in network.shard_units():
            _recompute(unit)
    if world.size == 1:
        return
    mesh = init_device_mesh(
        world.device.type, (world.size // size, size), mesh_dim_names=("replicate", "shard")
    )
    for unit in network.shard_units():
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def _recompute(unit: nn.Module) -> None:
    forward = unit.forward
    unit.forward = functools.partial(torch_checkpoint, forward, use_reentrant=False)


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
