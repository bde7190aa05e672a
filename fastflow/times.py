"""Laws of the training time t, grids of times, and laws of an index into a grid.

A law is its quantile function, applied in float64 to one uniform number per sample, so that the
same uniform gives the same time whatever the batch.
"""

from __future__ import annotations

import abc
import functools
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastflow.errors import ConfigError
from fastflow.parts import Part
from fastflow.rng import Draws
from fastflow.rows import ExactShare, RowChoice


class TimeLaw(Part, abc.ABC):
    """A distribution of t."""

    @abc.abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Times at the levels u in (0, 1): float64 of any shape to float64 of the same shape."""

    def __call__(self, draws: Draws, name: str = "t") -> Tensor:
        """Times [B], float64, from the uniform numbers that `draws` keeps under `name`."""
        return self.quantile(draws.uniform(name))


def _check_range(part: Part, t_min: float, t_max: float, lowest: float) -> None:
    if not lowest <= t_min < t_max < math.inf:
        raise ConfigError(
            f"{type(part).__name__}: t_min={t_min}, t_max={t_max} given; "
            f"{lowest:g} <= t_min < t_max accepted"
        )


def _check_positive(part: Part, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ConfigError(
                f"{type(part).__name__}.{name}: {value} given, a finite value above 0 accepted"
            )


@dataclass(frozen=True, kw_only=True)
class LogNormal(TimeLaw):
    """ln t ~ N(mean, std^2), not clamped: EDM (arXiv 2206.00364) and ECT (arXiv 2406.14548)."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, std=self.std)
        if not math.isfinite(self.mean):
            raise ConfigError(f"LogNormal.mean: {self.mean} given, a finite number accepted")

    def quantile(self, u: Tensor) -> Tensor:
        return torch.exp(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True, kw_only=True)
class TruncatedLogNormal(TimeLaw):
    """ln t ~ N(mean, std^2) given t_min <= t <= t_max: FastGen's `lognormal`, TCM's stage 1."""

    mean: float
    std: float
    t_min: float = 0.002
    t_max: float = 80.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, std=self.std, t_min=self.t_min)
        _check_range(self, self.t_min, self.t_max, 0.0)
        low, high = self._mass_below()
        if high - low < 1e-6:
            raise ConfigError(
                f"TruncatedLogNormal: mean={self.mean}, std={self.std} put a mass of "
                f"{high - low:.1g} between t_min={self.t_min} and t_max={self.t_max}; "
                f"at least 1e-06 accepted"
            )

    def _mass_below(self) -> tuple[float, float]:
        z = ((math.log(t) - self.mean) / self.std for t in (self.t_min, self.t_max))
        low, high = (0.5 * math.erfc(-v / math.sqrt(2)) for v in z)
        return low, high

    def quantile(self, u: Tensor) -> Tensor:
        low, high = self._mass_below()
        z = torch.special.ndtri(low + u * (high - low))
        return torch.exp(self.mean + self.std * z).clamp(self.t_min, self.t_max)


@dataclass(frozen=True, kw_only=True)
class TruncatedLogStudentT(TimeLaw):
    """ln t ~ loc + scale StudentT(df) given t_min <= t <= t_max (TCM, arXiv 2410.14895).

    A tiny df (0.01) is nearly uniform in ln |ln t - loc|. FastGen calls this law `log_t`.
    """

    df: float = 0.01
    loc: float = 0.0
    scale: float = 0.2
    t_min: float = 1.0
    t_max: float = 80.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, df=self.df, scale=self.scale, t_min=self.t_min)
        _check_range(self, self.t_min, self.t_max, 0.0)

    def quantile(self, u: Tensor) -> Tensor:
        # With ln t = loc + width sinh(w) the density of w is cosh(w)^-df: smooth for every df.
        width = self.scale * math.sqrt(self.df)
        low, high = (math.asinh((math.log(t) - self.loc) / width) for t in (self.t_min, self.t_max))
        w = _cosh_power_quantile(u, self.df, low, high)
        return torch.exp(self.loc + width * torch.sinh(w)).clamp(self.t_min, self.t_max)


# Six-point Gauss-Legendre rule on [0, 1]: (node, weight).
_GAUSS = (
    (0.03376524289842403, 0.08566224618958514),
    (0.16939530676686776, 0.18038078652406936),
    (0.38069040695840156, 0.23395696728634552),
    (0.6193095930415985, 0.23395696728634552),
    (0.8306046932331322, 0.18038078652406936),
    (0.9662347571015759, 0.08566224618958514),
)
_PANELS = 256


def _cosh_power(w: Tensor, df: float, start: float) -> Tensor:
    """(cosh(w) / cosh(start))^-df without overflow."""
    return torch.exp(-df * (_log_cosh(w) - _log_cosh(torch.full_like(w, start))))


def _log_cosh(w: Tensor) -> Tensor:
    return w.abs() + torch.log1p(torch.exp(-2 * w.abs())) - math.log(2)


def _cosh_power_integral(left: Tensor, right: Tensor, df: float, start: float) -> Tensor:
    """Integral of `_cosh_power` over the short intervals [left, right]."""
    length = right - left
    parts = (weight * _cosh_power(left + node * length, df, start) for node, weight in _GAUSS)
    return length * torch.stack(list(parts)).sum(0)


@functools.lru_cache(maxsize=32)
def _cosh_power_table(
    df: float, low: float, high: float, peak: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Panel edges [_PANELS + 1] and the integral from `low` up to each."""
    edges = torch.linspace(low, high, _PANELS + 1, dtype=torch.float64)
    panels = _cosh_power_integral(edges[:-1], edges[1:], df, peak)
    return edges.to(device), torch.cat([panels.new_zeros(1), panels.cumsum(0)]).to(device)


def _cosh_power_quantile(u: Tensor, df: float, low: float, high: float) -> Tensor:
    """Quantiles of the density prop. to cosh(w)^-df on [low, high], to float64 precision."""
    peak = min(max(0.0, low), high)  # where the density is largest
    edges, masses = _cosh_power_table(df, low, high, peak, u.device)
    total = masses[-1]
    wanted = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    panel = torch.searchsorted(masses, wanted, right=True) - 1
    left, right = edges[panel], edges[panel + 1]
    rest = wanted - masses[panel]
    w = left + (right - left) * rest / (masses[panel + 1] - masses[panel])
    for _ in range(4):  # Newton; within a panel the integral is nearly a straight line
        error = _cosh_power_integral(left, w, df, peak) - rest
        w = torch.minimum(torch.maximum(w - error / _cosh_power(w, df, peak), left), right)
    return w


@dataclass(frozen=True, kw_only=True)
class Uniform(TimeLaw):
    """t uniform in [t_min, t_max]. FastGen: [0.002, 80] (EDM), [0.001, 0.999] (linear path)."""

    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self, self.t_min, self.t_max, 0.0)

    def quantile(self, u: Tensor) -> Tensor:
        return (self.t_min + u * (self.t_max - self.t_min)).clamp(self.t_min, self.t_max)


@dataclass(frozen=True, kw_only=True)
class UniformPower(TimeLaw):
    """t^(1/rho) uniform: a Karras grid without gaps (arXiv 2303.01469, appendix B)."""

    t_min: float = 0.002
    t_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, rho=self.rho)
        _check_range(self, self.t_min, self.t_max, 0.0)

    def quantile(self, u: Tensor) -> Tensor:
        low, high = self.t_min ** (1 / self.rho), self.t_max ** (1 / self.rho)
        t: Tensor = (low + u * (high - low)) ** self.rho
        return t.clamp(self.t_min, self.t_max)


@dataclass(frozen=True, kw_only=True)
class LogitNormal(TimeLaw):
    """t = t_min + (t_max - t_min) sigmoid(mean + std z), z ~ N(0, 1) (arXiv 2403.03206).

    FastGen's ranges: [0, 0.999] on the linear path, [0, pi/2] on TrigFlow.
    """

    mean: float
    std: float
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, std=self.std)
        _check_range(self, self.t_min, self.t_max, 0.0)

    def quantile(self, u: Tensor) -> Tensor:
        position = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        return self.t_min + (self.t_max - self.t_min) * position


@dataclass(frozen=True, kw_only=True)
class Shifted(TimeLaw):
    """v uniform in [t_min, t_max], t = min(shift v / (1 + (shift - 1) v), t_max) (2403.03206).

    FastGen's `shifted`, with its clamp: with shift 5 on [0.001, 0.999] the largest 0.5 % of the
    draws equal t_max.
    """

    shift: float
    t_min: float = 0.001
    t_max: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, shift=self.shift)
        _check_range(self, self.t_min, self.t_max, 0.0)
        if self.t_max > 1:
            raise ConfigError(f"Shifted.t_max: {self.t_max} given, at most 1 accepted")

    def quantile(self, u: Tensor) -> Tensor:
        v = self.t_min + u * (self.t_max - self.t_min)
        return (self.shift * v / (1 + (self.shift - 1) * v)).clamp(self.t_min, self.t_max)


@dataclass(frozen=True, kw_only=True)
class PairLaw(Part):
    """A law of (t, r), r <= t, for maps of two times (MeanFlow, arXiv 2505.13447).

    Attributes:
        times: law of t.
        equal: share of the rows with r = t, where the loss is that of flow matching.
        ends: law of r; None for the same as of t.
        order: "sort" makes t the larger of the two draws (the paper and FastGen), "clip" keeps t
            and lowers r to it (py-meanflow's "v1").
        rows: which rows have r = t: exactly the share, chosen at random. py-meanflow has
            `EachRow`, the JAX code `FirstRows` and FastGen `FirstRows(count="binomial")`.
    """

    times: TimeLaw
    equal: float
    ends: TimeLaw | None = None
    order: Literal["sort", "clip"] = "sort"
    rows: RowChoice = field(default_factory=ExactShare)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.equal <= 1:
            raise ConfigError(f"PairLaw.equal: {self.equal} given, accepted: from 0 to 1")

    def __call__(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Times t and r of each row, float64 [B]."""
        t = self.times(draws)
        r = (self.ends or self.times)(draws, "r")
        low, high = torch.minimum(t, r), torch.maximum(t, r)
        if self.order == "sort":
            t = high
        return t, torch.where(self.rows(draws, "equal", self.equal), t, low)


def karras_grid(
    n: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """n times, ascending, evenly spaced in t^(1/rho) (arXiv 2206.00364, eq. 5).

    Returns:
        float64 [n], from exactly sigma_min to exactly sigma_max.

    Raises:
        ConfigError: n < 2, or not 0 < sigma_min < sigma_max, or rho <= 0.
    """
    if n < 2 or not 0 < sigma_min < sigma_max or not rho > 0:
        raise ConfigError(
            f"Karras grid: n={n}, sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho} given; "
            f"n >= 2, 0 < sigma_min < sigma_max and rho > 0 accepted"
        )
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    steps = torch.arange(n, dtype=torch.float64, device=device) / (n - 1)
    grid = torch.pow(low + steps * (high - low), rho)
    grid[0], grid[-1] = sigma_min, sigma_max
    return grid


@dataclass(frozen=True, kw_only=True)
class PolynomialIndex(TimeLaw):
    """A uniformly drawn point of a Karras grid, the ends left out: FastGen's `polynomial`.

    Attributes:
        t_min, t_max, rho: the grid; see `karras_grid`.
        n: its number of points.
        first: index of the smallest time that is drawn.
        last: index of the largest.
    """

    t_min: float = 0.002
    t_max: float = 80.0
    rho: float = 7.0
    n: int = 1000
    first: int = 2
    last: int = 998

    def __post_init__(self) -> None:
        super().__post_init__()
        karras_grid(2, self.t_min, self.t_max, self.rho)  # raises on an impossible range
        if not 0 <= self.first <= self.last < self.n:
            raise ConfigError(
                f"PolynomialIndex: first={self.first}, last={self.last}, n={self.n} given; "
                f"0 <= first <= last < n accepted"
            )

    def quantile(self, u: Tensor) -> Tensor:
        index = self.first + (u * (self.last - self.first + 1)).long()
        grid = karras_grid(self.n, self.t_min, self.t_max, self.rho, u.device)
        return grid[index.clamp(max=self.last)]


class IndexLaw(Part, abc.ABC):
    """A distribution of i in 0 .. N-2 over an ascending grid; the pair is (grid[i+1], grid[i])."""

    @abc.abstractmethod
    def probabilities(self, grid: Tensor) -> Tensor:
        """p(i) for a grid [N]: float64 [N-1], summing to 1."""

    def __call__(self, draws: Draws, grid: Tensor, name: str = "t") -> Tensor:
        """Indices [B], int64, from the uniform numbers that `draws` keeps under `name`."""
        cumulative = self.probabilities(grid).cumsum(0)
        index = torch.searchsorted(cumulative, draws.uniform(name), right=True)
        return index.clamp(max=len(grid) - 2)


@dataclass(frozen=True, kw_only=True)
class UniformIndex(IndexLaw):
    """Every interval alike: consistency models (arXiv 2303.01469, algorithms 2 and 3)."""

    def probabilities(self, grid: Tensor) -> Tensor:
        n = len(grid) - 1
        return torch.full((n,), 1 / n, dtype=torch.float64, device=grid.device)


@dataclass(frozen=True, kw_only=True)
class LogNormalIndex(IndexLaw):
    """The mass of a lognormal in each interval, renormalised (iCT, arXiv 2310.14189, sec. 3.5)."""

    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, std=self.std)

    def probabilities(self, grid: Tensor) -> Tensor:
        mass = torch.erf((grid.double().log() - self.mean) / (math.sqrt(2) * self.std)).diff()
        return mass / mass.sum()
