"""Randomness by name: what a sample sees depends on (seed, step, index), never on the machine.

Training draws come from `Draws`, keyed by the sample's index in the global batch, so they do not
change with the number of processes, micro-batches or resumes. Generation uses `SampleNoise`, one
generator per sample. `PairedRNG` gives two forward passes the same dropout masks, and
`isolated_rng` keeps anything that samples for a look (grids, evaluation) out of training's stream.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def fold_in(seed: int, *data: int | str) -> int:
    """Mix `data` into `seed`: a hash in [0, 2^63), the same in every process and on every machine.

    Numbers and texts are told apart, and so is where one ends and the next begins:
    `fold_in(0, 1, 2)`, `fold_in(0, 12)` and `fold_in(0, "12")` differ.
    """
    return _finish(_begin(seed, *data))


def _begin(*data: int | str) -> hashlib.blake2b:
    state = hashlib.blake2b(digest_size=8)
    for item in data:
        state.update(_encode(item))
    return state


def _encode(item: int | str) -> bytes:
    if isinstance(item, str):
        text = item.encode()
        return b"s%d:%s" % (len(text), text)
    return b"i%d;" % item


def _finish(state: hashlib.blake2b) -> int:
    return int.from_bytes(state.digest(), "little") >> 1


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Values on the CPU to `device`, without waiting for it."""
    # From pinned memory, or the copy to an accelerator would wait for it.
    if torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Draws:
    """Random numbers of one training step: row i depends on (seed, step, indices[i], name) only.

    Every call with the same name returns the same numbers, so a name is used for one purpose.
    Times and integers are drawn on the CPU and then moved, hence equal on all devices; normal
    noise is drawn on `device`, whose generator decides its bits.

    Attributes:
        seed: the experiment's seed.
        step: optimizer step, from 0.
        indices: position of each row in the global batch; a tuple, or a 1-D integer CPU tensor.
        device: where the results lie.
        total: rows of the global batch; 0 where that is not known.
    """

    seed: int
    step: int
    indices: tuple[int, ...] | Tensor
    device: torch.device | str = "cpu"
    total: int = 0

    @property
    def size(self) -> int:
        """Number of rows B."""
        return len(self.indices)

    def select(self, rows: slice) -> Draws:
        """The draws of some of the rows, as for a micro-batch."""
        return replace(self, indices=self.indices[rows])

    def on_cpu(self) -> Draws:
        """The same draws left on the CPU, where reading them makes nothing wait for a device."""
        return replace(self, device="cpu")

    def move(self, values: Tensor) -> Tensor:
        """Values on the CPU to `device`, without waiting for it."""
        return to_device(values, self.device)

    def normal(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers [B, *shape]."""
        out = torch.empty(self.size, *shape, dtype=dtype, device=self.device)
        return self._fill(name, out, lambda row, generator: row.normal_(generator=generator))

    def uniform(
        self, name: str, shape: Sequence[int] = (), dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Uniform numbers [B, *shape] in the open interval (0, 1), so inverse CDFs are finite."""
        out = torch.empty(self.size, *shape, dtype=dtype)
        self._fill(name, out, lambda row, generator: row.uniform_(generator=generator))
        # The generator returns multiples of eps/2 in [0, 1): only zero lies outside.
        return self.move(out.clamp_(min=torch.finfo(dtype).eps / 4))

    def integers(self, name: str, high: int) -> Tensor:
        """Integers [B] in 0 .. high-1, int64."""
        out = torch.empty(self.size, dtype=torch.int64)
        return self.move(
            self._fill(name, out, lambda row, generator: row.random_(0, high, generator=generator))
        )

    def share(self, name: str, share: float) -> Tensor:
        """Bool [B]: exactly `rows_in(share)` rows of the global batch, chosen at random.

        Raises:
            ValueError: the size of the global batch is not known.
        """
        rows = self.rows_in(share)
        generator = torch.Generator().manual_seed(_finish(_begin(self.seed, self.step, name)))
        place = torch.randperm(self.total, generator=generator)
        indices = torch.as_tensor(self.indices, dtype=torch.int64)
        return self.move(place[indices] < rows)

    def rows_in(self, share: float) -> int:
        """int(share * total), the number of rows that `share` chooses from the global batch.

        Raises:
            ValueError: the size of the global batch is not known.
        """
        if self.total < 1:
            raise ValueError("total: 0 given, the number of rows of the global batch accepted")
        return int(share * self.total)

    def _fill(
        self, name: str, out: Tensor, fill: Callable[[Tensor, torch.Generator], Tensor]
    ) -> Tensor:
        generator = torch.Generator(out.device)
        stem = _begin(self.seed, self.step, name)
        indices = self.indices.tolist() if isinstance(self.indices, Tensor) else self.indices
        for index, row in zip(indices, out.unbind(), strict=True):
            state = stem.copy()
            state.update(_encode(index))
            fill(row, generator.manual_seed(_finish(state)))
        return out


class SampleNoise:
    """One generator per sample, seeded by its seed alone: sample i never depends on its batch.

    Successive calls continue each stream, as a sampler that draws noise at each step needs.

    Args:
        seeds: one seed per sample, B of them.
        device: where the noise is drawn and returned.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]

    @property
    def size(self) -> int:
        """Number of samples B."""
        return len(self._generators)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        """The next standard normal numbers [B, *shape]."""
        out = torch.empty(self.size, *shape, dtype=dtype, device=self.device)
        for row, generator in zip(out.unbind(), self._generators, strict=True):
            row.normal_(generator=generator)
        return out

    def integers(self, high: int) -> Tensor:
        """The next integer of each sample, [B] in 0 .. high-1, int64: random class labels."""
        out = torch.empty(self.size, dtype=torch.int64, device=self.device)
        for row, generator in zip(out.unbind(), self._generators, strict=True):
            row.random_(0, high, generator=generator)
        return out


def _global_generators(device: torch.device | str) -> list[torch.Generator]:
    """The generators that dropout and friends on `device` may read: CPU's and the device's."""
    device = torch.device(device)
    generators = [torch.default_generator]
    if device.type == "cuda":
        current = torch.cuda.current_device()
        index = current if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    return generators


@dataclass(frozen=True, eq=False)
class PairedRNG:
    """The state of the global generators before a first forward pass, to replay in a second.

    With the state shared, dropout draws the same masks in both (consistency training needs it).

        pair = PairedRNG.snapshot(device)
        online = network(x_t, t)
        with pair.replay(), torch.no_grad():
            target = network(x_r, r)

    Afterwards the generators stand where the first pass alone left them.
    """

    generators: tuple[torch.Generator, ...]
    states: tuple[Tensor, ...]

    @classmethod
    def snapshot(cls, device: torch.device | str) -> PairedRNG:
        """Remember the CPU generator and, for a CUDA device, that device's too."""
        generators = tuple(_global_generators(device))
        return cls(generators, tuple(g.get_state() for g in generators))

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """Within: the generators run from the snapshot. After: they are as they were on entry."""
        before = [g.get_state() for g in self.generators]
        try:
            for generator, state in zip(self.generators, self.states, strict=True):
                generator.set_state(state)
            yield
        finally:
            for generator, state in zip(self.generators, before, strict=True):
                generator.set_state(state)


@contextlib.contextmanager
def isolated_rng(seed: int, device: torch.device | str) -> Iterator[None]:
    """Within: the global generators are seeded with `seed`. After: they are as they were."""
    with PairedRNG.snapshot(device).replay():
        for generator in _global_generators(device):
            generator.manual_seed(seed)
        yield


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the global generators (CPU and all CUDA devices) for one step's dropout on one rank."""
    torch.manual_seed(fold_in(seed, "step", step, rank))
