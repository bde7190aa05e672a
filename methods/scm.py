"""Continuous-time consistency models, sCM (Lu & Song 2024, arXiv 2410.11081): sCT and sCD.

On the TrigFlow path x = cos(t) x0 + sin(t) z, z ~ N(0, sd^2), the map onto the data is

    f(x, t) = cos(t) x - sin(t) sd F(x, t)

and the loss pulls F along the tangent of f (Algorithm 1):

    dx/dt = cos(t) z - sin(t) x0   (sCT)   or the velocity of a teacher   (sCD)
    dF    = cos(t) sin(t) sd dF/dt             along dx/dt, no gradient
    g     = -cos^2(t) (sd F - dx/dt) - r (cos(t) sin(t) x + dF),   r: warm-up from 0 to 1
    g    <- g / (||g|| + 0.1)
    L     = exp(-u(t)) / d ||F - sg(F) - g||^2 + u(t)

u is the log-variance head of the network, where it has one. With r = 1, g is cos(t) df/dt: the
paper's weight 1 / (sd tan t) is in it already.

NVlabs/FastGen departs from this, and these options give what it does: limit="rms"; c, its
`tangent_warmup_const`; weight=InverseSigma(power=1.0); average="mean/d"; times=
TruncatedLogNormal(...) up to sigma = 80 or 800 (sampling starts at 80 anyhow); and, for its finite
differences, engine=PathDifference(follow="sample"). Its u is a linear map of the U-Net's noise
embedding; any head may take its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastflow.consistency import Uniform, Weight
from fastflow.data.batch import Batch
from fastflow.errors import ConfigError
from fastflow.method import Companion, FlowMapMethod, Loss, Networks
from fastflow.network import Network
from fastflow.path import TrigFlow, expand, scaled
from fastflow.path_difference import Function, PathDifference
from fastflow.progress import Progress
from fastflow.schedules import LinearRamp
from fastflow.tangent import Pairs, TangentEngine, value_and_jvp
from fastflow.teacher import Teacher
from fastflow.times import LogNormal, TimeLaw


@dataclasses.dataclass(frozen=True, kw_only=True)
class SCM(FlowMapMethod):
    """Consistency training in continuous time, and distillation when a teacher is given.

    Attributes:
        times: law of sigma = sd tan(t): mean -1 and std 1.4 on CIFAR-10, 1.6 on ImageNet-64.
        teacher: distil this model (sCD); None trains from data alone (sCT).
        warmup: r.
        limit: how g is kept bounded: "norm" divides by ||g|| + c, "rms" by ||g|| / sqrt(d) + c,
            "clamp" cuts each entry to [-1, 1] (the paper's other way).
        c: of "norm" and "rms".
        weight: further weight of sigma; u(t) absorbs any.
        average: "mean" is 1/d; "mean/d" divides by d once more.
        engine: how dF/dt is taken.
        sigma_data: sd, also the network's.
        sigma_max: where sampling starts.
    """

    expects: ClassVar[str] = "trigflow"

    times: TimeLaw = dataclasses.field(default_factory=lambda: LogNormal(mean=-1.0, std=1.4))
    teacher: Teacher | None = None
    warmup: LinearRamp = dataclasses.field(default_factory=lambda: LinearRamp(steps=10_000))
    limit: Literal["norm", "rms", "clamp"] = "norm"
    c: float = 0.1
    weight: Weight = dataclasses.field(default_factory=Uniform)
    average: Literal["mean", "mean/d"] = "mean"
    engine: TangentEngine | PathDifference = dataclasses.field(default_factory=Pairs)
    sigma_data: float = 0.5
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.c <= 0:
            raise ConfigError(f"SCM.c: {self.c} given, accepted: above 0, e.g. 0.1")
        TrigFlow(sigma_data=self.sigma_data, sigma_max=self.sigma_max)  # raises if impossible

    @property
    def title(self) -> str:
        return super().title if self.engine.exact else f"{super().title}, {self.engine.name}"

    @property
    def path(self) -> TrigFlow:
        return TrigFlow(sigma_data=self.sigma_data, sigma_max=self.sigma_max)

    def companions(self) -> Mapping[str, Companion]:
        return {} if self.teacher is None else self.teacher.companions()

    def check(self, nets: Networks) -> None:
        assumed = nets.student.sigma_data
        if assumed != self.sigma_data:
            raise ConfigError(
                f"method.sigma_data: {self.sigma_data} given, accepted: {assumed}, that of the "
                f"network"
            )
        if self.teacher is not None:
            self.teacher.check(nets)

    def loss(self, nets: Networks, batch: Batch, now: Progress) -> Loss:
        path, net = self.path, nets.student
        sigma = self.times(batch.draws)
        t = path.t_of_nsr(sigma)
        eps = batch.draws.normal("eps", batch.x.shape[1:], dtype=batch.x.dtype)
        x = path.interpolate(batch.x, eps, t)
        dxdt = line = path.velocity(batch.x, eps, t)
        if self.teacher is not None:
            denoise = self.teacher.denoiser(nets, path, batch.cond, batch.augment)
            dxdt = path.velocity_from_denoised(x, denoise(x, t), t)

        def f(x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = net(x, t, cond=batch.cond, augment=batch.augment)
            return out

        out, change = self.derivative(f, x, t, dxdt, line)
        g = self.tangent(out, change, x, t, dxdt, self.warmup(now))

        wide = torch.promote_types(out.dtype, torch.float32)
        residual = (out - out.detach()).to(wide) - self.limited(g).to(wide)
        loss = residual.flatten(1).square().mean(1)
        if self.average == "mean/d":
            loss = loss / out[0].numel()
        loss = loss * self.weight(sigma, torch.zeros_like(sigma)).to(wide)
        metrics = {"tangent": torch.linalg.vector_norm(g.flatten(1), dim=1).mean()}
        if net.has_logvar:
            u = net.logvar(t).to(wide)
            loss = loss * torch.exp(-u) + u
            metrics["logvar"] = u.detach().mean()
        return Loss(per_sample=loss, times=t, metrics=metrics)

    def derivative(
        self, f: Function, x: Tensor, t: Tensor, dxdt: Tensor, line: Tensor
    ) -> tuple[Tensor, Tensor]:
        """F = f(x, t) [B, ...] with its graph, and cos(t) sin(t) dF/dt without."""
        both = torch.cos(t) * torch.sin(t)
        if isinstance(self.engine, PathDifference):
            out, slope = self.engine(f, x, t, dxdt, line)
            return out, scaled(both, slope)
        # Scaled before the derivative is taken, so that nothing overflows near the ends.
        return value_and_jvp(f, (x, t), (scaled(both, dxdt), both), self.engine)

    @torch.no_grad()
    def tangent(
        self, out: Tensor, change: Tensor, x: Tensor, t: Tensor, dxdt: Tensor, r: float
    ) -> Tensor:
        """g [B, ...] as it comes, for F and its change from `derivative`."""
        cos, sin, sd = torch.cos(t), torch.sin(t), self.sigma_data
        return -scaled(cos**2, sd * out - dxdt) - r * (scaled(cos * sin, x) + sd * change)

    def limited(self, g: Tensor) -> Tensor:
        """g [B, ...] with its size bounded."""
        if self.limit == "clamp":
            return g.clamp(-1, 1)
        norm = torch.linalg.vector_norm(g.flatten(1), dim=1)
        if self.limit == "rms":
            norm = norm / g[0].numel() ** 0.5
        return g / (expand(norm, g) + self.c)

    def flow_map(
        self, net: Network, x: Tensor, t: Tensor, s: Tensor, cond: Tensor | None = None
    ) -> Tensor:
        """f(x, t), the jump to s = 0; reach other times by re-noising."""
        if bool((s != 0).any()):
            raise ConfigError(
                f"a consistency model jumps to s = 0 only, {s.tolist()} given; reach other times "
                f"by re-noising (fastflow.sampling.multistep)"
            )
        out = net(x, t, cond=cond)
        return self.path.denoised_from_velocity(x, self.sigma_data * out, t)
