"""Consistency models (Song et al. 2023, arXiv 2303.01469): training (CT) and distillation (CD).

    t, r ~ pairs,  r < t                     neighbouring times
    x_t = x0 + t eps
    x_r = x0 + r eps                  (CT)   or one ODE step of a teacher from x_t (CD)
    L   = w(t, r) d( f(x_t, t), sg f-(x_r, r) )

f keeps f(x, s_min) = x by construction. The pairs follow a curriculum that a driver writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from fastflow.consistency import (
    Distance,
    Heun,
    Pairing,
    SquaredL2,
    TeacherStep,
    Uniform,
    Weight,
)
from fastflow.consistency_model import ConsistencyModel, consistency_loss, earlier_point, noised
from fastflow.data.batch import Batch
from fastflow.errors import ConfigError
from fastflow.method import Companion, Loss, Networks, Target
from fastflow.progress import Progress
from fastflow.schedules import Decay
from fastflow.teacher import Teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class CM(ConsistencyModel):
    """Consistency training, and distillation when a teacher is given.

    Attributes:
        pairs: the law of (t, r): `GridPairing` with N(k) points as in the paper, or
            `RatioPairing` with r(t) as in ECT (arXiv 2406.14548).
        distance: d(online, target) of a sample.
        weight: w(t, r).
        target: decay law mu(k) of an EMA target network; None takes the student itself with
            stop-gradient (mu = 0).
        teacher: distil this model (CD); None trains from data alone (CT).
        step: the teacher's ODE step from t to r.
        boundary: the time s_min where f(x, s_min) = x: 0.002 in the CM paper and iCT, 0 in ECT.
    """

    pairs: Pairing
    distance: Distance = dataclasses.field(default_factory=SquaredL2)
    weight: Weight = dataclasses.field(default_factory=Uniform)
    target: Decay | None = None
    teacher: Teacher | None = None
    step: TeacherStep = dataclasses.field(default_factory=Heun)
    boundary: float = 0.002

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.boundary < self.sigma_max:
            raise ConfigError(
                f"CM.boundary: {self.boundary} given, accepted: from 0 to below sigma_max "
                f"({self.sigma_max})"
            )

    @property
    def s_min(self) -> float:
        return self.boundary

    @property
    def needs(self) -> frozenset[str]:
        return self.pairs.needs | (self.target.needs if self.target else frozenset())

    def companions(self) -> Mapping[str, Companion]:
        extra: dict[str, Companion] = {} if self.teacher is None else self.teacher.companions()
        if self.target is not None:
            extra["target"] = Target(decay=self.target)
        return extra

    def check(self, nets: Networks) -> None:
        super().check(nets)
        if self.teacher is not None:
            self.teacher.check(nets)

    def loss(self, nets: Networks, batch: Batch, now: Progress) -> Loss:
        pair = self.pairs(batch.draws, now)
        x_t, eps = noised(batch, pair.t)
        x_r = earlier_point(nets, batch, eps, x_t, pair, self.teacher, self.step)
        behind = nets.student if self.target is None else nets["target"]
        online = self.f(nets.student, batch.cond, batch.augment)
        target = self.f(behind, batch.cond, batch.augment)
        return consistency_loss(online, target, x_t, x_r, pair, self.distance, self.weight)
