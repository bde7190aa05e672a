"""Counters of what torch does while they are entered: bytes held, bytes sent.

They see every operation, on real tensors and on fake ones, whose storages have sizes and no memory.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_Resize = Callable[[torch.UntypedStorage, int], object]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor; a plain tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def nbytes(tensors: object) -> int:
    """Bytes that tensors anywhere in a pytree hold in this process; what they share counts once."""
    storages = {}
    for tensor in tree_iter(tensors):
        if isinstance(tensor, Tensor):
            storage = local(tensor).untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


class Allocations(TorchDispatchMode):
    """Bytes in tensors made since this was entered for the first time.

    What an operator uses inside of itself is not seen, nor what an allocator keeps for later.

    Attributes:
        now: held at this moment.
        peak: most held since the start, or since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[weakref.ref[torch.UntypedStorage], int] = {}
        self._resize: _Resize | None = None

    def restart(self) -> int:
        """Let the peak start from what is held at this moment, which is returned."""
        self.peak = self.now
        return self.now

    def __enter__(self) -> Allocations:
        # Sharding frees and takes back gathered weights by resizing them, which no mode sees.
        resize = cast(_Resize, torch.UntypedStorage.resize_)

        def counted(storage: torch.UntypedStorage, size: int) -> object:
            out = resize(storage, size)
            if weakref.ref(storage) in self._sizes:
                self._note(storage)
            return out

        torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign, assignment]
        self._resize = resize
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign, assignment]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if DTensor in types:  # it calls the same on its local tensors
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
            elif isinstance(value, list):
                for tensor in value:
                    self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        reference = weakref.ref(storage, self._forget)
        size = storage.nbytes()
        self.now += size - self._sizes.get(reference, 0)
        self._sizes[reference] = size
        self.peak = max(self.peak, self.now)

    def _forget(self, reference: weakref.ref[torch.UntypedStorage]) -> None:
        self.now -= self._sizes.pop(reference, 0)


class Traffic(TorchDispatchMode):
    """Bytes that this process sends in collectives, by kind, as ring algorithms send them.

    With n processes and a whole of S bytes, a gather or a reduce-scatter sends S (n - 1) / n and a
    sum twice that, whatever the algorithm a library takes; groups of one send nothing.

    Attributes:
        sent: bytes by "gather", "scatter" (reduce-scatter) and "sum" (all-reduce).
        calls: their number, groups of one left out.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: collections.Counter[str] = collections.Counter()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if DTensor in types:
            return NotImplemented
        if func.namespace == "c10d":
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        if name == "_allgather_base_":
            whole, part = args[:2]
            self._add("gather", whole.nbytes, whole.numel() // part.numel())
        elif name == "_reduce_scatter_base_":
            part, whole = args[:2]
            self._add("scatter", whole.nbytes, whole.numel() // part.numel())
        elif name == "allreduce_":
            group = dist.ProcessGroup.unbox(args[1])
            self._add("sum", 2 * sum(t.nbytes for t in args[0]), group.size())

    def _add(self, kind: str, size: int, processes: int) -> None:
        if processes > 1:
            self.sent[kind] += size * (processes - 1) // processes
            self.calls[kind] += 1
