"""Denoising score matching as in EDM (Karras et al. 2022, arXiv 2206.00364): the usual teacher.

    ln t ~ N(-1.2, 1.2^2)
    x_t = x0 + t eps
    L   = w(t) ||D(x_t, t) - x0||^2 / d,     w = (t^2 + sd^2) / (t sd)^2

The weight is 1 / c_out(t)^2, so the raw output of the preconditioned network is fitted with unit
weight at every t. With a log-variance head u the loss is L exp(-u(t)) + u(t), which weighs each t
by what is left to learn there (EDM2, arXiv 2312.02696, eq. 21). Sampling follows the ODE
dx/dt = (x - D) / t.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastflow.consistency import InverseCout, SquaredL2, Weight
from fastflow.data.batch import Batch
from fastflow.method import FlowMapMethod, Loss, Networks
from fastflow.network import Network
from fastflow.path import VE, scaled
from fastflow.progress import Progress
from fastflow.sampling import FlowMap, Noise, jumps
from fastflow.times import LogNormal, TimeLaw


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDM(FlowMapMethod):
    """A denoiser D(x, t), trained on pairs of noisy and clean samples.

    Attributes:
        times: law of t; EDM's is the default; EDM2 has mean -0.8 and std 1.6 on ImageNet-64, -0.4
            and 1.0 in the latents of ImageNet-512.
        weight: w(t); its second time is that of the clean sample, 0.
        sigma_max: the time at which sampling starts.
    """

    expects: ClassVar[str] = "denoiser"

    times: TimeLaw = dataclasses.field(default_factory=lambda: LogNormal(mean=-1.2, std=1.2))
    weight: Weight = dataclasses.field(default_factory=InverseCout)
    sigma_max: float = 80.0

    @property
    def path(self) -> VE:
        return VE(sigma_max=self.sigma_max)

    def loss(self, nets: Networks, batch: Batch, now: Progress) -> Loss:
        t = self.times(batch.draws)
        eps = batch.draws.normal("eps", batch.x.shape[1:], dtype=batch.x.dtype)
        x_t = batch.x + scaled(t, eps)

        denoised = nets.student(x_t, t, cond=batch.cond, augment=batch.augment)

        wide = torch.promote_types(denoised.dtype, torch.float32)
        error = SquaredL2()(denoised.to(wide), batch.x.to(wide))
        weighted = self.weight(t, torch.zeros_like(t)).to(error.dtype) * error
        metrics = {"mse": error.detach().mean()}
        if nets.student.has_logvar:
            u = nets.student.logvar(t).to(error.dtype)
            weighted = weighted * torch.exp(-u) + u
            metrics["logvar"] = u.detach().mean()
        return Loss(per_sample=weighted, times=t, metrics=metrics)

    def flow_map(
        self, net: Network, x: Tensor, t: Tensor, s: Tensor, cond: Tensor | None = None
    ) -> Tensor:
        """Euler's step from t > 0 to any s: exact where D is constant, D itself at s = 0."""
        denoised = net(x, t, cond=cond)
        return scaled(s / t, x) + scaled(1 - s / t, denoised)

    def sample(self, flow_map: FlowMap, x: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
        """The ODE by Euler's method (DDIM) down to 0; no noise is added."""
        return jumps(flow_map, x, (*times, self.s_min))
