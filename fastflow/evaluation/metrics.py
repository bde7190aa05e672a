"""FID, and what it is between two halves of the real data."""

from __future__ import annotations

import dataclasses
import statistics as stats
from pathlib import Path

import torch
from torch import Tensor

from fastflow.errors import ConfigError
from fastflow.evaluation.extractors import Extractor, Features, InceptionV3, quantise
from fastflow.evaluation.frechet import frechet_distance
from fastflow.evaluation.interface import Gauge, Meter, Reading, Samples, Setting, Source
from fastflow.evaluation.reference import (
    gather_rows,
    real_features,
    reference_from_dataset,
    reference_from_file,
)
from fastflow.evaluation.spec import Metric
from fastflow.evaluation.statistics import FeatureStatistics, Moments
from fastflow.parts import Part
from fastflow.rng import fold_in

HALVES = "FID between halves of the real data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealHalves(Part):
    """The FID between two halves of the real data: what no model is needed for.

    The data is split into halves with equal shares of each class (the halves are fixed by the
    numbers here, not by the run's seed), and the distance averaged over several such splits, since
    one split of a small set says little: on the digits its standard deviation is a sixth.

    For small datasets and small extractors: the features of the whole set are kept in memory.

    Attributes:
        splits: splits into halves.
    """

    splits: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.splits < 1:
            raise ConfigError(f"RealHalves.splits: {self.splits} given, 1 or more accepted")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FID(Metric):
    """Frechet distance between features of generated and real images (arXiv 1706.08500).

    Rows: "fid", all generated samples against all of the reference. With a `baseline` also
    "fid_half": as many generated samples as half the real data, against a half, averaged over
    disjoint sets of generated samples and over the splits.

    FID grows as samples become fewer, so the two rows bracket the fair comparison with the
    baseline. "fid" rests on more samples than the baseline and is favourable to the model.
    "fid_half" rests on as many, and is slightly unfavourable: a model draws its classes at random,
    while the real halves have equal shares of each.

    Attributes:
        extractor: what the features are.
        reference: file of reference statistics, EDM's .npz (mu, sigma) or a .safetensors written
            by `fastflow.evaluation.statistics.save_moments`; None computes them from the
            experiment's dataset, unmirrored, once.
        baseline: adds the distance between halves of the real data; needs the dataset.
    """

    extractor: Features = dataclasses.field(default_factory=InceptionV3)
    reference: str | None = None
    baseline: RealHalves | None = None

    def prepare(self, setting: Setting) -> Gauge:
        if len(setting.model.shape) != 3:
            raise ConfigError(
                f"FID: samples of shape {setting.model.shape} given, images (C, H, W) accepted; "
                f"use EnergyDistance or FlowMapError for vectors"
            )
        extractor = self.extractor.build(setting.world.device)
        if self.reference is None:
            moments = reference_from_dataset(extractor, setting)
            name = f"{setting.dataset.name}, all {len(setting.dataset)}"
            digest = setting.dataset.fingerprint()
        else:
            moments, digest = reference_from_file(Path(self.reference), extractor)
            name = Path(self.reference).name
        rule = setting.evaluation.quantisation
        source = Source(
            extractor=extractor.name,
            extractor_hash=extractor.weights_hash,
            reference=name,
            reference_hash=digest,
            quantisation=f"{rule}, {extractor.quantisation}" if extractor.quantisation else rule,
        )
        halves = None
        if self.baseline is not None:
            halves = _Halves.of(extractor, setting, self.baseline.splits)
        return _FIDGauge(source, extractor, moments, halves, setting)


@dataclasses.dataclass(frozen=True)
class _Halves:
    """Statistics of halves of the real data, pair by pair, and the mean distance within pairs."""

    pairs: tuple[tuple[Moments, Moments], ...]
    size: int
    distance: float

    @classmethod
    def of(cls, extractor: Extractor, setting: Setting, splits: int) -> _Halves:
        dataset, world = setting.dataset, setting.world
        size = len(dataset)
        if size < 4:
            raise ConfigError(f"RealHalves: the data has {size} samples, at least 4 needed")
        share = list(real_features(extractor, dataset, setting.evaluation.quantisation, world))
        rows = torch.cat([torch.empty(0, dtype=torch.int64), *(r for r, _ in share)])
        empty = torch.empty(0, extractor.dim, dtype=torch.float64, device=world.device)
        features = gather_rows(
            rows, torch.cat([empty, *(f.to(empty) for _, f in share)]), size, world
        )
        labels = _labels(setting)
        pairs = []
        for number in range(splits):
            first = stratified_half(labels, number)
            pairs.append((_moments(features[first]), _moments(features[~first])))
        distance = stats.fmean(frechet_distance(a, b) for a, b in pairs)
        return cls(tuple(pairs), size // 2, distance)


def stratified_half(labels: Tensor, number: int) -> Tensor:
    """A random half with half of each class (the odd one in either half by turns), as mask [N].

    Args:
        labels: class of each sample [N]; all equal for data without classes.
        number: which of the endlessly many halves.
    """
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(fold_in(number, "halves"))
    odd = 0
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        chosen[rows[: (len(rows) + odd) // 2]] = True
        odd = (odd + len(rows)) % 2
    return chosen


def _labels(setting: Setting) -> Tensor:
    size = len(setting.dataset)
    blocks = [setting.dataset.fetch(rows)[1] for rows in torch.arange(size).split(1024)]
    known = [block for block in blocks if block is not None]
    return torch.cat(known) if known else torch.zeros(size, dtype=torch.int64)


def _moments(features: Tensor) -> Moments:
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics.moments()


@dataclasses.dataclass(frozen=True)
class _FIDGauge:
    source: Source
    extractor: Extractor
    reference: Moments
    halves: _Halves | None
    setting: Setting

    def start(self) -> Meter:
        return _FIDMeter(self)


class _FIDMeter:
    """Statistics of all samples of a block, and of each part as large as half the real data."""

    def __init__(self, gauge: _FIDGauge) -> None:
        self._gauge = gauge
        self._all = self._empty()
        samples = gauge.setting.evaluation.samples
        parts = samples // gauge.halves.size if gauge.halves else 0
        self._parts = [self._empty() for _ in range(parts)]

    def _empty(self) -> FeatureStatistics:
        return FeatureStatistics(self._gauge.extractor.dim, self._gauge.setting.world.device)

    def update(self, samples: Samples) -> None:
        images = quantise(samples.x, self._gauge.setting.evaluation.quantisation)
        features = self._gauge.extractor(images)
        self._all.update(features)
        if self._gauge.halves is None:
            return
        part = torch.tensor(samples.indices) // self._gauge.halves.size
        for number in part.unique().tolist():
            if number < len(self._parts):
                self._parts[number].update(features[(part == number).to(features.device)])

    def readings(self) -> list[Reading]:
        world, halves = self._gauge.setting.world, self._gauge.halves
        total = self._all.reduced(world).moments()
        value = frechet_distance(total, self._gauge.reference)
        samples = self._gauge.setting.evaluation.samples
        if halves is None:
            return [Reading("fid", value, samples)]
        found = [Reading("fid", value, samples, halves.distance, HALVES)]
        if self._parts:
            parts = [part.reduced(world).moments() for part in self._parts]
            matched = stats.fmean(
                frechet_distance(part, half)
                for number, part in enumerate(parts)
                for half in halves.pairs[number % len(halves.pairs)]
            )
            found.append(Reading("fid_half", matched, halves.size, halves.distance, HALVES))
        return found
