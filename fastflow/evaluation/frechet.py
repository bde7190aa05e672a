"""The Frechet distance between two Gaussians, FID when their features come from Inception."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.errors import DataError
from fastflow.evaluation.statistics import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2), in float64.

    The symmetric form has real eigenvalues whatever the rank of the covariances, so no imaginary
    part is ever dropped (arXiv 1706.08500, Eq. 6, up to similarity).

    Raises:
        DataError: different numbers of features, or a matrix that is no covariance.
    """
    if a.dim != b.dim:
        raise DataError(
            f"Frechet distance: statistics of {a.dim} and of {b.dim} features given; both must "
            f"come from the same extractor"
        )
    values, vectors = torch.linalg.eigh(_symmetric(a.cov))
    values = _clip(values, _rounding(a))
    root = (vectors * values.sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(_symmetric(root @ b.cov @ root))
    cross = _clip(cross, values.max().item() * _rounding(b))
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()
    # Never negative but for rounding.
    return max((distance - 2 * cross.sqrt().sum()).item(), 0.0)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _rounding(moments: Moments) -> float:
    """More than what sums in float64 leave of the covariance of equal features."""
    return 1e-9 * moments.mean.square().sum().item()


def _clip(eigenvalues: Tensor, rounding: float) -> Tensor:
    """Eigenvalues of a covariance without the negative ones that rounding makes."""
    lowest, largest = eigenvalues.min().item(), eigenvalues.abs().max().item()
    if lowest < -(1e-6 * largest + rounding):
        raise DataError(
            f"Frechet distance: a covariance has the eigenvalue {lowest:.3g} (largest "
            f"{largest:.3g}); the statistics are damaged"
        )
    return eigenvalues.clamp(min=0)
