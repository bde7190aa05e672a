"""Parts of discretised consistency losses: pairs of times, distances, weights, teacher steps.

Official codes differ in these parts; the docstrings name the options that reproduce each:

    openai/consistency_models   GridPairing, SquaredL2/L1 (mean), Uniform, Heun, boundary 0.002
    locuslab/ect                RatioPairing, PseudoHuber(c), InverseGap, boundary 0
    NVlabs/FastGen              RatioPairing(min_gap=1e-6) with r_min=0.002 in the gap,
                                PseudoHuber(c), InverseGap or InverseCout, Euler, boundary 0
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.errors import ConfigError
from fastflow.parts import Part
from fastflow.path import expand
from fastflow.progress import Progress
from fastflow.rng import Draws
from fastflow.schedules import Gap
from fastflow.times import IndexLaw, TimeLaw, UniformIndex, karras_grid
from fastflow.torchvision_shim import import_beside_torchvision

Denoiser = Callable[[Tensor, Tensor], Tensor]


class TimePair(NamedTuple):
    """Neighbouring times of a batch, float64 [B]: t, and the cleaner r < t."""

    t: Tensor
    r: Tensor


# Pairs of times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairing(Part, abc.ABC):
    """A law of (t, r); `needs` names the curriculum values it reads."""

    @property
    @abc.abstractmethod
    def needs(self) -> frozenset[str]: ...

    @abc.abstractmethod
    def __call__(self, draws: Draws, now: Progress) -> TimePair:
        """Times of each sample of the batch that `draws` belongs to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridPairing(Pairing):
    """Neighbours on a Karras grid of N(k) points (arXiv 2303.01469, section 5; arXiv 2310.14189).

    Attributes:
        index: law of the interval's index; uniform in the CM paper, a discretised lognormal in
            iCT.
        sigma_min, sigma_max, rho: the grid.
    """

    index: IndexLaw = dataclasses.field(default_factory=UniformIndex)
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        karras_grid(2, self.sigma_min, self.sigma_max, self.rho)  # raises on an impossible range

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"N"})

    def __call__(self, draws: Draws, now: Progress) -> TimePair:
        grid = karras_grid(int(now["N"]), self.sigma_min, self.sigma_max, rho=self.rho)
        grid = grid.to(draws.device, non_blocking=True)
        lower = self.index(draws, grid)
        return TimePair(t=grid[lower + 1], r=grid[lower])


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatioPairing(Pairing):
    """A continuous law of t, and r(t) from the curriculum's ratio (arXiv 2406.14548, section 3).

    ECT: LogNormal times, r_min = 0 in the gap, min_gap = 0. FastGen: TruncatedLogNormal times,
    r_min = 0.002, min_gap = 1e-6.

    Attributes:
        times: law of t.
        gap: maps (t, ratio) to r.
        min_gap: t is moved up to r + min_gap where the two come closer.
    """

    times: TimeLaw
    gap: Gap
    min_gap: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_gap < 0:
            raise ConfigError(
                f"RatioPairing.min_gap: {self.min_gap} given, accepted: 0 or more (FastGen 1e-6)"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ratio"})

    def __call__(self, draws: Draws, now: Progress) -> TimePair:
        return self.at(self.times(draws), now)

    def at(self, t: Tensor, now: Progress) -> TimePair:
        """The pairs of given times t [B]."""
        ratio = now["ratio"]
        if ratio >= 1 and self.min_gap == 0:
            raise ConfigError(
                f"curriculum ratio: {ratio} reached at step {now.step}, so that r = t; accepted: "
                f"below 1. Give RatioStages a limit, e.g. limit=0.999"
            )
        r = self.gap(t, ratio)
        return TimePair(t=torch.maximum(t, r + self.min_gap), r=r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantisedPairing(Pairing):
    """Another pairing, its times moved to the nearest points of a Karras grid (FastGen).

    Where both fall on one point, t takes the next one up.

    Attributes:
        pairs: the pairing; r follows from t before either is moved.
        n, sigma_min, sigma_max, rho: the grid.
    """

    pairs: Pairing
    n: int = 1000
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        karras_grid(self.n, self.sigma_min, self.sigma_max, self.rho)  # raises if impossible

    @property
    def needs(self) -> frozenset[str]:
        return self.pairs.needs

    def __call__(self, draws: Draws, now: Progress) -> TimePair:
        t, r = self.pairs(draws, now)
        grid = karras_grid(self.n, self.sigma_min, self.sigma_max, self.rho).to(t.device)
        middles = (grid[:-1] + grid[1:]) / 2
        lower = torch.searchsorted(middles, r).clamp_max(self.n - 2)
        upper = torch.maximum(torch.searchsorted(middles, t), lower + 1)
        return TimePair(t=grid[upper], r=grid[lower])


# Distances


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance(Part, abc.ABC):
    """A distance of each sample: ([B, ...], [B, ...]) -> [B], at least float32."""

    @abc.abstractmethod
    def __call__(self, a: Tensor, b: Tensor) -> Tensor: ...


def _reduce(values: Tensor, reduction: Literal["sum", "mean"]) -> Tensor:
    flat = values.flatten(1)
    return flat.sum(1) if reduction == "sum" else flat.mean(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredL2(Distance):
    """The squared difference, its mean over the dimensions ||a - b||^2 / d or their sum.

    Attributes:
        reduction: "mean" is openai's "l2"; "sum" is FastGen's `use_squared_l2`.
        resize: images are first resized to this side, bilinear (32 gives openai's "l2-32").
    """

    reduction: Literal["sum", "mean"] = "mean"
    resize: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resize is not None and self.resize < 1:
            raise ConfigError(f"SquaredL2.resize: {self.resize} given, accepted: 1 or more")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        if self.resize is not None:
            a, b = _resized(a, self.resize), _resized(b, self.resize)
        return _reduce((a - b).square(), self.reduction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class L1(Distance):
    """The absolute difference, its mean over the dimensions (openai's "l1") or their sum."""

    reduction: Literal["sum", "mean"] = "mean"

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return _reduce((a - b).abs(), self.reduction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PseudoHuber(Distance):
    """sqrt(||a - b||^2 + c^2) - c with the norm over all dimensions (arXiv 2310.14189, eq. 7).

    c = 0 is the Euclidean norm (its gradient at a = b is taken as 0). iCT: c = 0.00054 sqrt(d)
    with d the number of dimensions; ECT and FastGen on CIFAR-10: 0 and 1e-8; on ImageNet-64: 0.06.
    """

    c: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.c < 0:
            raise ConfigError(f"PseudoHuber.c: {self.c} given, accepted: 0 or more")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        difference = (a - b).flatten(1)
        if self.c == 0:
            norm: Tensor = torch.linalg.vector_norm(difference, dim=1)
            return norm
        return (difference.square().sum(1) + self.c**2).sqrt() - self.c


@dataclasses.dataclass(frozen=True, kw_only=True)
class LPIPS(Distance):
    """Learned perceptual distance; images below 256 are resized to 224 (CM paper, app. C).

    It flatters FID, both being built on features of ImageNet classifiers. Images lie in [-1, 1],
    the range `lpips` is made for (openai's PyTorch code hands it (x + 1) / 2). Needs the package
    `lpips`, and the weights of its backbone, which it downloads once.
    """

    backbone: Literal["vgg", "alex", "squeeze"] = "vgg"

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        if a.shape[-1] < 256:
            a, b = _resized(a, 224), _resized(b, 224)
        network = _lpips_network(self.backbone, a.device)
        distance: Tensor = network(a, b)
        return distance.flatten()


def _resized(x: Tensor, side: int) -> Tensor:
    if x.ndim != 4:
        raise ConfigError(
            f"a distance between resized images: samples of shape {tuple(x.shape[1:])} given, "
            f"accepted: images (C, H, W); take another distance for other data"
        )
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


@functools.cache
def _lpips_network(backbone: str, device: torch.device) -> torch.nn.Module:
    lpips = import_beside_torchvision("lpips", "the LPIPS distance", "lpips")
    network: torch.nn.Module = lpips.LPIPS(net=backbone, verbose=False)
    return network.eval().requires_grad_(False).to(device)


# Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight(Part, abc.ABC):
    """The weight of each pair: float64 ([B], [B]) -> [B]."""

    @abc.abstractmethod
    def __call__(self, t: Tensor, r: Tensor) -> Tensor: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(Weight):
    """1: the released CM runs (openai "uniform"); FastGen "one"."""

    def __call__(self, t: Tensor, r: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseGap(Weight):
    """1 / (t - r)^power: iCT, ECT and FastGen "default" with power 1; FastGen "sqrt" with 0.5."""

    power: float = 1.0

    def __call__(self, t: Tensor, r: Tensor) -> Tensor:
        return (t - r) ** -self.power


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseCout(Weight):
    """1 / c_out(t)^power, c_out = t sd / sqrt(t^2 + sd^2).

    Power 2 is EDM's weighting of denoising (openai "karras"), used by ECT on ImageNet-64 (FastGen
    "c_out_sq"); power 1 is FastGen's "c_out".

    Attributes:
        sigma_data: sd, the standard deviation of the data.
    """

    power: float = 2.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_data <= 0:
            raise ConfigError(f"InverseCout.sigma_data: {self.sigma_data} given, accepted: above 0")

    def __call__(self, t: Tensor, r: Tensor) -> Tensor:
        c_out = t * self.sigma_data / (t**2 + self.sigma_data**2).sqrt()
        return c_out**-self.power


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseSigma(Weight):
    """1 / t^power; power 2 is the signal-to-noise ratio (openai "snr", FastGen "sigma_sq")."""

    power: float = 2.0

    def __call__(self, t: Tensor, r: Tensor) -> Tensor:
        return t**-self.power


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnrPlus(Weight):
    """1 / t^2 + offset: openai's "snr+1" with offset 1 (its "karras" is `InverseCout`)."""

    offset: float = 1.0

    def __call__(self, t: Tensor, r: Tensor) -> Tensor:
        return t**-2 + self.offset


@dataclasses.dataclass(frozen=True, kw_only=True)
class TruncatedSnr(Weight):
    """max(1 / t^2, 1): openai's "truncated-snr"."""

    def __call__(self, t: Tensor, r: Tensor) -> Tensor:
        return (t**-2).clamp_min(1.0)


# One teacher step along the probability-flow ODE, dx/dt = (x - D) / t


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherStep(Part, abc.ABC):
    """One step of an ODE solver from (x, t) to r; where r = 0 every solver takes Euler's."""

    @abc.abstractmethod
    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, r: Tensor) -> Tensor: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler(TeacherStep):
    """x + (r - t) (x - D(x, t)) / t, written so that r = 0 gives D exactly (FastGen)."""

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        kept = expand(r / t, x).to(x.dtype)
        denoised = denoiser(x, t)
        return denoised + kept * (x - denoised)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun(TeacherStep):
    """The trapezoid rule with an Euler predictor (arXiv 2206.00364, algorithm 1; openai)."""

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        step = expand(r - t, x).to(x.dtype)
        denoised = denoiser(x, t)
        slope = (x - denoised) / expand(t, x).to(x.dtype)
        ahead = x + step * slope
        # At r = 0 there is no slope: Euler's step is taken, and the unused rows are kept finite.
        later = torch.where(r > 0, r, t)
        slope_ahead = (ahead - denoiser(ahead, later)) / expand(later, x).to(x.dtype)
        trapezoid = x + step * (slope + slope_ahead) / 2
        return torch.where(expand(r > 0, x), trapezoid, denoised)
