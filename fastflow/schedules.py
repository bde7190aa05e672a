"""Curricula, decays of target networks, gaps r(t) and learning-rate laws: pure functions.

Whatever depends on how far training has come is a callable of a `Progress` and keeps no state, so
a resumed run needs nothing restored. Curricula are evaluated by a driver callback, which writes
their values where methods (and decays) read them: `now["ratio"]`.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastflow.errors import ConfigError
from fastflow.parts import Part
from fastflow.progress import Progress


def _require(part: Part, ok: bool, accepted: str, **given: float) -> None:
    if ok:
        return
    kind = type(part).__name__
    if len(given) == 1:
        [(name, value)] = given.items()
        raise ConfigError(f"{kind}.{name}: {value} given; {accepted} accepted")
    values = ", ".join(f"{name}={value}" for name, value in given.items())
    raise ConfigError(f"{kind}: {values} given; {accepted} accepted")


def _ramp(done: float, length: float) -> float:
    """From 0 to 1 over `length`; 1 at once where `length` is 0."""
    return min(done / length, 1.0) if length > 0 else 1.0


class Curriculum(Part, abc.ABC):
    """Values that a driver callback provides to methods at each step.

    Attributes:
        provides: their names.
    """

    provides: ClassVar[frozenset[str]]

    @abc.abstractmethod
    def __call__(self, now: Progress) -> dict[str, float]:
        """Each provided value at this moment."""


@dataclass(frozen=True, kw_only=True)
class RatioStages(Curriculum):
    """How near r lies to t: ratio = min(1 - q^-(stage+1), limit) (ECT, arXiv 2406.14548).

    ECT's code has no limit and moves on by `double` ticks. FastGen's CTScheduleCallback and TCM
    stop at a limit (0.999; 0.9961 on ImageNet-64) and count images.

    Attributes:
        q: base of the shrinking gap; above 1.
        kimg_per_stage: thousands of images per stage.
        limit: the largest ratio.
        offset_images: images seen in an earlier run (TCM's second stage goes on from the first).
    """

    provides: ClassVar[frozenset[str]] = frozenset({"stage", "ratio"})

    q: float
    kimg_per_stage: float
    limit: float = 1.0
    offset_images: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, self.q > 1, "q > 1", q=self.q)
        _require(
            self, self.kimg_per_stage > 0, "a value above 0", kimg_per_stage=self.kimg_per_stage
        )
        _require(self, 0 < self.limit <= 1, "0 < limit <= 1", limit=self.limit)
        _require(self, self.offset_images >= 0, "0 or more", offset_images=self.offset_images)

    def __call__(self, now: Progress) -> dict[str, float]:
        stage = (now.images + self.offset_images) // (self.kimg_per_stage * 1000)
        # A negative exponent underflows to 0 in late stages, where q^(stage+1) would overflow.
        return {"stage": stage, "ratio": min(1 - self.q ** -(stage + 1), self.limit)}


@dataclass(frozen=True, kw_only=True)
class SqrtDiscretization(Curriculum):
    """N(k) = ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1) + 1 grid points.

    Source: arXiv 2303.01469, appendix C; K is the number of steps of the run.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"N"})

    s0: int = 2
    s1: int = 150

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, 1 <= self.s0 <= self.s1, "1 <= s0 <= s1", s0=self.s0, s1=self.s1)

    def __call__(self, now: Progress) -> dict[str, float]:
        grown = now.step / now.total_steps * ((self.s1 + 1) ** 2 - self.s0**2)
        scales = math.ceil(math.sqrt(grown + self.s0**2) - 1)
        return {"N": float(max(scales, 1) + 1)}


@dataclass(frozen=True, kw_only=True)
class DoublingDiscretization(Curriculum):
    """N(k) = min(s0 2^floor(k/K'), s1) + 1 with K' = floor(K / (log2 floor(s1/s0) + 1)).

    Source: iCT, arXiv 2310.14189, section 3.4.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"N"})

    s0: int = 10
    s1: int = 1280

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, 1 <= self.s0 <= self.s1, "1 <= s0 <= s1", s0=self.s0, s1=self.s1)

    def __call__(self, now: Progress) -> dict[str, float]:
        period = math.floor(now.total_steps / (math.log2(self.s1 // self.s0) + 1))
        doublings = now.step // max(period, 1)
        # Past s1 / s0 doublings nothing changes; the bound keeps the power small.
        scales = self.s0 * 2 ** min(doublings, (self.s1 // self.s0).bit_length())
        return {"N": float(min(scales, self.s1) + 1)}


@dataclass(frozen=True, kw_only=True)
class FixedDiscretization(Curriculum):
    """N grid points throughout, as in distillation (N = 18 on CIFAR-10, 40 on ImageNet-64)."""

    provides: ClassVar[frozenset[str]] = frozenset({"N"})

    n: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, self.n >= 2, "n >= 2", n=self.n)

    def __call__(self, now: Progress) -> dict[str, float]:
        return {"N": float(self.n)}


class Decay(Part, abc.ABC):
    """Decay mu of a target network: after each step, target <- mu target + (1 - mu) student.

    Attributes:
        needs: names of the curriculum values it reads.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def __call__(self, now: Progress) -> float:
        """mu at this moment, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class FixedDecay(Decay):
    """The same mu throughout; 0 makes the target a copy of the student."""

    mu: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, 0 <= self.mu <= 1, "0 <= mu <= 1", mu=self.mu)

    def __call__(self, now: Progress) -> float:
        return self.mu


@dataclass(frozen=True, kw_only=True)
class AdaptiveDecay(Decay):
    """mu = exp(s0 ln(mu0) / (N - 1)), N the current number of grid points.

    The official code divides by the number of intervals N - 1, so mu = mu0^s0 at the start of a
    run with N = 2; the paper's formula (arXiv 2303.01469, appendix C) has N in its place.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"N"})

    mu0: float = 0.9
    s0: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, 0 < self.mu0 < 1, "0 < mu0 < 1", mu0=self.mu0)
        _require(self, self.s0 >= 1, "s0 >= 1", s0=self.s0)

    def __call__(self, now: Progress) -> float:
        return math.exp(self.s0 * math.log(self.mu0) / (now["N"] - 1))


class Gap(Part, abc.ABC):
    """r(t): the less noisy time of a pair, from t and the curriculum's ratio."""

    @abc.abstractmethod
    def __call__(self, t: Tensor, ratio: float) -> Tensor:
        """Times r [B] with 0 <= r <= t, in the type of t (float64 recommended)."""


@dataclass(frozen=True, kw_only=True)
class ConstantRatio(Gap):
    """r = ratio t (ECT's `const`)."""

    def __call__(self, t: Tensor, ratio: float) -> Tensor:
        return t * ratio


@dataclass(frozen=True, kw_only=True)
class SigmoidRatio(Gap):
    """r = t (1 - (1 - ratio) (1 + k sigmoid(-b t))), not below r_min (arXiv 2406.14548).

    Attributes:
        k: how much the gap widens towards t = 0.
        b: how fast that fades with t.
        r_min: the floor. 0 is ECT's code: rows with r = 0 learn to denoise. FastGen has 0.002.
            Where t itself lies below the floor, r = t.
    """

    k: float = 8.0
    b: float = 1.0
    r_min: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, self.k >= 0 and self.b >= 0, "values of 0 or more", k=self.k, b=self.b)
        _require(self, self.r_min >= 0, "0 or more", r_min=self.r_min)

    def __call__(self, t: Tensor, ratio: float) -> Tensor:
        r = t * (1 - (1 - ratio) * (1 + self.k * torch.sigmoid(-self.b * t)))
        return torch.minimum(r.clamp_min(self.r_min), t)


class LearningRate(Part, abc.ABC):
    """A factor on the optimizer's learning rate."""

    @abc.abstractmethod
    def __call__(self, now: Progress) -> float:
        """The factor at this moment, 0 or more."""


@dataclass(frozen=True, kw_only=True)
class ConstantLR(LearningRate):
    """The learning rate as it is."""

    def __call__(self, now: Progress) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class InverseSqrtLR(LearningRate):
    """1 / sqrt(max(batches / ref_batches, 1)): EDM2 (arXiv 2312.02696, eq. 67), FastGen."""

    ref_batches: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, self.ref_batches > 0, "a value above 0", ref_batches=self.ref_batches)

    def __call__(self, now: Progress) -> float:
        return 1 / math.sqrt(max(now.images / (self.ref_batches * now.batch_size), 1.0))


@dataclass(frozen=True, kw_only=True)
class CosineLR(LearningRate):
    """Half a cosine over the run, from 1 to `final`."""

    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, 0 <= self.final <= 1, "0 <= final <= 1", final=self.final)

    def __call__(self, now: Progress) -> float:
        wave = (1 + math.cos(math.pi * _ramp(now.step, now.total_steps))) / 2
        return self.final + (1 - self.final) * wave


@dataclass(frozen=True, kw_only=True)
class LinearWarmup(LearningRate):
    """Another law times a ramp from 0 over the first images (EDM: 10 million).

    Attributes:
        images: training images until the factor is that of `law`; 0 leaves the warm-up out.
        law: what is warmed up.
    """

    images: int
    law: LearningRate = ConstantLR()

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, self.images >= 0, "0 or more", images=self.images)

    def __call__(self, now: Progress) -> float:
        return _ramp(now.images, self.images) * self.law(now)


@dataclass(frozen=True, kw_only=True)
class LinearRamp(Part):
    """From 0 to 1 over the first steps, for tangent warm-up (sCM, arXiv 2410.11081).

    Attributes:
        steps: length of the ramp; with 0 the value is 1 from the start.
    """

    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, self.steps >= 0, "0 or more", steps=self.steps)

    def __call__(self, now: Progress) -> float:
        return _ramp(now.step, self.steps)
