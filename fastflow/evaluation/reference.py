"""Statistics and features of real data, the other side of every comparison."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow import __version__
from fastflow.data.dataset import Dataset
from fastflow.download import sha256_of
from fastflow.errors import DataError
from fastflow.evaluation.extractors import Extractor, quantise
from fastflow.evaluation.interface import Setting
from fastflow.evaluation.spec import Quantisation
from fastflow.evaluation.statistics import (
    FeatureStatistics,
    Moments,
    RowTable,
    load_moments,
    save_moments,
)
from fastflow.rng import fold_in

if TYPE_CHECKING:
    from fastflow.distributed import World


_BATCH = 256


def reference_from_file(path: Path, extractor: Extractor, setting: Setting) -> tuple[Moments, str]:
    """Statistics of a file that fit an evaluation, and what a row calls them.

    An .npz of EDM says nothing of its origin, so only the number of features can be checked, and
    the row says so.

    Raises:
        DataError: missing, unreadable, or statistics of another extractor, resolution, dataset or
            quantisation.
    """
    moments = setting.world.on_main(lambda: load_moments(path))
    if moments.dim != extractor.dim:
        raise DataError(
            f"reference statistics: {path} is of {moments.dim} features, but {extractor.name} has "
            f"{extractor.dim}"
        )
    rule = setting.evaluation.quantisation
    asked = {
        **provenance(extractor, setting.dataset, rule),
        "shape": _shape(setting.model.shape),
    }
    _require_match(path, moments.info, asked)
    if not moments.info.keys() >= _CHECKED.keys():
        return moments, f"{path.name} (provenance unknown)"
    return moments, f"{path.name} ({moments.info['dataset']}, all {moments.count})"


def reference_from_dataset(extractor: Extractor, setting: Setting) -> Moments:
    """Statistics of the whole dataset, kept in the cache folder; every process must call it."""
    dataset, rule, world = setting.dataset, setting.evaluation.quantisation, setting.world
    facts = provenance(extractor, dataset, rule)
    key = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:20]
    cached = setting.cache / f"{key}.safetensors"
    # The main process decides for all: a file may appear between two looks at it.
    known = world.on_main(lambda: load_moments(cached) if cached.is_file() else None)
    if known is not None:
        return known
    moments = dataset_moments(extractor, dataset, rule, world)
    world.on_main(lambda: save_moments(moments, cached))
    return moments


def dataset_moments(
    extractor: Extractor,
    dataset: Dataset,
    rule: Quantisation,
    world: World,
    progress: Callable[[int], None] | None = None,
) -> Moments:
    """Statistics of a dataset by EDM's convention: every image once, as stored, never mirrored.

    Every process must call it.

    Args:
        extractor: what the features are.
        dataset: all of it is used.
        rule: of the evaluation; but for "none", images are taken as the bytes they were stored as.
        world: the processes.
        progress: told the number of images done, on every process.

    Raises:
        DataError: images that the extractor cannot take or that cannot be read, or a NaN in one.
    """
    extractor.require(dataset.shape)
    statistics = FeatureStatistics(extractor.dim, world.device)
    rows = torch.arange(len(dataset))
    done = 0
    for _, features in _extracted(extractor, dataset, rule, world, rows):
        statistics.update(features)
        done = min(len(dataset), done + _BATCH * world.size)
        if progress is not None:
            progress(done)
    info = {**provenance(extractor, dataset, rule), "made_by": f"fastflow {__version__}"}
    return statistics.reduced(world).moments(info)


def real_features(extractor: Extractor, setting: Setting, rows: Tensor) -> Tensor:
    """Features [N, dim] of these rows of the dataset, on the CPU; every process must call it.

    Raises:
        DataError: as `dataset_moments`.
    """
    dataset, world = setting.dataset, setting.world
    extractor.require(dataset.shape)
    table = RowTable(len(rows), (extractor.dim,), extractor.dtype, world)
    rule = setting.evaluation.quantisation
    for places, features in _extracted(extractor, dataset, rule, world, rows):
        table.put(places, features)
    return table.whole()


def drawn(size: int, count: int) -> Tensor:
    """`count` different rows of a dataset in random order, or all; always the same ones.

    The first n of more rows are those of n.
    """
    generator = torch.Generator().manual_seed(fold_in(0, "drawn from the real data"))
    return torch.randperm(size, generator=generator)[:count]


def provenance(extractor: Extractor, dataset: Dataset, rule: Quantisation) -> dict[str, str]:
    """What statistics of a whole dataset are statistics of."""
    return {
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint(),
        "shape": _shape(dataset.shape),
        "images": "all, as stored, not mirrored",
        "quantisation": "none" if rule == "none" else "uint8",
        "extractor": ", ".join(filter(None, (extractor.name, extractor.quantisation))),
        "extractor_hash": extractor.weights_hash,
    }


_CHECKED = {
    "extractor": "features of {}",
    "extractor_hash": "features by weights of SHA-256 {}",
    "shape": "images of {}",
    "dataset": "the dataset {!r}",
    "quantisation": "images quantised to {}",
}
"""What must be as in the evaluation, in the order of the questions; and how errors put it."""


def _require_match(path: Path, info: Mapping[str, str], asked: Mapping[str, str]) -> None:
    for key, what in _CHECKED.items():
        given = info.get(key, asked[key])
        # The same data may have been renamed.
        same_data = key == "dataset" and info.get("fingerprint") == asked["fingerprint"]
        if given != asked[key] and not same_data:
            raise DataError(
                f"reference statistics: {path} is of {what.format(given)}, this evaluation needs "
                f"{what.format(asked[key])}; build it with 'fastflow evaluate CONFIG "
                f"--reference FILE', or leave `reference` out"
            )


def _extracted(
    extractor: Extractor, dataset: Dataset, rule: Quantisation, world: World, rows: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Places [B] in `rows` and features [B, dim] of this process's share of them."""
    stored: Quantisation = "none" if rule == "none" else "truncate"
    for start in range(world.rank * _BATCH, len(rows), world.size * _BATCH):
        places = torch.arange(start, min(start + _BATCH, len(rows)))
        images, _ = dataset.fetch(rows[places])
        finite = images.isfinite().flatten(1).all(1)
        if not finite.all():
            row = int(rows[places][~finite][0])
            raise DataError(f"{dataset.name}: image {row} has a value that is NaN or infinite")
        yield places, extractor(quantise(images, stored)).features


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def describe(path: Path, moments: Moments) -> str:
    """What a file of statistics holds, in one line."""
    info = moments.info
    return (
        f"{moments.dim} features ({info['extractor']}) of {moments.count:,} images "
        f"({info['dataset']}, {info['shape']}, {info['quantisation']}): {path}, sha256 "
        f"{sha256_of(path)}"
    )
