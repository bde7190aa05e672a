"""MeanFlow (Geng et al. 2025, arXiv 2505.13447): the average velocity, learnt from scratch.

u(z_t, r, t) is the mean of the velocity over [r, t], so z_r = z_t - (t - r) u. Differentiating
(t - r) u in t gives the identity that is trained (Algorithm 1):

    z = (1 - t) x0 + t eps,      v = eps - x0
    u, dudt = jvp(u, (z, r, t), (v, 0, 1))
    L = ||u - sg(v - (t - r) dudt)||^2 / sg(||.||^2 + c)^p

With r = t the target is v: ordinary flow matching, in a share of the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from fastflow.data.batch import Batch
from fastflow.errors import ConfigError
from fastflow.guidance import MixedGuidance
from fastflow.method import Companion, FlowMapMethod, Loss, Networks
from fastflow.network import Network
from fastflow.path import VE, Linear, Path, expand, scaled
from fastflow.progress import Progress
from fastflow.regression import AdaptiveL2, Regression
from fastflow.schedules import LinearRamp
from fastflow.tangent import Pairs, TangentEngine, value_and_jvp
from fastflow.teacher import Teacher
from fastflow.times import LogitNormal, PairLaw


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFlow(FlowMapMethod):
    """Regress u on v - (t - r) du/dt, from data alone or along a teacher's velocity.

    Attributes:
        times: law of (t, r): ImageNet's; on CIFAR-10 mean -2, std 2 and a quarter with r = t.
        regression: the loss of u against its target; power 0.75 on CIFAR-10.
        warmup: factor on the derivative, from 0 (flow matching) to 1; the paper has none.
        least_gap: t - r counts as this much at least.
        guidance: guidance built into training; needs classes, and drops labels itself. FastGen
            ignores its scale where it drops none.
        teacher: its velocity replaces v where given.
        engine: how du/dt is taken.
    """

    expects: ClassVar[str] = "velocity"
    two_times: ClassVar[bool] = True

    times: PairLaw = dataclasses.field(
        default_factory=lambda: PairLaw(times=LogitNormal(mean=-0.4, std=1.0), equal=0.75)
    )
    regression: Regression = dataclasses.field(default_factory=AdaptiveL2)
    warmup: LinearRamp = dataclasses.field(default_factory=lambda: LinearRamp(steps=0))
    least_gap: float = 0.0
    guidance: MixedGuidance | None = None
    teacher: Teacher | None = None
    engine: TangentEngine = dataclasses.field(default_factory=Pairs)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least_gap < 0:
            raise ConfigError(f"MeanFlow.least_gap: {self.least_gap} given, accepted: 0 or more")
        if self.guidance is not None and self.teacher is not None:
            raise ConfigError(
                "MeanFlow.guidance: given beside a teacher; give the teacher a guidance instead"
            )

    @property
    def title(self) -> str:
        return super().title if self.engine.exact else f"{super().title}, {self.engine.name}"

    @property
    def path(self) -> Path:
        return Linear()

    def companions(self) -> Mapping[str, Companion]:
        return {} if self.teacher is None else self.teacher.companions()

    def check(self, nets: Networks) -> None:
        if self.teacher is not None:
            self.teacher.check(nets)
        if self.guidance is None:
            return
        if nets.student.cond_dim == 0:
            raise ConfigError(
                "method.guidance: given without classes; leave it out, or train a network of "
                "classes (cond_dim)"
            )
        if nets.student.label_dropout:
            raise ConfigError(
                f"network.model.label_dropout: {nets.student.label_dropout} given, accepted: 0, "
                f"since method.guidance drops labels itself, and with them their guidance"
            )

    def average_velocity(
        self,
        net: Network,
        z: Tensor,
        t: Tensor,
        r: Tensor,
        cond: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """u(z, r, t) [B, ...]."""
        u: Tensor = net(z, t, r, cond=cond, augment=augment)
        return u

    def loss(self, nets: Networks, batch: Batch, now: Progress) -> Loss:
        t, r = self.times(batch.draws)
        eps = batch.draws.normal("eps", batch.x.shape[1:], dtype=batch.x.dtype)
        z = self.path.interpolate(batch.x, eps, t)
        v, cond = self._velocity(nets, batch, z, self.path.velocity(batch.x, eps, t), t)

        def u(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return self.average_velocity(nets.student, z, t, r, cond, batch.augment)

        # Beside (z, t, r); the paper writes u's times the other way round.
        mean, dudt = value_and_jvp(u, (z, t, r), (v, torch.ones_like(t), None), self.engine)
        target = v - scaled((t - r).clamp_min(self.least_gap) * self.warmup(now), dudt)

        metrics = {
            "dudt": dudt.flatten(1).square().mean(1).sqrt().mean(),
            "mse": (mean.detach() - target).square().mean(),
        }
        return Loss(per_sample=self.regression(mean, target), times=t, metrics=metrics)

    def _velocity(
        self, nets: Networks, batch: Batch, z: Tensor, v: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The velocity to follow and the class rows to train with."""
        if self.teacher is not None:
            denoise = self.teacher.denoiser(nets, self.path, batch.cond, batch.augment)
            return self.path.velocity_from_denoised(z, denoise(z, t), t), batch.cond
        if self.guidance is None or batch.cond is None:
            return v, batch.cond

        def own(rows: Tensor) -> Tensor:
            return self.average_velocity(nets.student, z, t, t, rows, batch.augment)

        with _evaluating(nets.student):
            return self.guidance(own, v, t, batch.cond, batch.draws)

    def flow_map(
        self, net: Network, x: Tensor, t: Tensor, s: Tensor, cond: Tensor | None = None
    ) -> Tensor:
        """x - (t - s) u(x, s, t): the jump from t to any s <= t."""
        return x - scaled(t - s, self.average_velocity(net, x, t, s, cond))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFlowEDM(MeanFlow):
    """MeanFlow in EDM's units: x_t = x0 + t eps, v = eps, u = (x - D(x, t, r)) / t (FastGen).

    D is a denoiser of two times with EDM's preconditioning. FastGen has least_gap = 0.002, hence
    a derivative where r = t too.

    Attributes:
        sigma_max: where sampling starts.
    """

    expects: ClassVar[str] = "denoiser"

    sigma_max: float = 80.0

    @property
    def path(self) -> Path:
        return VE(sigma_max=self.sigma_max)

    def average_velocity(
        self,
        net: Network,
        z: Tensor,
        t: Tensor,
        r: Tensor,
        cond: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        denoised: Tensor = net(z, t, r, cond=cond, augment=augment)
        return (z - denoised) / expand(t, z).to(z.dtype)


@contextmanager
def _evaluating(net: Network) -> Iterator[None]:
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)
