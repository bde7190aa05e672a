"""What metrics on features share: samples go through each extractor once, whoever asks."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fastflow.errors import ConfigError, one_of
from fastflow.evaluation.extractors import Extractor, Features, quantise
from fastflow.evaluation.interface import Gauge, Meter, Reading, Samples, Setting, Source
from fastflow.evaluation.reference import drawn, real_features
from fastflow.evaluation.spec import Metric
from fastflow.evaluation.statistics import FeatureStatistics, Moments, RowTable

Wanted: TypeAlias = Literal["features", "logits"]


@dataclasses.dataclass(frozen=True)
class Generated:
    """What an extractor made of all generated samples of a block.

    Attributes:
        count: number of samples.
        moments: mean and covariance of the features.
        features: [count, dim] in the order of the samples' indices, on the CPU; [0, dim] where no
            metric keeps them.
        logits: [count, classes] likewise.
    """

    count: int
    moments: Moments
    features: Tensor
    logits: Tensor


Measure: TypeAlias = Callable[[Generated], list[Reading]]
"""Measures one block; called on the main process alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureMetric(Metric, abc.ABC):
    """A metric that sees images through a feature extractor.

    Those of one evaluation with equal extractors share its features.

    Attributes:
        extractor: what the features are.
    """

    extractor: Features

    @property
    @abc.abstractmethod
    def keeps(self) -> frozenset[Wanted]:
        """What of the generated samples it needs beside the moments of their features."""

    @property
    def real_samples(self) -> int:
        """How many real images it needs the features of, drawn at random from the dataset."""
        return 0

    @abc.abstractmethod
    def against(self, extractor: Extractor, real: Tensor, setting: Setting) -> Measure:
        """Compare with what is real; every process must call it, before samples are made.

        Args:
            extractor: as described by `self.extractor`.
            real: features [n, dim] of real images in random order, on the CPU; `real_samples` of
                them or more, unless the dataset is smaller.
            setting: what is measured.

        Raises:
            DataError: the reference is missing or of something else.
            ConfigError: too few samples, or a model or extractor that it cannot be measured on.
        """

    def prepare(self, setting: Setting) -> Gauge:
        return _FeatureGauge.of([self], setting)


def prepared(metrics: Sequence[Metric], setting: Setting) -> list[Gauge]:
    """All metrics ready to measure, those on features of one extractor in one gauge."""
    gauges: list[Gauge] = []
    groups: dict[Features, list[FeatureMetric]] = {}
    for metric in metrics:
        if isinstance(metric, FeatureMetric):
            groups.setdefault(metric.extractor, []).append(metric)
        else:
            gauges.append(metric.prepare(setting))
    return gauges + [_FeatureGauge.of(group, setting) for group in groups.values()]


def features_of(metrics: Sequence[Metric], name: str | None) -> Features:
    """The extractor of some metrics whose class has this name; None takes the first.

    Raises:
        ConfigError: there is none.
    """
    found = {
        type(metric.extractor).__name__: metric.extractor
        for metric in metrics
        if isinstance(metric, FeatureMetric)
    }
    if not found:
        raise ConfigError("evaluation.metrics: none is measured on features; add one, e.g. FID()")
    chosen = next(iter(found)) if name is None else name
    if chosen not in found:
        raise ConfigError(f"extractor: {name!r} given, {one_of(name, found)}")
    return found[chosen]


@dataclasses.dataclass(frozen=True)
class _FeatureGauge:
    extractor: Extractor
    keeps: frozenset[Wanted]
    measures: tuple[Measure, ...]
    setting: Setting

    @classmethod
    def of(cls, metrics: Sequence[FeatureMetric], setting: Setting) -> _FeatureGauge:
        """Metrics of one extractor."""
        shape = setting.model.shape
        if len(shape) != 3:
            raise ConfigError(
                f"{type(metrics[0]).__name__}: samples of shape {shape} given, images (C, H, W) "
                f"accepted; use EnergyDistance or FlowMapError for vectors"
            )
        extractor = metrics[0].extractor.build(setting.world.device)
        extractor.require(shape)
        count = max(metric.real_samples for metric in metrics)
        real = real_features(extractor, setting, drawn(len(setting.dataset), count))
        return cls(
            extractor,
            frozenset[Wanted]().union(*(metric.keeps for metric in metrics)),
            tuple(metric.against(extractor, real, setting) for metric in metrics),
            setting,
        )

    def start(self) -> Meter:
        return _FeatureMeter(self)


class _FeatureMeter:
    def __init__(self, gauge: _FeatureGauge) -> None:
        self._gauge = gauge
        extractor, world = gauge.extractor, gauge.setting.world
        self._count = gauge.setting.evaluation.samples
        self._statistics = FeatureStatistics(extractor.dim, world.device)

        def table(wanted: Wanted, width: int) -> RowTable:
            rows = self._count if wanted in gauge.keeps else 0
            return RowTable(rows, (width,), extractor.dtype, world)

        self._features = table("features", extractor.dim)
        self._logits = table("logits", extractor.classes)

    def update(self, samples: Samples) -> None:
        keeps, rule = self._gauge.keeps, self._gauge.setting.evaluation.quantisation
        features, logits = self._gauge.extractor(quantise(samples.x, rule))
        places = torch.tensor(samples.indices, dtype=torch.int64)
        self._statistics.update(features)
        if "features" in keeps:
            self._features.put(places, features)
        if "logits" in keeps and logits is not None:
            self._logits.put(places, logits)

    def readings(self) -> list[Reading]:
        world = self._gauge.setting.world
        statistics = self._statistics.reduced(world)
        features, logits = self._features.whole(), self._logits.whole()

        def measured() -> list[Reading]:
            moments = statistics.moments()
            generated = Generated(self._count, moments, features, logits)
            return [reading for measure in self._gauge.measures for reading in measure(generated)]

        return world.on_main(measured)


def source_of(
    extractor: Extractor, setting: Setting, reference: str = "", reference_hash: str = ""
) -> Source:
    """What a value was measured with, for the record."""
    rule = setting.evaluation.quantisation
    return Source(
        extractor=extractor.name,
        extractor_hash=extractor.weights_hash,
        reference=reference,
        reference_hash=reference_hash,
        quantisation=", ".join(filter(None, (rule, extractor.quantisation))),
    )
