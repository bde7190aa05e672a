"""From a raw network F(x, c_noise, ...) to a `Network`: scalings, times, and the second head.

A raw network knows images and labels, but nothing of paths: a wrapper scales what it reads and
returns, and says in which units it reads time. Parameters of the raw network are named `model.*`.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from fastflow.errors import ConfigError
from fastflow.network import Network
from fastflow.path import VP, TrigFlow, scaled, vp_linear_betas
from fastflow.precond import EDMScaling
from fastflow.raw import RawNetwork

SecondTime = Literal["gap", "end"]
"""How a network of two times reads s: as t - s or as s itself, in the units of its first time."""

_LEAST_SIGMA = 0.002  # of EDM: an end time below it is read as it, for ln(0) is no number


class LogVarianceHead(Protocol):
    """What the wrappers ask of the module that gives u(t) [B] from the model's time [B]."""

    def __call__(self, c_noise: Tensor) -> Tensor: ...

    def after_step(self) -> None: ...


class _Wrapped(Network):
    """What all wrappers do: hand on labels and times, first channels, the log-variance head."""

    def __init__(
        self, model: RawNetwork, second: SecondTime, logvar_head: nn.Module | None
    ) -> None:
        super().__init__()
        self.model = model
        self.logvar_head = logvar_head
        self.second = second
        self.sample_shape = tuple(model.sample_shape)
        self.cond_dim, self.augment_dim = model.cond_dim, model.augment_dim
        self.two_times, self.takes_guidance = model.two_times, model.takes_guidance
        self.label_dropout = model.label_dropout
        self.has_logvar = logvar_head is not None

    def c_noise(self, t: Tensor) -> Tensor:
        """The raw network's own time for t [B], in the type of t."""
        raise NotImplementedError(f"{type(self).__name__} does not define c_noise()")

    def c_second(self, t: Tensor, s: Tensor) -> Tensor:
        """The raw network's second time for t, s [B]; differences are taken before any rounding."""
        end = self.c_noise(s)
        return end if self.second == "end" else self.c_noise(t) - end

    def raw(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor | None,
        cond: Tensor | None,
        augment: Tensor | None,
        guidance: Tensor | None,
    ) -> Tensor:
        """The first C channels of the raw network, in the type of `x`."""
        self._check(s, guidance)
        c_noise = self._embedded(self.c_noise(t), x)
        c_second = None if s is None else self._embedded(self.c_second(t, s), x)
        scale = None if guidance is None else self._embedded(guidance, x)
        out: Tensor = self.model(x, c_noise, cond, augment, c_second, scale)
        channels = self.sample_shape[0]
        if out.shape[1] != channels:
            out = out[:, :channels].clone()  # FSDP2 wants no views from a forward pass
        return out.to(x.dtype)

    def logvar(self, t: Tensor) -> Tensor:
        if self.logvar_head is None:
            return super().logvar(t)
        u: Tensor = self.logvar_head(self.c_noise(t))
        return u

    def additions(self) -> tuple[str, ...]:
        names = [f"model.{name}" for name in self.model.additions()]
        return (*names, "logvar_head.") if self.has_logvar else tuple(names)

    def shard_units(self) -> list[nn.Module]:
        return self.model.shard_units()

    def after_step(self) -> None:
        self.model.after_step()
        if self.logvar_head is not None:
            cast(LogVarianceHead, self.logvar_head).after_step()

    def _check(self, s: Tensor | None, guidance: Tensor | None) -> None:
        kind = type(self).__name__
        if s is not None and not self.two_times:
            raise ConfigError(
                f"{kind} takes one time, but an end time s was given; leave s out or build its "
                f"model with two_times=True"
            )
        if s is None and self.two_times:
            raise ConfigError(
                f"{kind} takes two times, but no end time s was given; give s (s = t asks for the "
                f"instantaneous prediction)"
            )
        if guidance is not None and not self.takes_guidance:
            raise ConfigError(
                f"{kind} takes no guidance scale, but one was given; leave it out or build its "
                f"model with takes_guidance=True"
            )

    @staticmethod
    def _embedded(value: Tensor, x: Tensor) -> Tensor:
        # Times are kept from narrow types, whatever the type of the images.
        return value.to(torch.promote_types(x.dtype, torch.float32)).expand(len(x))


class EDMDenoiser(_Wrapped):
    """D(x, t) = c_skip x + c_out model(c_in x, c_noise) with EDM's scalings, t = sigma.

    Scalings are computed in the type of t and the noise level reaches the model in float32 or
    wider, also under autocast. Source: arXiv 2206.00364, table 1.

    Args:
        model: the raw network.
        sigma_data: standard deviation of the data.
        noise_scale: factor on c_noise = ln(t)/4; 1000 in openai's consistency models.
        second: how a model of two times reads s: `noise_scale` ln(s)/4, or by how much that is
            below the value at t. An s below 0.002 is read as 0.002.
        logvar_head: gives u(t) from c_noise [B], for losses with learned weights; None for none.
    """

    predicts = "denoiser"

    def __init__(
        self,
        model: RawNetwork,
        sigma_data: float = 0.5,
        noise_scale: float = 1.0,
        second: SecondTime = "gap",
        logvar_head: nn.Module | None = None,
    ) -> None:
        super().__init__(model, second, logvar_head)
        self.scaling = EDMScaling(sigma_data=sigma_data)
        self.sigma_data, self.noise_scale = sigma_data, noise_scale

    def c_noise(self, t: Tensor) -> Tensor:
        return self.scaling(t).c_noise * self.noise_scale

    def c_second(self, t: Tensor, s: Tensor) -> Tensor:
        return super().c_second(t.clamp_min(_LEAST_SIGMA), s.clamp_min(_LEAST_SIGMA))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        cond: Tensor | None = None,
        augment: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The denoised state; see `Network.forward`."""
        c_skip, c_out, c_in, _ = self.scaling(t)
        raw = self.raw(scaled(c_in, x), t, s, cond, augment, guidance)
        return scaled(c_skip, x) + scaled(c_out, raw)


class TrigFlowNetwork(_Wrapped):
    """F(x, t) = -model(x / sigma_data, c_noise) on the TrigFlow path, dx/dt = sigma_data F.

    The same model in `EDMDenoiser` gives the same denoiser: EDM's input scaling is TrigFlow's, and
    F is minus EDM's raw output. Source: arXiv 2410.11081, section 3.

    Args:
        model: the raw network.
        sigma_data: standard deviation of the data.
        time: what the model reads: "angle", t itself, as in the paper; or "log_sigma",
            ln(sigma)/4 of sigma = sigma_data tan(t), for weights of EDM and EDM2.
        second: how a model of two times reads s: the gap, or as it reads t.
        logvar_head: gives u(t) from the model's time [B]; None for none.
    """

    predicts = "trigflow"

    def __init__(
        self,
        model: RawNetwork,
        sigma_data: float = 0.5,
        time: Literal["angle", "log_sigma"] = "angle",
        second: SecondTime = "gap",
        logvar_head: nn.Module | None = None,
    ) -> None:
        super().__init__(model, second, logvar_head)
        self.path = TrigFlow(sigma_data=sigma_data)
        self.sigma_data, self.time = sigma_data, time

    def c_noise(self, t: Tensor) -> Tensor:
        if self.time == "angle":
            return t
        return EDMScaling(sigma_data=self.sigma_data)(self.path.nsr(t)).c_noise

    def c_second(self, t: Tensor, s: Tensor) -> Tensor:
        least = math.atan(_LEAST_SIGMA / self.sigma_data) if self.time == "log_sigma" else 0.0
        return super().c_second(t.clamp_min(least), s.clamp_min(least))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        cond: Tensor | None = None,
        augment: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """F at t; see `Network.forward`."""
        return -self.raw(x / self.sigma_data, t, s, cond, augment, guidance)


class VelocityNetwork(_Wrapped):
    """The velocity dx/dt on the linear path from a model without preconditioning.

    MeanFlow (arXiv 2505.13447) and SiT (arXiv 2401.08740) read t in [0, 1] as it is. SiT and
    others put data at time 1: their models read 1 - t and give minus our velocity.

    Args:
        model: the raw network.
        time_scale: factor on the time the model reads.
        data_at: the model's time of clean data.
        second: how a model of two times reads s: `time_scale` (t - s), or as it reads t.
        logvar_head: gives u(t) from the model's time [B]; None for none.

    With two times and s < t the output is the average velocity from t to s.
    """

    predicts = "velocity"

    def __init__(
        self,
        model: RawNetwork,
        time_scale: float = 1.0,
        data_at: Literal[0, 1] = 0,
        second: SecondTime = "gap",
        logvar_head: nn.Module | None = None,
    ) -> None:
        super().__init__(model, second, logvar_head)
        if not (0 < time_scale < math.inf):
            raise ConfigError(
                f"time_scale: {time_scale} given, accepted: a finite number above 0, e.g. 1 or 1000"
            )
        self.time_scale, self.data_at = time_scale, data_at

    def c_noise(self, t: Tensor) -> Tensor:
        return self.time_scale * (t if self.data_at == 0 else 1 - t)

    def c_second(self, t: Tensor, s: Tensor) -> Tensor:
        return self.c_noise(s) if self.second == "end" else self.time_scale * (t - s)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        cond: Tensor | None = None,
        augment: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The velocity at t, or its average from t to s; see `Network.forward`."""
        raw = self.raw(x, t, s, cond, augment, guidance)
        return raw if self.data_at == 0 else -raw


class NoiseDenoiser(_Wrapped):
    """D(x, t) = x - t eps(x / sqrt(1 + t^2), n(t)) from a model of the noise (DDPM, DiT).

    n(t) is the step of the variance-preserving path with the noise-to-signal ratio t = sigma,
    between steps interpolated in ln(t) (`VP`), and the first or last step beyond the path's ends.

    Args:
        model: the raw network, trained with linear betas from 1e-4 to 0.02.
        steps: number of diffusion steps.
        logvar_head: gives u(t) from n(t) [B]; None for none.
    """

    predicts = "denoiser"

    def __init__(
        self, model: RawNetwork, steps: int = 1000, logvar_head: nn.Module | None = None
    ) -> None:
        super().__init__(model, "gap", logvar_head)
        self.path = VP(alphas_cumprod=vp_linear_betas(steps))

    def c_noise(self, t: Tensor) -> Tensor:
        least = torch.finfo(t.dtype).tiny
        return self.path.t_of_nsr(t.clamp_min(least)).clamp(self.path.t_min, self.path.t_max)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        cond: Tensor | None = None,
        augment: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The denoised state; see `Network.forward`."""
        noise = self.raw(scaled((1 + t**2).rsqrt(), x), t, s, cond, augment, guidance)
        return x - scaled(t, noise)
