"""How a result is measured, and what is expected of it: the values a configuration carries."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

from fastflow.errors import ConfigError
from fastflow.parts import Part

if TYPE_CHECKING:
    from fastflow.evaluation.interface import Gauge, Setting

Quantisation: TypeAlias = Literal["truncate", "floor", "none"]
Labels: TypeAlias = Literal["random", "balanced"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected(Part):
    """A figure from the literature that this configuration should reach.

    Attributes:
        metric: name of the measured value, as in a result row ("fid").
        steps: steps of the sampler it was reported for.
        value: the figure.
        source: who reported it: paper, table, repository.
        note: what differs from this configuration, in few words.
        samples: generated samples it was measured with. FID is biased in this number, so a FID
            measured with another number is shown but never compared.
    """

    metric: str = "fid"
    steps: int
    value: float
    source: str
    note: str = ""
    samples: int = 50_000

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self.steps, 1, "Expected.steps")
        _at_least(self.samples, 2, "Expected.samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric(Part, abc.ABC):
    """Something to measure on generated samples; all metrics see the same samples."""

    @abc.abstractmethod
    def prepare(self, setting: Setting) -> Gauge:
        """Load what the measurement needs (extractor, reference), once per evaluation.

        Raises:
            DataError: weights or reference statistics are missing or unreadable.
            ConfigError: the metric cannot be measured on this model or dataset.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Part):
    """What is measured at the end of training and by `fastflow evaluate`.

    Attributes:
        metrics: what is measured, on the same samples.
        samples: generated samples per block and number of steps.
        steps: numbers of sampler steps; each gives rows of its own.
        times: intermediate times for a number of steps, decreasing, in the method's own time;
            where absent, `fastflow.generate.default_times` takes a Karras grid.
        seed: seed of the first sample; sample i of block k has the seed
            `seed + k * samples + i`.
        blocks: disjoint seed blocks; a row reports their mean, standard deviation and minimum.
        batch_size: samples generated at once. It changes results by float rounding only.
        labels: classes of a conditional model: "random" draws them uniformly, each by its seed, as
            published figures do; "balanced" has each equally often, which makes FIDs smaller.
        quantisation: how generated images become uint8 before a feature extractor sees them:
            "truncate" is clip(127.5 x + 128, 0, 255) rounded down (EDM, EDM2, arXiv 2206.00364),
            "floor" is clip(127.5 x + 127.5, 0, 255) rounded down (ADM, OpenAI's consistency
            models, py-meanflow), "none" keeps floats. Real images become their nearest bytes:
            those they were stored as.
    """

    metrics: tuple[Metric, ...]
    samples: int = 50_000
    steps: tuple[int, ...] = (1, 2, 4, 8)
    times: Mapping[int, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    seed: int = 0
    blocks: int = 1
    batch_size: int = 256
    labels: Labels = "random"
    quantisation: Quantisation = "truncate"

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self.samples, 2, "evaluation.samples")
        _at_least(self.blocks, 1, "evaluation.blocks")
        _at_least(self.batch_size, 1, "evaluation.batch_size")
        _at_least(self.seed, 0, "evaluation.seed")
        if not self.steps or min(self.steps) < 1 or len(set(self.steps)) < len(self.steps):
            raise ConfigError(
                f"evaluation.steps: {self.steps} given; accepted: different numbers from 1 up, "
                f"at least one"
            )
        for steps, times in self.times.items():
            falling = all(a > b for a, b in zip(times, times[1:], strict=False))
            if len(times) != steps - 1 or not falling:
                raise ConfigError(
                    f"evaluation.times.{steps}: {times} given; accepted for {steps} steps: "
                    f"{steps - 1} decreasing times"
                )


def _at_least(value: int, low: int, key: str) -> None:
    if value < low:
        raise ConfigError(f"{key}: {value} given, {low} or more accepted")
