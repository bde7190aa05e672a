"""Images in a zip or folder with a `dataset.json` of labels: the layout of EDM and StyleGAN."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastflow.data.dataset import Dataset, to_unit_range
from fastflow.errors import DataError

_CHANNELS = {"L": 1, "RGB": 3}
_LABELS = "dataset.json"
_MAX_CLASSES = 1_000_000
# What zipfile and Pillow raise on damaged files (a broken PNG is a SyntaxError to Pillow).
DAMAGED = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


class ImageZip(Dataset):
    """Images of one size, in the order of their names; decoded when fetched.

    Args:
        path: a .zip file, or a folder of the same layout.
        labels: read class labels from `dataset.json`: {"labels": [["name.png", 3], ...]}.
        flip: mirror images in training.

    Raises:
        DataError: nothing there, no images, an unreadable first image, or unusable labels.
    """

    decodes = True
    suffixes: ClassVar[tuple[str, ...]] = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

    def __init__(self, path: str, labels: bool = True, flip: bool = False) -> None:
        self.path = Path(path).expanduser()
        self._source = _ZipFiles(self.path) if self.path.is_file() else _FolderFiles(self.path)
        members = self._source.sizes()
        self.members = tuple(sorted(m for m in members if m.lower().endswith(self.suffixes)))
        if not self.members:
            raise DataError(f"{path}: no images found, accepted: {', '.join(self.suffixes)}")
        self.name = self.path.stem
        self.flip = flip
        self.shape = self._decode(self.members[0]).shape
        self._labels = self._read_labels(_LABELS in members) if labels else None
        self.num_classes = 0 if self._labels is None else int(self._labels.max()) + 1

    def __len__(self) -> int:
        return len(self.members)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        labels = None if self._labels is None else self._labels[indices]
        return to_unit_range(self.read(indices)), labels

    def read(self, indices: Tensor) -> Tensor:
        """Images as stored, uint8 [B, C, H, W].

        Raises:
            DataError: an image is unreadable or of another shape.
        """
        return torch.from_numpy(np.stack([self._image(i) for i in indices.tolist()]))

    @property
    def labels(self) -> Tensor | None:
        """All labels, int64 [N], or None."""
        return self._labels

    def fingerprint(self) -> str:
        """SHA-256 over names, sizes, checksums (CRC-32) of all images, and labels."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        sizes = self._source.sizes()
        for member in self.members:
            digest.update(f"{member} {sizes[member]} {self._source.checksum(member)}\n".encode())
        if self._labels is not None:
            digest.update(self._labels.numpy().data)
        return digest.hexdigest()

    def _image(self, index: int) -> NDArray[Any]:
        member = self.members[index]
        image = self._decode(member)
        if image.shape != self.shape:
            raise DataError(
                f"{self.path}: image {member} has shape {image.shape}, "
                f"{self.shape} expected as in {self.members[0]}"
            )
        return image

    def _decode(self, member: str) -> NDArray[Any]:
        """One image, uint8 [C, H, W]."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(self._source.read(member))) as image:
                mode, pixels = image.mode, np.asarray(image)
        except UnidentifiedImageError as error:
            raise DataError(f"{self.path}: {member} is not an image") from error
        except (*DAMAGED, Image.DecompressionBombError) as error:
            raise DataError(f"{self.path}: image {member} is unreadable: {error}") from error
        if mode not in _CHANNELS:
            raise DataError(f"{self.path}: image {member} has mode {mode}, accepted: L, RGB")
        return pixels.reshape(*pixels.shape[:2], _CHANNELS[mode]).transpose(2, 0, 1)

    def _read_labels(self, present: bool) -> Tensor:
        where = f"{self.path}: {_LABELS}"
        if not present:
            raise DataError(f"{where} is missing; for images without labels set data.labels=false")
        try:
            content = json.loads(self._source.read(_LABELS))
        except DAMAGED as error:
            raise DataError(f"{where} is unreadable: {error}") from error
        given = content.get("labels") if isinstance(content, dict) else None
        if given is None:
            raise DataError(f"{where} has no labels; set data.labels=false")
        by_name = _label_table(where, given)
        for member in self.members:
            if member not in by_name:
                raise DataError(f"{where} has no label for image {member}")
        return torch.tensor([by_name[member] for member in self.members])


def _label_table(where: str, given: Any) -> dict[str, int]:
    """Labels by image name."""
    table: dict[str, int] = {}
    for entry in given if isinstance(given, list) else [given]:
        match entry:
            case [str(name), int(label)] if type(label) is int and 0 <= label < _MAX_CLASSES:
                table[name.replace("\\", "/")] = label
            case _:
                raise DataError(f'{where}: entry {entry!r:.80} given, ["name.png", 3] accepted')
    return table


class _ZipFiles:
    """The members of a zip. A process forked from this one opens the file again for itself."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: tuple[int, zipfile.ZipFile] | None = None
        try:
            self._zip()
        except DAMAGED as error:
            raise DataError(f"{path} is not a readable zip: {error}") from error

    def sizes(self) -> dict[str, int]:
        """Size in bytes of each member, by name."""
        return {info.filename: info.file_size for info in self._zip().infolist()}

    def read(self, member: str) -> bytes:
        return self._zip().read(member)

    def checksum(self, member: str) -> int:
        return self._zip().getinfo(member).CRC

    def _zip(self) -> zipfile.ZipFile:
        # Forked processes would share one file position and read each other's bytes.
        process = os.getpid()
        if self._open is None or self._open[0] != process:
            self._open = process, zipfile.ZipFile(self._path)
        return self._open[1]

    def __getstate__(self) -> dict[str, object]:
        return {"_path": self._path, "_open": None}


class _FolderFiles:
    """The files below a folder, by their path relative to it."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise DataError(f"{path} does not exist, accepted: a .zip of images or a folder")
        self._path = path

    def sizes(self) -> dict[str, int]:
        """Size in bytes of each file, by name."""
        files = (file for file in self._path.rglob("*") if file.is_file())
        return {file.relative_to(self._path).as_posix(): file.stat().st_size for file in files}

    def read(self, member: str) -> bytes:
        return (self._path / member).read_bytes()

    def checksum(self, member: str) -> int:
        return zlib.crc32(self.read(member))
