"""Interpolants x_t = a(t) x0 + b(t) eps, and every conversion between what a network may predict.

Data lies at small t, noise at large t, and eps has unit variance in every path. The ratio
nsr(t) = b/a (the EDM sigma) is the coordinate all paths share: two paths are the same
probability-flow ODE up to a change of time and a scaling of x where their nsr agree.

With D = E[x0 | x_t], E = E[eps | x_t] and the Wronskian W = a b' - a' b:

    v = a' D + b' E       D = (b' x - b v) / W       E = (a v - a' x) / W

Coefficients are computed in the type of t (float64 recommended) and rounded once, to the type of
the state they multiply. Times are [B] or scalar tensors; states are [B, ...].
"""

from __future__ import annotations

import abc
import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastflow.errors import ConfigError
from fastflow.parts import Part


def expand(t: Tensor, x: Tensor) -> Tensor:
    """Reshape times [B] (or a scalar) so that they broadcast over states [B, ...]."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def scaled(c: Tensor, x: Tensor) -> Tensor:
    """One coefficient per row, [B] or scalar, times states [B, ...], in the type of `x`."""
    return expand(c, x).to(x.dtype) * x


class Path(Part, abc.ABC):
    """An interpolant: four coefficients of time, and the conversions that follow from them.

    Concrete paths are frozen dataclasses. Each coefficient maps times of any shape to values of
    the same shape and type.
    """

    @property
    @abc.abstractmethod
    def t_min(self) -> float:
        """The smallest time in use (cleanest states)."""

    @property
    @abc.abstractmethod
    def t_max(self) -> float:
        """The largest time in use, where sampling starts."""

    @abc.abstractmethod
    def a(self, t: Tensor) -> Tensor:
        """Weight of the data."""

    @abc.abstractmethod
    def b(self, t: Tensor) -> Tensor:
        """Weight of the unit-variance noise."""

    @abc.abstractmethod
    def da(self, t: Tensor) -> Tensor:
        """Time derivative of `a`."""

    @abc.abstractmethod
    def db(self, t: Tensor) -> Tensor:
        """Time derivative of `b`."""

    @abc.abstractmethod
    def nsr(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio b/a, increasing in t."""

    @abc.abstractmethod
    def t_of_nsr(self, nsr: Tensor) -> Tensor:
        """Inverse of `nsr`."""

    @abc.abstractmethod
    def wronskian(self, t: Tensor) -> Tensor:
        """W = a b' - a' b > 0."""

    def interpolate(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = a x0 + b eps."""
        return scaled(self.a(t), x0) + scaled(self.b(t), eps)

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """v = a' x0 + b' eps: conditional for a pair (x0, eps), marginal for (D, E)."""
        return scaled(self.da(t), x0) + scaled(self.db(t), eps)

    def denoised_from_velocity(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """D = (b' x - b v) / W."""
        w = self.wronskian(t)
        return scaled(self.db(t) / w, x) - scaled(self.b(t) / w, v)

    def noise_from_velocity(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """E = (a v - a' x) / W."""
        w = self.wronskian(t)
        return scaled(self.a(t) / w, v) - scaled(self.da(t) / w, x)

    def denoised_from_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """D = (x - b E) / a; ill-conditioned where a is small."""
        return (x - scaled(self.b(t), noise)) / expand(self.a(t), x).to(x.dtype)

    def noise_from_denoised(self, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        """E = (x - a D) / b, for b(t) > 0."""
        return (x - scaled(self.a(t), denoised)) / expand(self.b(t), x).to(x.dtype)

    def velocity_from_denoised(self, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        """v = a' D + b' E with E = (x - a D) / b, that is (b' x - W D) / b, for b(t) > 0."""
        numerator = scaled(self.db(t), x) - scaled(self.wronskian(t), denoised)
        return numerator / expand(self.b(t), x).to(x.dtype)

    def score_from_denoised(self, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x) = (a D - x) / b^2, for b(t) > 0."""
        return (scaled(self.a(t), denoised) - x) / expand(self.b(t) ** 2, x).to(x.dtype)

    def ddim(self, x: Tensor, denoised: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The jump t -> s that is exact while D is constant, the same in every path.

        x_s = a_s D + (b_s / b_t) (x - a_t D), for b(t) > 0.
        """
        rest = x - scaled(self.a(t), denoised)
        return scaled(self.a(s), denoised) + scaled(self.b(s) / self.b(t), rest)

    def convert(self, x: Tensor, t: Tensor, other: Path) -> tuple[Tensor, Tensor]:
        """The same state on another path, matched by noise-to-signal ratio.

        D and E stay the same tensors under this change.

        Returns:
            (x', t'): the state [B, ...] in the type of `x` and its time in the type of `t`.
        """
        u = other.t_of_nsr(self.nsr(t))
        # (a', b') and (a, b) are parallel, so this is a'/a without dividing by an a of 0.
        scale = torch.hypot(other.a(u), other.b(u)) / torch.hypot(self.a(t), self.b(t))
        return scaled(scale, x), u


@dataclass(frozen=True, kw_only=True)
class VE(Path):
    """Variance exploding, x_t = x0 + t eps with t = sigma (EDM, arXiv 2206.00364)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sigma_min < self.sigma_max:
            raise ConfigError(
                f"VE: sigma_min={self.sigma_min}, sigma_max={self.sigma_max} given; "
                f"0 <= sigma_min < sigma_max accepted"
            )

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def a(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def b(self, t: Tensor) -> Tensor:
        return t

    def da(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def db(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def nsr(self, t: Tensor) -> Tensor:
        return t

    def t_of_nsr(self, nsr: Tensor) -> Tensor:
        return nsr

    def wronskian(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True, kw_only=True)
class Linear(Path):
    """Flow matching, x_t = (1 - t) x0 + t eps with t in [0, 1] (arXiv 2210.02747, 2209.03003)."""

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return 1.0

    def a(self, t: Tensor) -> Tensor:
        return 1 - t

    def b(self, t: Tensor) -> Tensor:
        return t

    def da(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def db(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def nsr(self, t: Tensor) -> Tensor:
        """t / (1 - t), infinite at t = 1."""
        return t / (1 - t)

    def t_of_nsr(self, nsr: Tensor) -> Tensor:
        """nsr / (1 + nsr), written so that 0 and infinity map to 0 and 1."""
        return 1 / (1 + 1 / nsr)

    def wronskian(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True, kw_only=True)
class TrigFlow(Path):
    """x_t = cos(t) x0 + sin(t) sigma_data eps, t in [0, atan(sigma_max / sigma_data)].

    Source: arXiv 2410.11081, whose noise z is sigma_data eps. States of data with
    standard deviation sigma_data keep it at every t.
    """

    sigma_data: float = 0.5
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.sigma_data > 0 and self.sigma_max > 0):
            raise ConfigError(
                f"TrigFlow: sigma_data={self.sigma_data}, sigma_max={self.sigma_max} given; "
                f"values above 0 accepted"
            )

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return math.atan(self.sigma_max / self.sigma_data)

    def a(self, t: Tensor) -> Tensor:
        return torch.cos(t)

    def b(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.sin(t)

    def da(self, t: Tensor) -> Tensor:
        return -torch.sin(t)

    def db(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.cos(t)

    def nsr(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.tan(t)

    def t_of_nsr(self, nsr: Tensor) -> Tensor:
        return torch.atan(nsr / self.sigma_data)

    def wronskian(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.sigma_data)


@dataclass(frozen=True, kw_only=True)
class VP(Path):
    """Variance preserving (DDPM): a = sqrt(abar), b = sqrt(1 - abar), t in grid steps 0 .. N-1.

    Between grid points ln(nsr) is linear in t, so that the path, its derivatives and its inverse
    agree exactly; at a grid point the derivative is that of the interval to its right.

    Attributes:
        alphas_cumprod: abar at 0 .. N-1, strictly decreasing, all in (0, 1). Times may be integers
            (then computed with in float64).
    """

    alphas_cumprod: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        values = self.alphas_cumprod
        falling = all(left > right for left, right in itertools.pairwise(values))
        if len(values) < 2 or not falling or not (values[0] < 1 and values[-1] > 0):
            raise ConfigError(
                "VP.alphas_cumprod: at least two strictly decreasing values in (0, 1) accepted; "
                f"{len(values)} given" + (f", from {values[0]} to {values[-1]}" if values else "")
            )

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return float(len(self.alphas_cumprod) - 1)

    def a(self, t: Tensor) -> Tensor:
        return torch.rsqrt(1 + self.nsr(t) ** 2)

    def b(self, t: Tensor) -> Tensor:
        nsr = self.nsr(t)
        return nsr * torch.rsqrt(1 + nsr**2)

    def da(self, t: Tensor) -> Tensor:
        return -self.b(t) * self.wronskian(t)

    def db(self, t: Tensor) -> Tensor:
        return self.a(t) * self.wronskian(t)

    def nsr(self, t: Tensor) -> Tensor:
        left, slope, start = self._interval(t)
        return torch.exp(left + slope * (t - start))

    def t_of_nsr(self, nsr: Tensor) -> Tensor:
        knots = _log_nsr_table(self.alphas_cumprod, nsr.device)
        y = torch.log(nsr.double())
        index = (torch.searchsorted(knots, y, right=True) - 1).clamp(0, len(knots) - 2)
        slope = knots[index + 1] - knots[index]
        return (index + (y - knots[index]) / slope).to(nsr.dtype)

    def wronskian(self, t: Tensor) -> Tensor:
        """a^2 d(nsr)/dt = slope a b, as a^2 + b^2 = 1."""
        _, slope, _ = self._interval(t)
        return slope * self.a(t) * self.b(t)

    def _interval(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ln(nsr) at the left end, its slope and the left end of the grid interval around t."""
        knots = _log_nsr_table(self.alphas_cumprod, t.device)
        dtype = t.dtype if t.is_floating_point() else torch.float64
        index = t.floor().long().clamp(0, len(knots) - 2)
        left, right = knots[index], knots[index + 1]
        return left.to(dtype), (right - left).to(dtype), index.to(dtype)


@functools.lru_cache(maxsize=32)
def _log_nsr_table(alphas_cumprod: tuple[float, ...], device: torch.device) -> Tensor:
    values = torch.tensor(alphas_cumprod, dtype=torch.float64)
    return (0.5 * (torch.log1p(-values) - torch.log(values))).to(device)


def vp_linear_betas(
    n: int = 1000, beta_first: float = 1e-4, beta_last: float = 0.02
) -> tuple[float, ...]:
    """abar at 0 .. n-1 for betas linear in the step (DDPM, arXiv 2006.11239, section 4)."""
    if n < 2 or not 0 < beta_first <= beta_last < 1:
        raise ConfigError(
            f"vp_linear_betas: n={n}, beta_first={beta_first}, beta_last={beta_last} given; "
            f"n >= 2 and 0 < beta_first <= beta_last < 1 accepted"
        )
    # On the CPU, whatever the default device: a network may be built on the meta device.
    betas = torch.linspace(beta_first, beta_last, n, dtype=torch.float64, device="cpu")
    return tuple(torch.cumprod(1 - betas, 0).tolist())
