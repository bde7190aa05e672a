"""What is measured on features: FID, KID, Inception Score, precision and recall.

Where torch-fidelity has a function of features, it does the measuring.
"""

from __future__ import annotations

import dataclasses
import statistics as stats
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastflow.download import sha256_of
from fastflow.errors import ConfigError, warn
from fastflow.evaluation.extractors import Extractor, Features, InceptionV3
from fastflow.evaluation.features import FeatureMetric, Generated, Measure, Wanted, source_of
from fastflow.evaluation.frechet import frechet_distance
from fastflow.evaluation.interface import Reading, Setting, Source
from fastflow.evaluation.reference import (
    real_features,
    reference_from_dataset,
    reference_from_file,
)
from fastflow.evaluation.statistics import FeatureStatistics, Moments
from fastflow.parts import Part
from fastflow.rng import fold_in
from fastflow.torchvision_shim import import_beside_torchvision

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
class FID(FeatureMetric):
    """Frechet distance between features of generated and real images (arXiv 1706.08500).

    Rows: "fid" (with `DINOv2()` features "fd_dinov2"), all generated samples against all of the
    reference. With a `baseline` also "fid_half": as many generated samples as half the real data,
    against a half, averaged over disjoint sets of generated samples and over the splits.

    FID grows as samples become fewer, so the two rows bracket the fair comparison with the
    baseline. "fid" rests on more samples than the baseline and is favourable to the model.
    "fid_half" rests on as many, and is slightly unfavourable: a model draws its classes at random,
    while the real halves have equal shares of each.

    Attributes:
        extractor: what the features are.
        reference: file of reference statistics, EDM's .npz (mu, sigma) or a .safetensors written
            by `fastflow evaluate --reference`; None computes them from the experiment's dataset,
            unmirrored, once.
        baseline: adds the distance between halves of the real data; needs the dataset.
    """

    extractor: Features = dataclasses.field(default_factory=InceptionV3)
    reference: str | None = None
    baseline: RealHalves | None = None

    @property
    def keeps(self) -> frozenset[Wanted]:
        return frozenset() if self.baseline is None else frozenset({"features"})

    def against(self, extractor: Extractor, real: Tensor, setting: Setting) -> Measure:
        dataset, world = setting.dataset, setting.world
        if self.reference is None:
            reference = reference_from_dataset(extractor, setting)
            name, digest = f"{dataset.name}, all {len(dataset)}", dataset.fingerprint()
        else:
            path = Path(self.reference).expanduser()
            reference, name = reference_from_file(path, extractor, setting)
            digest = sha256_of(path)
        if setting.evaluation.samples <= extractor.dim and world.is_main:
            warn(
                f"{extractor.frechet}: {setting.evaluation.samples} samples are no more than the "
                f"{extractor.dim} features, so their covariance is singular and the distance "
                f"tells more of their number than of the model"
            )
        source = source_of(extractor, setting, name, digest)
        halves = None
        if self.baseline is not None:
            halves = _Halves.of(extractor, setting, self.baseline.splits)

        def measure(generated: Generated) -> list[Reading]:
            fid = Reading(
                metric=extractor.frechet,
                value=frechet_distance(generated.moments, reference),
                samples=generated.count,
                source=source,
            )
            if halves is None:
                return [fid]
            fid = dataclasses.replace(fid, baseline=halves.distance, baseline_name=HALVES)
            matched = halves.matched(generated.features)
            if matched is None:
                return [fid]
            half = dataclasses.replace(
                fid, metric=f"{fid.metric}_half", value=matched, samples=halves.size
            )
            return [fid, half]

        return measure


@dataclasses.dataclass(frozen=True, kw_only=True)
class KID(FeatureMetric):
    """Squared maximum mean discrepancy of features, kernel (x.y / dim + 1)^3 (arXiv 1801.01401).

    Row: "kid", the mean over subsets, with their standard deviation as `spread`; by torch-fidelity.
    The estimate is unbiased, hence around 0 and sometimes below for a perfect model.

    Attributes:
        extractor: what the features are.
        subsets: random subsets, always the same ones.
        subset_size: samples of each, generated and real.
        real: most real images to draw subsets from; the features of all are kept in memory.
    """

    extractor: Features = dataclasses.field(default_factory=InceptionV3)
    subsets: int = 100
    subset_size: int = 1000
    real: int = 50_000

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(1, self.subsets, "KID.subsets")
        _at_least(2, self.subset_size, "KID.subset_size")
        _at_least(self.subset_size, self.real, "KID.real")

    @property
    def keeps(self) -> frozenset[Wanted]:
        return frozenset({"features"})

    @property
    def real_samples(self) -> int:
        return self.real

    def against(self, extractor: Extractor, real: Tensor, setting: Setting) -> Measure:
        real = real[: self.real]
        _require_samples("KID", self.subset_size, "subset_size", real, setting)
        source = _source_of_drawn(extractor, real, setting)
        of_features = _fidelity("kid", "kid_features_to_metric")

        def measure(generated: Generated) -> list[Reading]:
            found = of_features(
                generated.features,
                real,
                kid_subsets=self.subsets,
                kid_subset_size=self.subset_size,
                verbose=False,
            )
            return [
                Reading(
                    metric="kid",
                    value=found["kernel_inception_distance_mean"],
                    spread=found["kernel_inception_distance_std"],
                    samples=generated.count,
                    source=source,
                )
            ]

        return measure


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionScore(FeatureMetric):
    """exp of the mean divergence of p(class | image) from p(class) (arXiv 1606.03498).

    Row: "inception_score", higher is better, the mean over splits of the samples, with their
    standard deviation as `spread`; by torch-fidelity.

    Attributes:
        extractor: where the class probabilities come from.
        splits: parts that the samples are divided into, at random, always in the same way.
    """

    extractor: Features = dataclasses.field(default_factory=InceptionV3)
    splits: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(1, self.splits, "InceptionScore.splits")

    @property
    def keeps(self) -> frozenset[Wanted]:
        return frozenset({"logits"})

    def against(self, extractor: Extractor, real: Tensor, setting: Setting) -> Measure:
        if extractor.classes == 0:
            raise ConfigError(
                f"InceptionScore: {extractor.name} has no classes; accepted: InceptionV3 or "
                f"DigitFeatures"
            )
        if setting.evaluation.samples < self.splits:
            raise ConfigError(
                f"InceptionScore: evaluation.samples={setting.evaluation.samples} given, "
                f"{self.splits} or more needed, one for each of splits={self.splits}"
            )
        source = source_of(extractor, setting)
        of_logits = _fidelity("isc", "isc_features_to_metric")

        def measure(generated: Generated) -> list[Reading]:
            found = of_logits(generated.logits, splits=self.splits)
            return [
                Reading(
                    metric="inception_score",
                    value=found["inception_score_mean"],
                    spread=found["inception_score_std"],
                    better="higher",
                    samples=generated.count,
                    source=source,
                )
            ]

        return measure


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionRecall(FeatureMetric):
    """Shares of images near the other set: generated near real, and real near generated.

    Rows: "precision" and "recall" (arXiv 1904.06991), higher is better; by torch-fidelity. Near is
    an image within the distance from one of the other set to its k-th neighbour there. The paper
    has features of `VGG16()`, ADM's evaluator and the figures compared with it those of
    `InceptionV3()`, and 10,000 real images.

    Attributes:
        extractor: what the features are.
        neighbours: k.
        real: most real images to compare with; both values change with this number.
    """

    extractor: Features = dataclasses.field(default_factory=InceptionV3)
    neighbours: int = 3
    real: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(1, self.neighbours, "PrecisionRecall.neighbours")
        _at_least(self.neighbours + 1, self.real, "PrecisionRecall.real")

    @property
    def keeps(self) -> frozenset[Wanted]:
        return frozenset({"features"})

    @property
    def real_samples(self) -> int:
        return self.real

    def against(self, extractor: Extractor, real: Tensor, setting: Setting) -> Measure:
        real = real[: self.real]
        _require_samples("PrecisionRecall", self.neighbours + 1, "neighbours", real, setting)
        source = _source_of_drawn(extractor, real, setting)
        of_features = _fidelity("prc", "prc_features_to_metric")
        device = setting.world.device

        def measure(generated: Generated) -> list[Reading]:
            found = of_features(
                generated.features.to(device),
                real.to(device),
                prc_neighborhood=self.neighbours,
                save_cpu_ram=True,  # distances of 10,000 images at a time
                verbose=False,
            )
            return [
                Reading(
                    metric=name,
                    value=found[name],
                    better="higher",
                    samples=generated.count,
                    source=source,
                )
                for name in ("precision", "recall")
            ]

        return measure


def _fidelity(module: str, function: str) -> Any:
    """A function of torch-fidelity that takes features."""
    name = f"torch_fidelity.metric_{module}"
    return getattr(import_beside_torchvision(name, module.upper(), "eval"), function)


def _require_samples(what: str, needed: int, key: str, real: Tensor, setting: Setting) -> None:
    for count, given in (
        (setting.evaluation.samples, f"evaluation.samples={setting.evaluation.samples}"),
        (len(real), f"{len(real)} images of {setting.dataset.name}"),
    ):
        if count < needed:
            raise ConfigError(
                f"{what}: {given} given, {needed} or more needed; make more, or lower {what}.{key}"
            )


def _source_of_drawn(extractor: Extractor, real: Tensor, setting: Setting) -> Source:
    dataset = setting.dataset
    all_of = "all" if len(real) == len(dataset) else f"{len(real)} of"
    name = f"{dataset.name}, {all_of} {len(dataset)}"
    return source_of(extractor, setting, name, dataset.fingerprint())


def _at_least(least: int, value: int, key: str) -> None:
    if value < least:
        raise ConfigError(f"{key}: {value} given, {least} or more accepted")


@dataclasses.dataclass(frozen=True)
class _Halves:
    """Statistics of halves of the real data, pair by pair, and the mean distance within pairs."""

    pairs: tuple[tuple[Moments, Moments], ...]
    size: int
    distance: float

    @classmethod
    def of(cls, extractor: Extractor, setting: Setting, splits: int) -> _Halves:
        size = len(setting.dataset)
        if size < 4:
            raise ConfigError(f"RealHalves: the data has {size} samples, at least 4 needed")
        features = real_features(extractor, setting, torch.arange(size))
        labels = _labels(setting)
        pairs = []
        for number in range(splits):
            first = stratified_half(labels, number)
            pairs.append((_moments(features[first]), _moments(features[~first])))
        distance = stats.fmean(frechet_distance(a, b) for a, b in pairs)
        return cls(tuple(pairs), size // 2, distance)

    def matched(self, features: Tensor) -> float | None:
        """Mean distance of parts [size, dim] of these features from halves; None for no part."""
        parts = [part for part in features.split(self.size) if len(part) == self.size]
        distances = [
            frechet_distance(_moments(part), half)
            for number, part in enumerate(parts)
            for half in self.pairs[number % len(self.pairs)]
        ]
        return stats.fmean(distances) if distances else None


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
