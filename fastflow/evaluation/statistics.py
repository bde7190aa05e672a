"""What all processes measured together: mean and covariance of features, and rows by place."""

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
    order of updates, their sizes and the number of processes change the result by rounding only,
    less than 1e-12 of the largest entry of the second moments.

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


class RowTable:
    """A table that the processes fill together, each row by one of them, in any order.

    Args:
        size: rows.
        shape: of a row.
        dtype: of the values; they come out as they were put in, to the bit.
        world: the processes; each holds a whole table on its device.
    """

    def __init__(self, size: int, shape: tuple[int, ...], dtype: torch.dtype, world: World) -> None:
        self._table = torch.zeros(size, *shape, dtype=dtype, device=world.device)
        self._world = world

    def put(self, places: Tensor, values: Tensor) -> None:
        """Fill in rows: values [n, *shape] for places int64 [n] in 0 .. size - 1."""
        self._table[places.to(self._table.device)] = values.to(self._table)

    def whole(self) -> Tensor:
        """The table [size, *shape] with the rows of all, on the CPU; every process must call it."""
        return self._world.sum(self._table).cpu()


def save_moments(moments: Moments, path: Path) -> None:
    """Write statistics atomically: EDM's format for .npz, safetensors for any other name.

    EDM's has mu and sigma alone; safetensors also tell the number of samples and `info`.
    """
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
