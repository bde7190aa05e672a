"""The handwritten digits that come with scikit-learn: 1,797 grey images of 8x8 pixels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastflow.data.dataset import Table
from fastflow.errors import MissingPackageError
from fastflow.rng import fold_in

Split = Literal["all", "first_half", "second_half"]


class Digits(Table):
    """Grey digits [1, 8, 8], the original levels 0 .. 16 mapped to x / 8 - 1; 10 classes.

    The two halves are disjoint, together they are all images, and both hold each class in equal
    numbers (the first has the odd one more); which image goes where is drawn once and for all.

    Args:
        flip: mirror in training; digits have a handedness, so this is off.
        split: all images, or one half: the distance between the halves is what a perfect model
            of half the data would reach.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """

    def __init__(self, flip: bool = False, split: Split = "all") -> None:
        levels, labels = _load()
        if split != "all":
            rows = _half(labels, first=split == "first_half")
            levels, labels = levels[rows], labels[rows]
        name = "digits" if split == "all" else f"digits ({split.replace('_', ' ')})"
        super().__init__(name, levels / 8 - 1, labels, num_classes=10, flip=flip)


def _load() -> tuple[Tensor, Tensor]:
    """Levels 0 .. 16 [N, 1, 8, 8] float32 and labels [N] int64."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingPackageError("scikit-learn", "the digits dataset", "digits") from None
    source = load_digits()
    levels = torch.from_numpy(source.images).to(torch.float32).unsqueeze(1)
    return levels, torch.from_numpy(source.target).to(torch.int64)


def _half(labels: Tensor, first: bool) -> Tensor:
    """Sorted indices of one half, stratified by class."""
    chosen = []
    for label in range(10):
        rows = (labels == label).nonzero().flatten()
        generator = torch.Generator().manual_seed(fold_in(0, "digits halves", label))
        rows = rows[torch.randperm(len(rows), generator=generator)]
        middle = (len(rows) + 1) // 2
        chosen.append(rows[:middle] if first else rows[middle:])
    return torch.cat(chosen).sort().values
