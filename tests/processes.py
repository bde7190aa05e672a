"""Processes that live through many tests, and what they tell each other in a task.

Starting them costs seconds, a task in them does not.
"""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastflow.distributed import World

T = TypeVar("T")

_PATIENCE = 240.0  # seconds


class Processes:
    """A gloo group of `size` processes on this machine, started by the first task.

    After a task that failed in one of them they are started afresh, for the others may wait.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._running: list[tuple[Any, Connection]] = []

    def run(self, task: Callable[..., T], *args: Any, **options: Any) -> list[T]:
        """What `task(world, *args, **options)` returns in each process, by rank.

        Args:
            task: a function of a module.
            args, options: can be pickled, like the result.

        Raises:
            AssertionError: it raised somewhere, or took too long.
        """
        if not self._running:
            self._start()
        for _, pipe in self._running:
            pipe.send_bytes(pickle.dumps((task, args, options)))
        until, answers = time.monotonic() + _PATIENCE, []
        for rank, (_, pipe) in enumerate(self._running):
            if not pipe.poll(max(until - time.monotonic(), 0)):
                self.close()
                raise AssertionError(f"{task.__name__} hangs in process {rank}")
            fine, answer = pickle.loads(pipe.recv_bytes())
            if not fine:
                self.close()
                raise AssertionError(f"{task.__name__} in process {rank}:\n{answer}")
            answers.append(answer)
        return answers

    def close(self) -> None:
        """End the processes, in the middle of whatever they do."""
        for process, pipe in self._running:
            pipe.close()
            process.terminate()
            process.join()
        self._running = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        meeting = str(Path(tempfile.mkdtemp()) / "store")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, self.size, meeting, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._running.append((process, ours))


def _work(rank: int, size: int, meeting: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(meeting, size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    world = World(rank=rank, size=size, side=dist.new_group(backend="gloo"))
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:  # the tests are over
            return
        try:
            task, args, options = pickle.loads(message)
            answer = (True, task(world, *args, **options))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


class Collectives(TorchDispatchMode):
    """Notes (name, type of the largest tensor) of every collective while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            largest = max(tensors, key=Tensor.numel)
            self.seen.append((func._schema.name.partition("::")[2].strip("_"), largest.dtype))
        return func(*args, **(kwargs or {}))

    def named(self, part: str) -> list[torch.dtype]:
        """The types of the collectives whose name contains `part`."""
        return [dtype for name, dtype in self.seen if part in name]


class Memory(TorchDispatchMode):
    """Counts the bytes of tensors made while it is entered.

    Attributes:
        made: of all of them.
        peak: of those that are there at once, at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made = self.peak = 0
        self._held: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            tensor = leaf.to_local() if isinstance(leaf, DTensor) else leaf
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if (ref := StorageWeakRef(storage)) not in self._held:
                    self._held[ref] = storage.nbytes()
                    self.made += storage.nbytes()
        self._held = {ref: size for ref, size in self._held.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._held.values()))
        return out
