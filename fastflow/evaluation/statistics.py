"""Mean and covariance of features, summed in float64 in any order by any number of processes."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastflow.errors import DataError

if TYPE_CHECKING:
    from fastflow.distributed import World


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and covariance of a set of features, on the CPU.

    Attributes:
        mean: [D] float64.
        cov: [D, D] float64, unbiased.
        count: number of samples, or None where a file does not tell.
        info: where they come from.
    """

    mean: Tensor
    cov: Tensor
    count: int | None = None
    info: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def dim(self) -> int:
        return self.mean.shape[0]


class FeatureStatistics:
    """Running sums (n, sum x, sum x x^T) of features; those of parts add up to the whole's.

    mean = sum / n, cov = (outer - n mean mean^T) / (n - 1), as EDM's fid.py. All in float64: the
    order of updates and the number of processes change the result by rounding only, about 1e-13
    of the largest entry.

    Args:
        dim: number of features.
        device: where the sums are kept.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self._outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add features [n, dim] of any float type."""
        x = features.to(self._sum)
        self.count += x.shape[0]
        self._sum += x.sum(0)
        self._outer.addmm_(x.T, x)

    def reduced(self, world: World) -> FeatureStatistics:
        """The sums over all processes; every process must call it."""
        total = FeatureStatistics(self._sum.shape[0], self._sum.device)
        count = torch.tensor([self.count], dtype=torch.int64, device=self._sum.device)
        total.count = int(world.sum(count))
        total._sum = world.sum(self._sum)
        total._outer = world.sum(self._outer)
        return total

    def moments(self, info: Mapping[str, str] | None = None) -> Moments:
        """Mean and covariance of everything added.

        Raises:
            DataError: fewer than two samples, or non-finite features.
        """
        if self.count < 2:
            raise DataError(f"statistics of {self.count} samples asked for, at least 2 needed")
        mean = self._sum / self.count
        cov = (self._outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        result = Moments(mean.cpu(), ((cov + cov.T) / 2).cpu(), self.count, dict(info or {}))
        _check_finite(result, "features")
        return result


def save_moments(moments: Moments, path: Path) -> None:
    """Write statistics atomically: EDM's format (mu, sigma) for .npz, else safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if path.suffix == ".npz":
        with scratch.open("wb") as file:
            np.savez(file, mu=moments.mean.numpy(), sigma=moments.cov.numpy())
    else:
        about = json.dumps({"count": moments.count, "info": dict(moments.info)})
        tensors = {"mean": moments.mean.contiguous(), "cov": moments.cov.contiguous()}
        save_file(tensors, scratch, metadata={"fastflow_moments": about})
    scratch.replace(path)


def load_moments(path: Path) -> Moments:
    """Read statistics written by `save_moments`, or an .npz of EDM with `mu` and `sigma`.

    Raises:
        DataError: missing, unreadable, or no mean and covariance.
    """
    if not path.is_file():
        raise DataError(
            f"reference statistics: no file {path}; accepted: an .npz with mu and sigma, or a "
            f".safetensors file with mean and cov"
        )
    try:
        moments = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    except (OSError, KeyError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        raise DataError(f"reference statistics: {path} is unreadable: {error}") from None
    dim = moments.mean.numel()
    if moments.mean.ndim != 1 or moments.cov.shape != (dim, dim):
        raise DataError(
            f"reference statistics: {path} holds a mean of shape {tuple(moments.mean.shape)} and "
            f"a covariance of shape {tuple(moments.cov.shape)}; [D] and [D, D] accepted"
        )
    _check_finite(moments, str(path))
    return moments


def _read_npz(path: Path) -> Moments:
    with np.load(path, allow_pickle=False) as file:
        mean, cov = (torch.from_numpy(file[key].astype(np.float64)) for key in ("mu", "sigma"))
    return Moments(mean, cov)


def _read_safetensors(path: Path) -> Moments:
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})["fastflow_moments"])
        mean, cov = file.get_tensor("mean"), file.get_tensor("cov")
    return Moments(mean.double(), cov.double(), about["count"], about["info"])


def _check_finite(moments: Moments, where: str) -> None:
    if not (moments.mean.isfinite().all() and moments.cov.isfinite().all()):
        raise DataError(f"{where}: mean or covariance has a NaN or infinite value")
