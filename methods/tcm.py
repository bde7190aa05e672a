"""Truncated consistency models, TCM (Lee et al. 2024, arXiv 2410.14895): the second stage.

A consistency model f1 of an earlier stage is kept below the time t', where it denoises well
already, so that the student f spends its capacity on t >= t':

    ln t ~ a heavy-tailed law on [ln t', ln t_max],   r = r(t, ratio)
    in boundary rows t = t' (a share rho of the batch), so that r < t'
    target = sg f(x_r, r) where r >= t',   f1(x_r, r) below
    L = mean over other rows of w d(f(x_t, t), target) + w_b times that over boundary rows

Without boundary rows a constant f would have no loss. The curriculum goes on from stage 1.

Rows whose target is f and those whose target is f1 pass through the networks apart, so that each
row costs one target. Target and student see the same dropout masks in both groups, also where f1
is the target, as long as it has the student's architecture.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastflow.consistency import Distance, InverseGap, PseudoHuber, RatioPairing, TimePair, Weight
from fastflow.consistency_model import ConsistencyModel, distance_apart, noised, weighted
from fastflow.data.batch import Batch
from fastflow.errors import ConfigError
from fastflow.method import Companion, Frozen, Loss, Networks
from fastflow.network import Network
from fastflow.path import expand, scaled
from fastflow.progress import Progress
from fastflow.schedules import Gap, SigmoidRatio
from fastflow.times import TimeLaw, TruncatedLogStudentT


class Truncated(Network):
    """D(x, t) of one denoiser where t >= transition, and of another below, for sampling.

    Only the network that the times of a batch ask for is called.
    """

    def __init__(self, above: Network, below: Network, transition: float) -> None:
        super().__init__()
        self.above, self.below, self.transition = above, below, transition
        self.sample_shape, self.cond_dim = above.sample_shape, above.cond_dim
        self.augment_dim, self.sigma_data = above.augment_dim, above.sigma_data

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        cond: Tensor | None = None,
        augment: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The denoised state; see `Network.forward`."""
        args, above = (x, t, s, cond, augment, guidance), t >= self.transition
        if bool(above.all()):
            out: Tensor = self.above(*args)
        elif not bool(above.any()):
            out = self.below(*args)
        else:
            out = torch.where(expand(above, x), self.above(*args), self.below(*args))
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class TCM(ConsistencyModel):
    """The second stage; reads the curriculum value ratio.

    Attributes:
        stage1: the consistency model of the first stage, f1; the student starts from it as well
            (`init_from`). Its dropout is active, with the student's masks.
        transition: t'.
        times: law of t, from t' up.
        gap: r(t) at a ratio.
        distance: c = 1e-8 on CIFAR-10, 0.06 on ImageNet-64.
        weight: 1/(t - r) on CIFAR-10, `InverseCout` on ImageNet-64.
        boundary_share: rho; int(rho B) rows of the global batch are boundary rows.
        boundary_weight: w_b.
    """

    stage1: Frozen
    transition: float = 1.0
    times: TimeLaw = dataclasses.field(default_factory=TruncatedLogStudentT)
    gap: Gap = dataclasses.field(default_factory=lambda: SigmoidRatio(k=8.0, b=1.0, r_min=1e-6))
    distance: Distance = dataclasses.field(default_factory=lambda: PseudoHuber(c=1e-8))
    weight: Weight = dataclasses.field(default_factory=InverseGap)
    boundary_share: float = 0.25
    boundary_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.transition < self.sigma_max:
            raise ConfigError(
                f"TCM.transition: {self.transition} given, accepted: above 0 and below sigma_max "
                f"({self.sigma_max})"
            )
        if not 0 <= self.boundary_share < 1 or self.boundary_weight < 0:
            raise ConfigError(
                f"TCM: boundary_share={self.boundary_share}, boundary_weight="
                f"{self.boundary_weight} given, accepted: 0 <= boundary_share < 1 and 0 or more"
            )

        least = self.times.quantile(torch.tensor([1e-16], dtype=torch.float64))
        if float(least) < self.transition:
            raise ConfigError(
                f"TCM.times: a law of t from {float(least):g} up given, accepted: from the "
                f"transition {self.transition} up, e.g. TruncatedLogStudentT(t_min=...)"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ratio"})

    def companions(self) -> Mapping[str, Companion]:
        return {"stage1": dataclasses.replace(self.stage1, dropout=True)}

    def check(self, nets: Networks) -> None:
        super().check(nets)
        student, stage1 = nets.student, nets["stage1"]
        for name in ("predicts", "sigma_data", "cond_dim", "augment_dim", "two_times"):
            wanted, given = getattr(student, name), getattr(stage1, name)
            if given != wanted:
                raise ConfigError(
                    f"stage1: {name} {given!r} given, accepted: {wanted!r}, that of the student"
                )

    def loss(self, nets: Networks, batch: Batch, now: Progress) -> Loss:
        draws, host = batch.draws, batch.draws.on_cpu()
        boundary = host.share("boundary", self.boundary_share)
        # masked_fill, for torch.where would round the number to float32.
        t = self.times(host).masked_fill(boundary, self.transition + 1e-8)
        t, r = RatioPairing(times=self.times, gap=self.gap).at(t, now)
        pair = TimePair(t=draws.move(t), r=draws.move(r))
        x_t, eps = noised(batch, pair.t)
        x_r = batch.x + scaled(pair.r, eps)
        below: list[bool] = (r < self.transition).tolist()
        loss = weighted(self._apart(nets, batch, x_t, x_r, pair, below), pair, self.weight)

        count = draws.rows_in(self.boundary_share)
        inner, edge = 1 / (draws.total - count), self.boundary_weight / max(count, 1)
        share = draws.total * draws.move(torch.full_like(t, inner).masked_fill(boundary, edge))
        return dataclasses.replace(
            loss, per_sample=loss.per_sample * share.to(loss.per_sample.dtype)
        )

    def _apart(
        self,
        nets: Networks,
        batch: Batch,
        x_t: Tensor,
        x_r: Tensor,
        pair: TimePair,
        below: Sequence[bool],
    ) -> Tensor:
        """The distances [B] to the target of each row: f1 in the rows `below`, else f."""
        every = range(batch.size)
        # A sharded network must be called on every process: without a row, row 0 goes through.
        kept = [i for i in every if not below[i]] or [0]
        frozen = [i for i in every if below[i]] or [0]
        parts = []
        for net, indices in ((nets.student, kept), (nets["stage1"], frozen)):
            rows = batch.draws.move(torch.tensor(indices))
            cond, augment = (None if v is None else v[rows] for v in (batch.cond, batch.augment))
            f, target = (self.f(n, cond, augment) for n in (nets.student, net))
            times = TimePair(t=pair.t[rows], r=pair.r[rows])
            parts.append(distance_apart(f, target, x_t[rows], x_r[rows], times, self.distance))
        first, second = itertools.count(), itertools.count(len(kept))
        place = torch.tensor([next(second) if b else next(first) for b in below])
        return torch.cat(parts)[batch.draws.move(place)]

    @property
    def sampling_companions(self) -> frozenset[str]:
        return frozenset({"stage1"})

    def for_sampling(self, nets: Networks) -> Network:
        """f1 below t', the student from there up."""
        return Truncated(nets.student, nets["stage1"], self.transition)
