"""What consistency models on EDM's path have in common: the map f, its loss, what it is asked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from fastflow.consistency import Distance, TeacherStep, TimePair, Weight
from fastflow.data.batch import Batch
from fastflow.errors import ConfigError
from fastflow.method import FlowMapMethod, Loss, Networks
from fastflow.network import Network
from fastflow.path import VE, scaled
from fastflow.precond import consistency_from_denoiser
from fastflow.rng import PairedRNG
from fastflow.teacher import Teacher

Map = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyModel(FlowMapMethod):
    """A method whose network gives f(x, t), the jump from t to `s_min`, and no other.

    Attributes:
        sigma_data: of the EDM preconditioning.
        sigma_max: where sampling starts.
    """

    expects: ClassVar[str] = "denoiser"

    sigma_data: float = 0.5
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sigma_data", "sigma_max"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(
                    f"{type(self).__name__}.{name}: {value} given, accepted: a finite number "
                    f"above 0"
                )

    @property
    def path(self) -> VE:
        return VE(sigma_max=self.sigma_max)

    def check(self, nets: Networks) -> None:
        assumed = nets.student.sigma_data
        if assumed != self.sigma_data:
            raise ConfigError(
                f"method.sigma_data: {self.sigma_data} given, accepted: {assumed}, that of the "
                f"network"
            )

    def f(
        self, net: Network, cond: Tensor | None, augment: Tensor | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """f(x, t) of a network: exactly x at t = s_min."""

        def jump(x: Tensor, t: Tensor) -> Tensor:
            denoised = net(x, t, cond=cond, augment=augment)
            return consistency_from_denoiser(x, denoised, t, self.s_min, self.sigma_data)

        return jump

    def flow_map(
        self, net: Network, x: Tensor, t: Tensor, s: Tensor, cond: Tensor | None = None
    ) -> Tensor:
        """f(x, t): the jump to `s_min`, the only end time that a consistency model knows."""
        if bool((s != self.s_min).any()):
            raise ConfigError(
                f"a consistency model jumps to s = {self.s_min:g} only, {s.tolist()} given; "
                f"reach other times by re-noising (fastflow.sampling.multistep)"
            )
        return self.f(net, cond)(x, t)


def noised(batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = x0 + t eps [B, ...] for times t [B], and eps."""
    eps = batch.draws.normal("eps", batch.x.shape[1:], dtype=batch.x.dtype)
    return batch.x + scaled(t, eps), eps


@torch.no_grad()
def earlier_point(
    nets: Networks,
    batch: Batch,
    eps: Tensor,
    x_t: Tensor,
    pair: TimePair,
    teacher: Teacher | None,
    step: TeacherStep,
) -> Tensor:
    """x_r [B, ...]: on the line from x0 through x_t, or on the teacher's path through x_t."""
    if teacher is None:
        return batch.x + scaled(pair.r, eps)
    denoise = teacher.denoiser(nets, VE(), batch.cond, batch.augment)
    return step(denoise, x_t, pair.t, pair.r)


def consistency_loss(
    online: Map,
    target: Map,
    x_t: Tensor,
    x_r: Tensor,
    pair: TimePair,
    distance: Distance,
    weight: Weight,
) -> Loss:
    """w(t, r) d(online(x_t, t), target(x_r, r)) with the same dropout masks in both.

    The target has no graph; losses [B] are in float32 or wider.
    """
    apart = distance_apart(online, target, x_t, x_r, pair, distance)
    return weighted(apart, pair, weight)


def distance_apart(
    online: Map, target: Map, x_t: Tensor, x_r: Tensor, pair: TimePair, distance: Distance
) -> Tensor:
    """The distance [B] of `consistency_loss` before it is weighted."""
    masks = PairedRNG.snapshot(x_t.device)
    above = online(x_t, pair.t)
    with torch.no_grad(), masks.replay():
        below = target(x_r, pair.r)
    wide = torch.promote_types(above.dtype, torch.float32)
    return distance(above.to(wide), below.to(wide))


def weighted(apart: Tensor, pair: TimePair, weight: Weight) -> Loss:
    """The loss of distances [B] between the points of `pair`."""
    return Loss(
        per_sample=weight(pair.t, pair.r).to(apart.dtype) * apart,
        times=pair.t,
        metrics={"distance": apart.detach().mean()},
    )
