"""What evaluation asks of a model and a dataset, and what a metric hands back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastflow.data.dataset import Dataset
    from fastflow.distributed import World
    from fastflow.evaluation.spec import Evaluation
    from fastflow.experiment import Experiment
    from fastflow.method import FlowMapMethod

Better: TypeAlias = Literal["lower", "higher"]
"""Which of two values of a metric is the better one."""


class Sampler(Protocol):
    """A trained model as far as evaluation is concerned."""

    @property
    def method(self) -> FlowMapMethod: ...
    @property
    def experiment(self) -> Experiment: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def cond_dim(self) -> int: ...
    @property
    def weights_name(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def step(self) -> int: ...
    @property
    def images(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def hardware(self) -> str: ...
    def times(self, steps: int, between: Sequence[float] | None = None) -> tuple[float, ...]:
        """All start times of a sampler, from the intermediate ones; None takes the default."""

    def sample(
        self,
        seeds: Sequence[int],
        steps: int = 1,
        times: Sequence[float] | None = None,
        cond: Tensor | None = None,
    ) -> Tensor:
        """Samples [n, *shape], float32, not clamped; `times` are the intermediate ones."""

    def jump(self, x: Tensor, t: float, s: float, cond: Tensor | None = None) -> Tensor:
        """The flow map from states [n, *shape] at time t to time s, float64."""

    def nfe(self, steps: int) -> int:
        """Network evaluations of a sampler of `steps` steps."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a metric is prepared with.

    Attributes:
        model: what is measured.
        evaluation: how many samples, which seeds, which quantisation.
        dataset: the real data.
        world: the processes; every one of them prepares and measures.
        cache: folder where statistics of real data are kept between evaluations.
    """

    model: Sampler
    evaluation: Evaluation
    dataset: Dataset
    world: World
    cache: Path


@dataclasses.dataclass(frozen=True)
class Samples:
    """Generated samples on their way to the metrics.

    Attributes:
        x: [n, *shape], float32, not clamped.
        indices: their places within the block, 0 .. samples - 1.
        seeds: their seeds.
        labels: their classes [n], on the CPU; None for an unconditional model.
        times: all start times of the sampler.
    """

    x: Tensor
    indices: range
    seeds: range
    labels: Tensor | None
    times: tuple[float, ...]

    def first(self, count: int) -> Samples:
        """Those of the first `count` samples of the block."""
        kept = max(0, min(self.indices.stop, count) - self.indices.start)
        return Samples(
            x=self.x[:kept],
            indices=self.indices[:kept],
            seeds=self.seeds[:kept],
            labels=None if self.labels is None else self.labels[:kept],
            times=self.times,
        )


@dataclasses.dataclass(frozen=True)
class Source:
    """What a value was measured with; "" where there is no such thing.

    Attributes:
        extractor: name of the feature extractor.
        extractor_hash: SHA-256 of its weights.
        reference: what the samples were compared with.
        reference_hash: SHA-256 of the statistics file, or the fingerprint of the dataset.
        quantisation: how images were made discrete before the extractor.
    """

    extractor: str = ""
    extractor_hash: str = ""
    reference: str = ""
    reference_hash: str = ""
    quantisation: str = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """One measured value of one block.

    Attributes:
        metric: its name.
        value: what was measured.
        samples: generated samples it rests on.
        source: what it was measured with.
        better: whether lower or higher values are better.
        spread: standard deviation that the metric itself gives, of the parts it averages over
            (subsets of a KID, splits of an Inception Score), or None.
        baseline: the same measurement where no model is involved, or None.
        baseline_name: what the baseline is.
    """

    metric: str
    value: float
    samples: int
    source: Source
    better: Better = "lower"
    spread: float | None = None
    baseline: float | None = None
    baseline_name: str = ""


class Meter(Protocol):
    """A measurement of one block in progress; each process feeds it its own samples."""

    def update(self, samples: Samples) -> None:
        """Take in some samples of this process."""

    def readings(self) -> list[Reading]:
        """The values over all processes; every process must call it."""


class Gauge(Protocol):
    """One or several metrics ready to measure."""

    def start(self) -> Meter:
        """A fresh measurement, for one block of samples."""
