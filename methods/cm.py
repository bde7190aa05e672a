"""Consistency models (Song et al. 2023, arXiv 2303.01469): training (CT) and distillation (CD).

    t, r ~ pairs,  r < t                     neighbouring times
    x_t = x0 + t eps
    x_r = x0 + r eps                  (CT)   or one ODE step of a teacher from x_t (CD)
    L   = w(t, r) d( f(x_t, t), sg f-(x_r, r) )

f keeps f(x, s_min) = x by construction. The pairs follow a curriculum that a driver writes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fastflow.consistency import (
    Distance,
    Heun,
    Pairing,
    SquaredL2,
    TeacherStep,
    Uniform,
    Weight,
)
from fastflow.data.batch import Batch
from fastflow.errors import ConfigError
from fastflow.method import Companion, FlowMapMethod, Frozen, Loss, Networks, Target
from fastflow.network import Network
from fastflow.parts import Part
from fastflow.path import VE, scaled
from fastflow.precond import EDMDenoiser, consistency_from_denoiser
from fastflow.progress import Progress
from fastflow.rng import PairedRNG
from fastflow.sampling import guided
from fastflow.schedules import Decay


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher(Part):
    """What consistency distillation distils.

    Attributes:
        source: the diffusion model, an EDM denoiser.
        step: the ODE solver's step from t to r.
        guidance: w of D_u + w (D_c - D_u); 1 means none. The unconditional row is all zeros.
    """

    source: Frozen
    step: TeacherStep = dataclasses.field(default_factory=Heun)
    guidance: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CM(FlowMapMethod):
    """Consistency training, and distillation when a teacher is given.

    Attributes:
        pairs: the law of (t, r): `GridPairing` with N(k) points as in the paper, or
            `RatioPairing` with r(t) as in ECT (arXiv 2406.14548).
        distance: d(online, target) of a sample.
        weight: w(t, r).
        target: decay law mu(k) of an EMA target network; None takes the student itself with
            stop-gradient (mu = 0).
        teacher: distil this model (CD); None trains from data alone (CT).
        boundary: the time s_min where f(x, s_min) = x: 0.002 in the CM paper and iCT, 0 in ECT.
        sigma_data, sigma_max: of the EDM preconditioning and of the noise.
    """

    expects: ClassVar[str] = "denoiser"

    pairs: Pairing
    distance: Distance = dataclasses.field(default_factory=SquaredL2)
    weight: Weight = dataclasses.field(default_factory=Uniform)
    target: Decay | None = None
    teacher: Teacher | None = None
    boundary: float = 0.002
    sigma_data: float = 0.5
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma_max < math.inf:
            raise ConfigError(
                f"CM.sigma_max: {self.sigma_max} given, accepted: a finite number above 0"
            )
        if not 0 < self.sigma_data < math.inf:
            raise ConfigError(
                f"CM.sigma_data: {self.sigma_data} given, accepted: a finite number above 0"
            )
        if not 0 <= self.boundary < self.sigma_max:
            raise ConfigError(
                f"CM.boundary: {self.boundary} given, accepted: from 0 to below sigma_max "
                f"({self.sigma_max})"
            )

    @property
    def path(self) -> VE:
        return VE(sigma_max=self.sigma_max)

    @property
    def s_min(self) -> float:
        return self.boundary

    @property
    def needs(self) -> frozenset[str]:
        return self.pairs.needs | (self.target.needs if self.target else frozenset())

    def companions(self) -> Mapping[str, Companion]:
        extra: dict[str, Companion] = {}
        if self.target is not None:
            extra["target"] = Target(decay=self.target)
        if self.teacher is not None:
            extra["teacher"] = self.teacher.source
        return extra

    def check(self, nets: Networks) -> None:
        student = nets.student
        if isinstance(student, EDMDenoiser) and student.sigma_data != self.sigma_data:
            raise ConfigError(
                f"method.sigma_data: {self.sigma_data} given, accepted: {student.sigma_data}, that "
                f"of the network"
            )
        if self.teacher is None:
            return
        teacher, guidance = nets["teacher"], self.teacher.guidance
        if teacher.predicts != "denoiser":
            raise ConfigError(f"teacher: predicts {teacher.predicts!r}, accepted: 'denoiser'")
        if student.cond_dim not in (0, teacher.cond_dim):
            raise ConfigError(
                f"teacher: cond_dim {teacher.cond_dim} given, accepted: {student.cond_dim}, that "
                f"of the student"
            )
        if student.cond_dim == 0 and guidance != 1:
            raise ConfigError(
                f"method.teacher.guidance: {guidance} given without classes, accepted: 1; or train "
                f"a network of classes (cond_dim)"
            )

    def loss(self, nets: Networks, batch: Batch, now: Progress) -> Loss:
        t, r = self.pairs(batch.draws, now)
        eps = batch.draws.normal("eps", batch.x.shape[1:], dtype=batch.x.dtype)
        x_t = batch.x + scaled(t, eps)
        x_r = self._ode_step(nets, batch, eps, x_t, t, r)

        masks = PairedRNG.snapshot(batch.x.device)
        online = self._f(nets.student, x_t, t, batch.cond, batch.augment)
        with torch.no_grad(), masks.replay():
            network = nets.student if self.target is None else nets["target"]
            target = self._f(network, x_r, r, batch.cond, batch.augment)

        wide = torch.promote_types(online.dtype, torch.float32)
        distance = self.distance(online.to(wide), target.to(wide))
        weighted = self.weight(t, r).to(distance.dtype) * distance
        return Loss(per_sample=weighted, times=t, metrics={"distance": distance.detach().mean()})

    def flow_map(
        self, net: Network, x: Tensor, t: Tensor, s: Tensor, cond: Tensor | None = None
    ) -> Tensor:
        """f(x, t): the jump to `s_min`, the only end time that a consistency model knows."""
        if bool((s != self.boundary).any()):
            raise ConfigError(
                f"a consistency model jumps to s = {self.boundary:g} only, {s.tolist()} given; "
                f"reach other times by re-noising (fastflow.sampling.multistep)"
            )
        return self._f(net, x, t, cond, None)

    def _f(
        self, net: Network, x: Tensor, t: Tensor, cond: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        denoised = net(x, t, cond=cond, augment=augment)
        return consistency_from_denoiser(x, denoised, t, self.boundary, self.sigma_data)

    @torch.no_grad()
    def _ode_step(
        self, nets: Networks, batch: Batch, eps: Tensor, x_t: Tensor, t: Tensor, r: Tensor
    ) -> Tensor:
        """x_r: on the line through x0 and x_t (CT), or on the teacher's path through x_t (CD)."""
        if self.teacher is None:
            return batch.x + scaled(r, eps)

        def denoise(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
            denoised: Tensor = nets["teacher"](x, t, cond=cond)
            return denoised

        null = None if batch.cond is None else torch.zeros_like(batch.cond)
        denoiser = guided(denoise, self.teacher.guidance, batch.cond, null)
        return self.teacher.step(denoiser, x_t, t, r)
