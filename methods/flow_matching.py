"""Flow matching (Lipman et al. 2022, arXiv 2210.02747; rectified flow, arXiv 2209.03003).

    t ~ U(0, 1),   x_t = (1 - t) x0 + t eps
    L = ||v(x_t, t) - (eps - x0)||^2 / d

The network learns the velocity dx/dt of the probability-flow ODE: a teacher on the linear path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastflow.consistency import SquaredL2
from fastflow.data.batch import Batch
from fastflow.method import FlowMapMethod, Loss, Networks
from fastflow.network import Network
from fastflow.path import Linear, scaled
from fastflow.progress import Progress
from fastflow.sampling import FlowMap, Noise, jumps
from fastflow.times import TimeLaw, Uniform


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching(FlowMapMethod):
    """A velocity v(x, t), trained on the straight lines between samples and noise.

    Attributes:
        times: law of t in [0, 1]; SiT draws uniform times, `LogitNormal` is the usual other one.
    """

    expects: ClassVar[str] = "velocity"

    times: TimeLaw = dataclasses.field(default_factory=Uniform)

    @property
    def path(self) -> Linear:
        return Linear()

    def loss(self, nets: Networks, batch: Batch, now: Progress) -> Loss:
        t = self.times(batch.draws)
        eps = batch.draws.normal("eps", batch.x.shape[1:], dtype=batch.x.dtype)
        x_t = self.path.interpolate(batch.x, eps, t)

        velocity = nets.student(x_t, t, cond=batch.cond, augment=batch.augment)

        wide = torch.promote_types(velocity.dtype, torch.float32)
        error = SquaredL2()(velocity.to(wide), (eps - batch.x).to(wide))
        return Loss(per_sample=error, times=t, metrics={"mse": error.detach().mean()})

    def flow_map(
        self, net: Network, x: Tensor, t: Tensor, s: Tensor, cond: Tensor | None = None
    ) -> Tensor:
        """Euler's step from t to any s."""
        return x + scaled(s - t, net(x, t, cond=cond))

    def sample(self, flow_map: FlowMap, x: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
        """The ODE by Euler's method down to 0; no noise is added."""
        return jumps(flow_map, x, (*times, self.s_min))
