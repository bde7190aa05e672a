"""Easy consistency tuning and distillation (Geng et al. 2024, arXiv 2406.14548).

    ln t ~ N(-1.1, 2^2),   r = max(0, t (1 - n(t) (1 - ratio))),   n(t) = 1 + k sigmoid(-b t)
    x_t = x0 + t eps,      x_r = x0 + r eps  (ECT)   or one ODE step of a teacher (ECD)
    L = d( f(x_t, t), sg f(x_r, r) ) / (t - r)

f is EDM's denoiser itself, f(x, 0) = x, so a diffusion model is where tuning starts: at ratio 0,
r = 0 and the loss is that of denoising. A driver raises the ratio towards 1 in stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from fastflow.consistency import (
    Distance,
    Euler,
    InverseGap,
    PseudoHuber,
    RatioPairing,
    TeacherStep,
    Weight,
)
from fastflow.consistency_model import ConsistencyModel, consistency_loss, earlier_point, noised
from fastflow.data.batch import Batch
from fastflow.errors import ConfigError
from fastflow.method import Companion, Loss, Networks
from fastflow.network import Network
from fastflow.precond import consistency_from_denoiser
from fastflow.progress import Progress
from fastflow.schedules import Gap, SigmoidRatio
from fastflow.teacher import Teacher
from fastflow.times import LogNormal, TimeLaw


@dataclasses.dataclass(frozen=True, kw_only=True)
class ECT(ConsistencyModel):
    """Consistency tuning, and distillation (ECD) when a teacher is given; reads the ratio.

    Attributes:
        times: law of t; not clamped, as in the official code.
        gap: r(t) at a ratio.
        distance: the Euclidean norm on CIFAR-10; c = 0.06 on ImageNet-64.
        weight: 1/(t - r) on CIFAR-10; `InverseCout` on ImageNet-64.
        teacher: distil this model; None tunes on data alone.
        step: the teacher's ODE step from t to r.
        shift: in sampling alone, f lands at this time; the official code has 0.003 (its
            `sigma_min`), for a network that was trained to land at 0.
    """

    times: TimeLaw = dataclasses.field(default_factory=lambda: LogNormal(mean=-1.1, std=2.0))
    gap: Gap = dataclasses.field(default_factory=lambda: SigmoidRatio(k=8.0, b=1.0))
    distance: Distance = dataclasses.field(default_factory=lambda: PseudoHuber(c=0.0))
    weight: Weight = dataclasses.field(default_factory=InverseGap)
    teacher: Teacher | None = None
    step: TeacherStep = dataclasses.field(default_factory=Euler)
    shift: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.shift < self.sigma_max:
            raise ConfigError(
                f"ECT.shift: {self.shift} given, accepted: from 0 to below sigma_max "
                f"({self.sigma_max}), e.g. 0.003"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ratio"})

    def companions(self) -> Mapping[str, Companion]:
        return {} if self.teacher is None else self.teacher.companions()

    def check(self, nets: Networks) -> None:
        super().check(nets)
        if self.teacher is not None:
            self.teacher.check(nets)

    def loss(self, nets: Networks, batch: Batch, now: Progress) -> Loss:
        pair = RatioPairing(times=self.times, gap=self.gap)(batch.draws, now)
        x_t, eps = noised(batch, pair.t)
        x_r = earlier_point(nets, batch, eps, x_t, pair, self.teacher, self.step)
        f = self.f(nets.student, batch.cond, batch.augment)
        return consistency_loss(f, f, x_t, x_r, pair, self.distance, self.weight)

    def flow_map(
        self, net: Network, x: Tensor, t: Tensor, s: Tensor, cond: Tensor | None = None
    ) -> Tensor:
        """f(x, t), the denoiser itself unless `shift` says otherwise, for times from there up."""
        denoised = super().flow_map(net, x, t, s, cond)
        return consistency_from_denoiser(x, denoised, t, self.shift, self.sigma_data)
