"""What a source of training samples provides, and the one kind that fits in memory."""

from __future__ import annotations

import abc
import functools
import hashlib

import torch
from torch import Tensor

from fastflow.errors import DataError


class Dataset(abc.ABC):
    """A finite, indexed set of samples.

    Attributes:
        name: short name for messages and provenance.
        shape: shape of one sample, (C, H, W) or (D,).
        num_classes: number of class labels, 0 without labels.
        flip: whether training mirrors each image left to right with probability 1/2.
        decodes: whether `fetch` is slow enough to be worth background workers.
    """

    name: str
    shape: tuple[int, ...]
    num_classes: int
    flip: bool
    decodes: bool = False

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of samples, at least 1."""

    @abc.abstractmethod
    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Samples by index, as they are stored: never mirrored.

        Args:
            indices: int64 [B] in 0 .. len - 1.

        Returns:
            Samples float32 [B, *shape], images in [-1, 1] (8-bit sources as byte / 127.5 - 1),
            and labels int64 [B] in 0 .. num_classes - 1, or None without labels.

        Raises:
            DataError: a sample cannot be read; the text names it.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 over the contents, in hexadecimal; goes into the provenance of results."""

    def summary(self) -> str:
        """One line for people: name, count, shape and classes."""
        shape = "x".join(map(str, self.shape))
        classes = f"{self.num_classes} classes" if self.num_classes else "no labels"
        return f"{self.name}: {len(self):,} samples of {shape}, {classes}"


class Table(Dataset):
    """A dataset held in memory.

    Args:
        name: short name.
        samples: [N, *shape], uint8 images or float32 values used as they are.
        labels: int64 [N], or None.
        num_classes: number of classes, 0 without labels.
        flip: mirror images in training.

    Raises:
        DataError: empty, non-finite, or labels that do not fit.
    """

    def __init__(
        self, name: str, samples: Tensor, labels: Tensor | None, num_classes: int, flip: bool
    ) -> None:
        assert samples.dtype in (torch.uint8, torch.float32), samples.dtype
        if samples.shape[0] == 0:
            raise DataError(f"{name}: no samples given, at least 1 needed")
        if samples.is_floating_point() and not torch.isfinite(samples).all():
            row = int((~torch.isfinite(samples.flatten(1)).all(1)).nonzero()[0])
            raise DataError(f"{name}: sample {row} has a value that is NaN or infinite")
        if labels is not None:
            check_labels(name, labels, samples.shape[0], num_classes)
        self.name = name
        self.shape = tuple(samples.shape[1:])
        self.num_classes = num_classes
        self.flip = flip
        self._samples = samples.contiguous()
        self._labels = None if labels is None else labels.contiguous()

    def __len__(self) -> int:
        return self._samples.shape[0]

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = self._samples.index_select(0, indices)
        labels = None if self._labels is None else self._labels.index_select(0, indices)
        return to_unit_range(rows) if rows.dtype == torch.uint8 else rows, labels

    def fingerprint(self) -> str:
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(f"{self._samples.dtype} {tuple(self._samples.shape)}".encode())
        digest.update(self._samples.numpy().data)
        if self._labels is not None:
            digest.update(self._labels.numpy().data)
        return digest.hexdigest()


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]: byte / 127.5 - 1."""
    return images.to(torch.float32).div_(127.5).sub_(1)


def check_labels(name: str, labels: Tensor, samples: int, num_classes: int) -> None:
    """Check that there is one label per sample, each in 0 .. num_classes - 1.

    Raises:
        DataError: otherwise.
    """
    if labels.shape != (samples,):
        raise DataError(f"{name}: {labels.numel()} labels given for {samples} samples")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"{name}: labels from {low} to {high} given, 0 to {num_classes - 1} accepted"
        )
