"""From a raw network output F to a denoiser or a flow map: pure scalings.

A flow-map parameterisation writes the state at time s, jumped to from x at time t, as

    X_{t->s}(x) = A(t, s) x + B(t, s) F,     A(t, t) = 1,  B(t, t) = 0,

so that the boundary condition holds for any network whose output is finite.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastflow.errors import ConfigError
from fastflow.parts import Part
from fastflow.path import Path, scaled


class Scalings(NamedTuple):
    """D = c_skip x + c_out F(c_in x, c_noise), each in the shape and type of t."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def _require_positive(part: Part, name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{type(part).__name__}.{name}: {value} given, a value above 0 accepted")


@dataclass(frozen=True, kw_only=True)
class EDMScaling(Part):
    """The preconditioning of a denoiser in x_t = x0 + t eps (arXiv 2206.00364, table 1).

    Attributes:
        sigma_data: standard deviation of the data.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "sigma_data", self.sigma_data)

    def __call__(self, t: Tensor) -> Scalings:
        """Scalings at t = sigma >= 0. c_noise stays finite at t = 0, where D = x."""
        sd = self.sigma_data
        total = t**2 + sd**2
        c_noise = torch.log(t.clamp_min(torch.finfo(t.dtype).tiny)) / 4
        return Scalings(sd**2 / total, t * sd / total.sqrt(), total.rsqrt(), c_noise)


class Parameterisation(Part, abc.ABC):
    """A(t, s) and B(t, s) of a flow map. Times are of any shape; coefficients take their type."""

    @abc.abstractmethod
    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B) for jumps from t to s."""

    def jump(self, x: Tensor, f: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """A x + B F for states and raw outputs [B, ...], times [B]; exactly x where s = t."""
        a, b = self.coefficients(t, s)
        return scaled(a, x) + scaled(b, f)


@dataclass(frozen=True, kw_only=True)
class EDMConsistency(Parameterisation):
    """Consistency models in EDM units (arXiv 2303.01469, appendix C), F an EDM raw output.

    s = eps = 0.002 gives the map onto x_eps of CM and iCT; s = 0 gives the plain EDM denoiser of
    ECT and TCM. ECT's evaluation (official code, `sigma_min` of its preconditioner) is s = 0.003
    with a network trained at s = 0. Only c_skip is shifted in its denominator.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "sigma_data", self.sigma_data)

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        sd, gap = self.sigma_data, t - s
        return sd**2 / (gap**2 + sd**2), sd * gap / (t**2 + sd**2).sqrt()


@dataclass(frozen=True, kw_only=True)
class ShiftedEDM(Parameterisation):
    """EDM's scalings at t - s throughout: FastGen's inference option `sigma_shift` (s = 0.003)."""

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "sigma_data", self.sigma_data)

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        scalings = EDMScaling(sigma_data=self.sigma_data)(t - s)
        return scalings.c_skip, scalings.c_out


@dataclass(frozen=True, kw_only=True)
class TrigDDIM(Parameterisation):
    """x_s = cos(t-s) x - sin(t-s) sigma_data F on the TrigFlow path (arXiv 2410.11081).

    sigma_data F is the velocity, and F is minus the raw output of an EDM network.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "sigma_data", self.sigma_data)

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(t - s), -self.sigma_data * torch.sin(t - s)


@dataclass(frozen=True, kw_only=True)
class AverageVelocity(Parameterisation):
    """x_s = x - (t - s) F: F is the average velocity u(x, t, s) (MeanFlow, arXiv 2505.13447)."""

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), s - t


@dataclass(frozen=True, kw_only=True)
class CTM(Parameterisation):
    """x_s = (s/t) x + (1 - s/t) g with F = g a denoiser-like output, t > 0, on the VE path.

    Source: arXiv 2310.02279.
    """

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return s / t, 1 - s / t


@dataclass(frozen=True, kw_only=True)
class SimpleEDM(Parameterisation):
    """DDIM on any path through an EDM-preconditioned denoiser (IMM, arXiv 2503.07565).

    With c = b / sigma_data: A = (a_t a_s + c_t c_s) / (a_t^2 + c_t^2) and
    B = -sigma_data (a_s c_t - a_t c_s) / sqrt(a_t^2 + c_t^2); F as in `TrigDDIM`.
    """

    path: Path
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "sigma_data", self.sigma_data)

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        sd = self.sigma_data
        a_t, a_s = self.path.a(t), self.path.a(s)
        c_t, c_s = self.path.b(t) / sd, self.path.b(s) / sd
        norm = a_t * a_t + c_t * c_t
        return (a_t * a_s + c_t * c_s) / norm, -sd * (a_s * c_t - a_t * c_s) / norm.sqrt()


@dataclass(frozen=True, kw_only=True)
class LCM(Parameterisation):
    """Latent consistency models: F is the x0-prediction, t integer steps, published for s = 0.

    A = sd^2 / (u^2 + sd^2), B = u / sqrt(u^2 + sd^2) with u = timestep_scaling (t - s); B has no
    factor sigma_data (arXiv 2310.04378; diffusers' LCMScheduler).
    """

    timestep_scaling: float = 10.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "timestep_scaling", self.timestep_scaling)
        _require_positive(self, "sigma_data", self.sigma_data)

    def coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        sd, u = self.sigma_data, self.timestep_scaling * (t - s)
        total = u**2 + sd**2
        return sd**2 / total, u / total.sqrt()


def consistency_from_denoiser(
    x: Tensor, denoised: Tensor, t: Tensor, s_min: float, sigma_data: float
) -> Tensor:
    """`EDMConsistency` at s = s_min, from the output of an ordinary EDM denoiser.

    f = (A - k c_skip) x + k D with k = B / c_out = (t - s_min) / t, where (A, B) are the wanted
    coefficients and (c_skip, c_out) the denoiser's own; c_out vanishes at t = 0 < s_min only.

    Args:
        x: states [B, ...] at t.
        denoised: D(x, t) [B, ...], by `EDMScaling(sigma_data=sigma_data)`.
        t: times [B], t >= s_min.
        s_min: the time the map lands on; 0 returns `denoised` itself.
        sigma_data: standard deviation of the data in the denoiser's preconditioning.

    Returns:
        f(x, t) [B, ...] in the type of `x`; exactly x where t = s_min.
    """
    if s_min == 0:
        return denoised
    return _with_scalings(x, denoised, t, s_min, EDMConsistency(sigma_data=sigma_data))


def shifted_from_denoiser(
    x: Tensor, denoised: Tensor, t: Tensor, shift: float, sigma_data: float
) -> Tensor:
    """`ShiftedEDM` at s = shift; arguments and result as in `consistency_from_denoiser`."""
    if shift == 0:
        return denoised
    return _with_scalings(x, denoised, t, shift, ShiftedEDM(sigma_data=sigma_data))


def _with_scalings(
    x: Tensor, denoised: Tensor, t: Tensor, s_min: float, wanted: EDMConsistency | ShiftedEDM
) -> Tensor:
    a, b = wanted.coefficients(t, torch.full_like(t, s_min))
    given = EDMScaling(sigma_data=wanted.sigma_data)(t)
    k = b / given.c_out
    return scaled(a - k * given.c_skip, x) + scaled(k, denoised)
