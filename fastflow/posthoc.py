"""Post-hoc EMA (EDM2, arXiv 2312.02696, section 3): any averaging width from stored snapshots.

A power-function EMA of exponent gamma, taken after T images, weighs the weights at time t by the
profile p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on [0, T]. Its width relative to T is

    std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))

A profile that was never stored is approximated, in least squares, by stored ones: with the inner
products A_ij = <p_i, p_j> and B_i = <p_i, p>, the coefficients solve A X = B.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastflow.errors import CheckpointError, ConfigError

Floats = npt.NDArray[np.float64]

MAX_STD = math.sqrt(1.0 / 12.0)
"""The width of gamma = 0, the plain average of all weights."""


def std_of_gamma(gamma: float) -> float:
    """Relative width of the power function with exponent gamma >= 0."""
    return math.sqrt((gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0)))


def gamma_of_std(std: float) -> float:
    """The exponent of a relative width in (0, sqrt(1/12)]; the inverse of `std_of_gamma`."""
    precision = std**-2
    roots = np.roots([1.0, 7.0, 16.0 - precision, 12.0 - precision])
    return float(max(roots.real))


def correlation(images_a: Floats, std_a: Floats, images_b: Floats, std_b: Floats) -> Floats:
    """Inner products of the profiles (images, std) of `a` with those of `b`, elementwise."""
    gammas = np.vectorize(gamma_of_std, otypes=[np.float64])
    gamma_a, gamma_b = gammas(std_a), gammas(std_b)
    ratio = images_a / images_b
    shared = ratio ** np.where(images_a < images_b, gamma_b, -gamma_a)
    scale = (gamma_a + gamma_b + 1.0) * np.maximum(images_a, images_b)
    products: Floats = (gamma_a + 1.0) * (gamma_b + 1.0) * shared / scale
    return products


def posthoc_weights(
    snapshots: Sequence[tuple[float, float]], images: float, std: Sequence[float]
) -> Floats:
    """Coefficients [snapshots, widths] of the snapshots in each wanted average; columns sum to 1.

    Args:
        snapshots: (images, std) of each stored average.
        images: moment of the wanted averages.
        std: their relative widths.
    """
    at, width = np.hsplit(np.asarray(snapshots, dtype=np.float64), 2)
    wanted = np.asarray(std, dtype=np.float64)[None, :]
    products = correlation(at, width, at.T, width.T)
    targets = correlation(at, width, np.full_like(wanted, images), wanted)
    solution = np.asarray(np.linalg.solve(products, targets), dtype=np.float64)
    return np.asarray(solution / solution.sum(axis=0), dtype=np.float64)


def save_snapshot(
    path: Path,
    weights: Mapping[str, Tensor],
    *,
    std: float,
    images: int,
    buffers: Sequence[str],
) -> None:
    """Write one power-function average for `reconstruct`; a file appears whole or not at all.

    Args:
        path: the .safetensors file.
        weights: full CPU tensors by name.
        std: relative width of the average.
        images: images trained on when it was taken.
        buffers: names that are copied, not averaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"std": repr(std), "images": str(images), "buffers": json.dumps(sorted(buffers))}
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in weights.items()}, partial, metadata)
    os.replace(partial, path)


def reconstruct(files: Sequence[Path], std: float, images: int | None = None) -> dict[str, Tensor]:
    """Weights averaged with a width that was not stored.

    Args:
        files: snapshots of one run, of one or more widths; the more, the closer.
        std: the wanted relative width.
        images: the moment of the wanted average; None takes that of the latest snapshot.

    Returns:
        Tensors by name, in the type of the snapshots; buffers are those of the latest snapshot
        up to `images`.

    Raises:
        ConfigError: `std` or `images` is impossible, or no files are given.
        CheckpointError: a file is unreadable, no snapshot, or of another network.
    """
    if not files:
        raise ConfigError("no EMA snapshots given; EMACallback(snapshot_every=...) writes them")
    if not 0.0 < std <= MAX_STD:
        raise ConfigError(f"std: {std:g} given, 0 < std <= {MAX_STD:.4f} accepted")
    facts = [_facts(path) for path in files]
    moments = [at for at, _ in facts]
    at = max(moments) if images is None else images
    if at < min(moments):
        raise ConfigError(f"images: {at} given, {int(min(moments))} or more accepted")
    coefficients = posthoc_weights(facts, at, [std])[:, 0]

    latest = files[max(range(len(files)), key=lambda i: (moments[i] <= at, moments[i]))]
    result, buffers = _read(latest)
    sums = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in result.items()}
    for path, coefficient in zip(files, coefficients.tolist(), strict=True):
        tensors, _ = _read(path)
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in result.items()}:
            raise CheckpointError(f"{path}: the weights of another network than {latest}")
        for name in sums.keys() - buffers:
            sums[name].add_(tensors[name], alpha=coefficient)
    return {k: v if k in buffers else sums[k].to(v.dtype) for k, v in result.items()}


def _facts(path: Path) -> tuple[float, float]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not readable as a safetensors file: {error}") from None
    if not {"std", "images", "buffers"} <= metadata.keys():
        raise CheckpointError(
            f"{path}: no EMA snapshot; accepted: the files that EMACallback(snapshot_every=...) "
            f"writes into ema_snapshots"
        )
    return float(metadata["images"]), float(metadata["std"])


def _read(path: Path) -> tuple[dict[str, Tensor], frozenset[str]]:
    with safe_open(path, framework="pt") as file:
        buffers: list[str] = json.loads(file.metadata()["buffers"])
        return {k: file.get_tensor(k) for k in file.keys()}, frozenset(buffers)  # noqa: SIM118
