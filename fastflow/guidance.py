"""Guidance that is trained into a velocity network, so that sampling needs one pass per step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fastflow.errors import ConfigError
from fastflow.parts import Part
from fastflow.path import expand
from fastflow.rng import Draws
from fastflow.rows import EachRow, RowChoice


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedGuidance(Part):
    """The velocity to follow, guided by the network in training (arXiv 2505.13447, appendix B.1).

        v_g = omega v + (1 - omega - kappa) u(z, t, t | no class) + kappa u(z, t, t | class)

    Its fixed point is classifier-free guidance of scale omega / (1 - kappa); omega = 1, kappa = 0
    is none. Published: ImageNet B/4 omega 1, kappa 0.5; XL/2 omega 0.2, kappa 0.92, t to 0.75.

    Attributes:
        omega: weight of the sample's velocity.
        kappa: weight of the network's own velocity for the class.
        t_min, t_max: times between which it acts; elsewhere v stays.
        label_dropout: share of rows trained without their class, whose v stays.
        dropped: which rows those are; `FirstRows(count="binomial")` in the JAX code and FastGen.
    """

    omega: float
    kappa: float = 0.0
    t_min: float = 0.0
    t_max: float = 1.0
    label_dropout: float = 0.1
    dropped: RowChoice = dataclasses.field(default_factory=EachRow)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.omega > 0 and 0 <= self.kappa < 1):
            raise ConfigError(
                f"MixedGuidance: omega={self.omega}, kappa={self.kappa} given, accepted: omega "
                f"above 0 and 0 <= kappa < 1"
            )
        if not 0 <= self.label_dropout < 1:
            raise ConfigError(
                f"MixedGuidance.label_dropout: {self.label_dropout} given, accepted: 0 to below 1"
            )
        if not 0 <= self.t_min <= self.t_max:
            raise ConfigError(
                f"MixedGuidance: t from {self.t_min} to {self.t_max} given, accepted: 0 <= t_min "
                f"<= t_max"
            )

    @torch.no_grad()
    def __call__(
        self,
        own: Callable[[Tensor], Tensor],
        v: Tensor,
        t: Tensor,
        cond: Tensor,
        draws: Draws,
    ) -> tuple[Tensor, Tensor]:
        """v_g and the class rows to train with.

        Args:
            own: u(z, t, t | rows) [B, ...] of class rows, without dropout.
            v: velocities of the samples [B, ...].
            t: times [B].
            cond: class rows [B, cond_dim].
            draws: for the dropped labels, by the name "label_dropout".
        """
        null = torch.zeros_like(cond)
        guided = self.omega * v
        for weight, rows in ((1 - self.omega - self.kappa, null), (self.kappa, cond)):
            if weight:
                guided = guided + weight * own(rows)
        dropped = self.dropped(draws, "label_dropout", self.label_dropout)
        acts = ~dropped & (t >= self.t_min) & (t <= self.t_max)
        trained = torch.where(expand(dropped, cond), null, cond)
        return torch.where(expand(acts, v), guided, v), trained
