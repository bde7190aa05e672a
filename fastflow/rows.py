"""Which rows of the global batch get a treatment that a share of them is meant for."""

from __future__ import annotations

import abc
import dataclasses
from typing import Literal

import torch
from torch import Tensor

from fastflow.parts import Part
from fastflow.rng import Draws


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowChoice(Part, abc.ABC):
    """A way to choose a share of the rows of the global batch."""

    @abc.abstractmethod
    def __call__(self, draws: Draws, name: str, share: float) -> Tensor:
        """Bool [B]: whether each row of `draws` is chosen, by the numbers kept under `name`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactShare(RowChoice):
    """int(share N) of N rows, chosen at random."""

    def __call__(self, draws: Draws, name: str, share: float) -> Tensor:
        return draws.share(name, share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EachRow(RowChoice):
    """Every row by its own throw: py-meanflow's way."""

    def __call__(self, draws: Draws, name: str, share: float) -> Tensor:
        return draws.uniform(name) < share


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstRows(RowChoice):
    """The rows at the front of the global batch.

    Two choices from one batch then fall on the same rows: in MeanFlow's JAX code and in FastGen
    labels are dropped where r = t first.

    Attributes:
        count: how many: int(share N), "exact" (r = t in the JAX code), or as many as N throws
            give, "binomial" (dropped labels there, and all choices in FastGen).
    """

    count: Literal["exact", "binomial"] = "exact"

    def __call__(self, draws: Draws, name: str, share: float) -> Tensor:
        count = draws.rows_in(share)
        if self.count == "binomial":
            whole = dataclasses.replace(draws.on_cpu(), indices=tuple(range(draws.total)))
            count = int((whole.uniform(name) < share).sum())
        return draws.move(torch.as_tensor(draws.indices, dtype=torch.int64) < count)
