"""What a method is handed at each step: data, conditions and their random numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor

from fastflow.rng import Draws


@dataclasses.dataclass(frozen=True)
class Batch:
    """Training samples with their conditions and their own random numbers.

    Attributes:
        x: clean samples [B, *sample_shape], float32; images lie in [-1, 1].
        cond: class rows [B, cond_dim] (one-hot, zero row = unconditional), or None.
        augment: augmentation labels [B, augment_dim], or None.
        draws: random numbers whose row i depends on the seed, the step and the sample's index in
            the global batch alone, never on how the batch is divided.
    """

    x: Tensor
    cond: Tensor | None
    augment: Tensor | None
    draws: Draws

    @property
    def size(self) -> int:
        return self.x.shape[0]

    def split(self, size: int) -> Iterator[Batch]:
        """Micro-batches of at most `size` samples, in order."""
        for start in range(0, self.size, size):
            rows = slice(start, min(start + size, self.size))
            yield Batch(
                x=self.x[rows],
                cond=None if self.cond is None else self.cond[rows],
                augment=None if self.augment is None else self.augment[rows],
                draws=self.draws.select(rows),
            )
