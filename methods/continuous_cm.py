"""Consistency models in continuous time (Song et al. 2023, arXiv 2303.01469, appendix B).

The limit of CM's loss where the two times of a pair meet (theorems 5 and 6, squared L2 distance):

    t      ~ uniform in t^(1/rho)
    x_t    = x0 + t eps
    dx/dt  = eps   (CT)   or the velocity (x_t - D(x_t, t)) / t of a teacher   (CD)
    df/dk  = dt/dk (df/dx dx/dt + df/dt),      k = t, ln t or t^(1/rho)
    L      = w(t) / d  <f(x_t, t), sg df/dk>

Only the gradient of L means something: it is 0 where f does not change along the path, whatever L
is; watch the metric `tangent`, the root mean square of df/dk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fastflow.consistency import Uniform, Weight
from fastflow.consistency_model import ConsistencyModel, noised
from fastflow.data.batch import Batch
from fastflow.errors import ConfigError
from fastflow.method import Companion, Loss, Networks
from fastflow.path import scaled
from fastflow.progress import Progress
from fastflow.tangent import Pairs, TangentEngine, value_and_jvp
from fastflow.teacher import Teacher
from fastflow.times import TimeLaw, UniformPower


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuousCM(ConsistencyModel):
    """Consistency training without a grid, and distillation when a teacher is given.

    Start from a trained denoiser: from scratch the tangent is large and training unstable, which
    sCM repairs.

    Attributes:
        times: law of t.
        coordinate: k, the clock in which the change of f is measured.
        rho: of t^(1/rho).
        weight: w(t); its second time is 0.
        teacher: distil this model (CD); None trains from data alone (CT).
        boundary: the time s_min where f(x, s_min) = x.
        engine: how df/dt is taken.
    """

    times: TimeLaw = dataclasses.field(default_factory=UniformPower)
    coordinate: Literal["t", "log", "rho"] = "rho"
    rho: float = 7.0
    weight: Weight = dataclasses.field(default_factory=Uniform)
    teacher: Teacher | None = None
    boundary: float = 0.002
    engine: TangentEngine = dataclasses.field(default_factory=Pairs)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rho > 0:
            raise ConfigError(f"ContinuousCM.rho: {self.rho} given, accepted: above 0, e.g. 7.0")
        if not 0 <= self.boundary < self.sigma_max:
            raise ConfigError(
                f"ContinuousCM.boundary: {self.boundary} given, accepted: from 0 to below "
                f"sigma_max ({self.sigma_max})"
            )

    @property
    def title(self) -> str:
        return super().title if self.engine.exact else f"{super().title}, {self.engine.name}"

    @property
    def s_min(self) -> float:
        return self.boundary

    def companions(self) -> Mapping[str, Companion]:
        return {} if self.teacher is None else self.teacher.companions()

    def check(self, nets: Networks) -> None:
        super().check(nets)
        if self.teacher is not None:
            self.teacher.check(nets)

    def loss(self, nets: Networks, batch: Batch, now: Progress) -> Loss:
        t = self.times(batch.draws)
        x_t, dxdt = noised(batch, t)
        if self.teacher is not None:
            denoise = self.teacher.denoiser(nets, self.path, batch.cond, batch.augment)
            dxdt = self.path.velocity_from_denoised(x_t, denoise(x_t, t), t)

        f = self.f(nets.student, batch.cond, batch.augment)
        rate = self.rate(t)
        value, change = value_and_jvp(f, (x_t, t), (scaled(rate, dxdt), rate), self.engine)

        wide = torch.promote_types(value.dtype, torch.float32)
        loss = (value.to(wide) * change.to(wide)).flatten(1).mean(1)
        return Loss(
            per_sample=self.weight(t, torch.zeros_like(t)).to(wide) * loss,
            times=t,
            metrics={"tangent": change.to(wide).square().mean().sqrt()},
        )

    def rate(self, t: Tensor) -> Tensor:
        """dt/dk of times [B]."""
        if self.coordinate == "t":
            return torch.ones_like(t)
        if self.coordinate == "log":
            return t
        return self.rho * t ** (1 - 1 / self.rho)
