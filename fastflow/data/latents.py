"""Latents of an autoencoder, computed before training, in the layout of EDM2's dataset tool."""

from __future__ import annotations

import hashlib
import io
import math
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastflow.data.edm_zip import DAMAGED, ImageZip
from fastflow.errors import ConfigError, DataError
from fastflow.rng import fold_in


class LatentZip(ImageZip):
    """One .npy of floats for each image, in the order of their names; read when fetched.

    EDM2's tool (`dataset_tool.py encode`) writes [2 C, H, W]: the means of a latent's normal
    distribution, then its standard deviations. A sample of it is drawn once for each file, from the
    file's name, so that it is the same at every visit. Files of [C, H, W] are the latents
    themselves. Latents cannot be mirrored.

    Args:
        path: a .zip file, or a folder of the same layout.
        labels: read class labels from `dataset.json`: {"labels": [["name.npy", 3], ...]}.
        channels: C.
        scale: factor on the latents; 0.18215 makes Stable Diffusion's of about unit variance, 1 is
            for files where that has been done.

    Raises:
        ConfigError: channels below 1, or a scale that is not a finite number above 0.
        DataError: nothing there, no arrays, an unreadable first array, or unusable labels.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".npy",)

    def __init__(
        self, path: str, labels: bool = True, channels: int = 4, scale: float = 0.18215
    ) -> None:
        if channels < 1 or not 0 < scale < math.inf:
            raise ConfigError(
                f"LatentZip: channels={channels}, scale={scale} given, accepted: 1 or more, and a "
                f"finite number above 0"
            )
        self.channels, self.scale = channels, scale
        super().__init__(path, labels)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        labels = None if self.labels is None else self.labels[indices]
        return self.read(indices) * self.scale, labels

    def fingerprint(self) -> str:
        """SHA-256 over the files, as for images, and what is made of them."""
        text = f"{super().fingerprint()} {self.channels} {self.scale}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _decode(self, member: str) -> NDArray[np.float32]:
        """The latent of one file before scaling, float32 [C, H, W]."""
        try:
            array = np.load(io.BytesIO(self._source.read(member)), allow_pickle=False)
        except DAMAGED as error:
            raise DataError(f"{self.path}: {member} is unreadable: {error}") from error
        one, two = self.channels, 2 * self.channels
        if array.dtype.kind != "f" or array.ndim != 3 or len(array) not in (one, two):
            raise DataError(
                f"{self.path}: {member} is {array.dtype} of shape {array.shape}, accepted: floats "
                f"of ({one}, H, W), or ({two}, H, W) for means and standard deviations"
            )
        values = torch.from_numpy(array.astype(np.float32))
        if len(values) == two:
            draw = torch.Generator().manual_seed(fold_in(0, "latent", member))
            mean, std = values.chunk(2)
            values = mean + std * torch.randn(mean.shape, generator=draw)
        if not bool(values.isfinite().all()):
            raise DataError(f"{self.path}: {member} has a value that is NaN or infinite")
        return values.numpy()
