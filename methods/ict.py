"""Improved consistency training (Song & Dhariwal 2023, arXiv 2310.14189), from data alone.

    t_i on a Karras grid of N(k) points, N doubling from 11 to 1281
    i ~ a lognormal law on the grid, mean -1.1, std 2
    L = d( f(x_{t_{i+1}}, t_{i+1}), sg f(x_{t_i}, t_i) ) / (t_{i+1} - t_i)
    d(a, b) = sqrt(||a - b||^2 + c^2) - c,     c = 0.00054 sqrt(dimensions)

The target is the student itself, with the same dropout masks, and f(x, 0.002) = x.
"""

from __future__ import annotations

import dataclasses
import math

from fastflow.consistency import GridPairing, InverseGap, PseudoHuber
from fastflow.consistency_model import ConsistencyModel, consistency_loss, noised
from fastflow.data.batch import Batch
from fastflow.errors import ConfigError
from fastflow.method import Loss, Networks
from fastflow.path import scaled
from fastflow.progress import Progress
from fastflow.times import IndexLaw, LogNormalIndex


@dataclasses.dataclass(frozen=True, kw_only=True)
class ICT(ConsistencyModel):
    """Consistency training with a growing number of steps; reads the curriculum value N.

    Attributes:
        index: law of the interval on the current grid.
        huber: c of the distance over the square root of the number of dimensions.
        sigma_min: first time of the grid, where f(x, sigma_min) = x.
        rho: curvature of the grid.
    """

    index: IndexLaw = dataclasses.field(default_factory=lambda: LogNormalIndex(mean=-1.1, std=2.0))
    huber: float = 0.00054
    sigma_min: float = 0.002
    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.huber < 0:
            raise ConfigError(f"ICT.huber: {self.huber} given, accepted: 0 or more, e.g. 0.00054")
        _ = self.pairs  # raises on an impossible grid

    @property
    def s_min(self) -> float:
        return self.sigma_min

    @property
    def needs(self) -> frozenset[str]:
        return self.pairs.needs

    @property
    def pairs(self) -> GridPairing:
        """The law of neighbouring times."""
        return GridPairing(
            index=self.index, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho
        )

    def loss(self, nets: Networks, batch: Batch, now: Progress) -> Loss:
        pair = self.pairs(batch.draws, now)
        x_t, eps = noised(batch, pair.t)
        x_r = batch.x + scaled(pair.r, eps)
        f = self.f(nets.student, batch.cond, batch.augment)
        distance = PseudoHuber(c=self.huber * math.sqrt(batch.x[0].numel()))
        return consistency_loss(f, f, x_t, x_r, pair, distance, InverseGap())
