"""Statistics and features of real data, the other side of every Frechet distance."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow.data.dataset import Dataset
from fastflow.errors import DataError
from fastflow.evaluation.extractors import Extractor, quantise
from fastflow.evaluation.interface import Setting
from fastflow.evaluation.spec import Quantisation
from fastflow.evaluation.statistics import FeatureStatistics, Moments, load_moments, save_moments

if TYPE_CHECKING:
    from fastflow.distributed import World


_BATCH = 256


def reference_from_file(path: Path, extractor: Extractor) -> tuple[Moments, str]:
    """Statistics of a file and the SHA-256 of the file.

    Raises:
        DataError: missing, unreadable, or of another number of features.
    """
    moments = load_moments(path)
    if moments.dim != extractor.dim:
        raise DataError(
            f"reference statistics: {path} is of {moments.dim} features, but {extractor.name} has "
            f"{extractor.dim}"
        )
    return moments, hashlib.sha256(path.read_bytes()).hexdigest()


def reference_from_dataset(extractor: Extractor, setting: Setting) -> Moments:
    """Statistics of the whole dataset as stored (never mirrored); every process must call it.

    Computed once and kept in the cache folder, under the dataset's fingerprint, the extractor and
    the quantisation.
    """
    rule = setting.evaluation.quantisation
    dataset, world = setting.dataset, setting.world
    info = {
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint(),
        "extractor": f"{extractor.name} {extractor.quantisation}",
        "extractor_hash": extractor.weights_hash,
        "quantisation": rule,
    }
    key = hashlib.sha256(repr(sorted(info.items())).encode()).hexdigest()[:20]
    cached = setting.cache / f"{key}.safetensors"
    # The main process decides for all: a file may appear between two looks at it.
    known = load_moments(cached) if world.is_main and cached.is_file() else None
    found = torch.tensor([known is not None], dtype=torch.int64, device=world.device)
    if int(world.sum(found)):
        return _from_main(known, extractor.dim, len(dataset), world)
    statistics = FeatureStatistics(extractor.dim, world.device)
    for _, features in real_features(extractor, dataset, rule, world):
        statistics.update(features)
    moments = statistics.reduced(world).moments(info)
    if world.is_main:
        save_moments(moments, cached)
    return moments


def real_features(
    extractor: Extractor, dataset: Dataset, rule: Quantisation, world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices [B] and features [B, dim] of this process's share of the dataset."""
    for rows in torch.arange(len(dataset)).split(_BATCH)[world.rank :: world.size]:
        images, _ = dataset.fetch(rows)
        yield rows, extractor(quantise(images, rule))


def gather_rows(rows: Tensor, values: Tensor, size: int, world: World) -> Tensor:
    """All processes' values [size, ...] by row, on the CPU; every process must call it.

    Each row in 0 .. size - 1 must be given by exactly one process.
    """
    table = torch.zeros(size, *values.shape[1:], dtype=torch.float64, device=world.device)
    table[rows.to(world.device)] = values.to(table)
    return world.sum(table).cpu()


def _from_main(moments: Moments | None, dim: int, count: int, world: World) -> Moments:
    mean = torch.zeros(dim, dtype=torch.float64, device=world.device)
    cov = torch.zeros(dim, dim, dtype=torch.float64, device=world.device)
    if moments is not None:
        mean, cov = moments.mean.to(mean), moments.cov.to(cov)
    return Moments(world.sum(mean).cpu(), world.sum(cov).cpu(), count)
