"""CIFAR-10 in the archives its authors publish, or as an EDM-style zip.

50,000 training and 10,000 test images of 3x32x32 bytes in 10 classes (Krizhevsky, "Learning
multiple layers of features from tiny images", 2009). Nothing in an archive is executed.
"""

from __future__ import annotations

import gzip
import os
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastflow.data.dataset import Table
from fastflow.data.edm_zip import ImageZip
from fastflow.data.plain_pickle import ByteArray, RefusedPickle, read_plain_pickle
from fastflow.download import Remote, cache_folder, download
from fastflow.errors import DataError

Split = Literal["train", "test"]

PYTHON_ARCHIVE = Remote(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    size=170498071,
    md5="c58f30108f718f92721af3b95e74349a",
)
# Names that are looked for in a folder, in this order.
NAMES = (
    PYTHON_ARCHIVE.name,
    "cifar-10-batches-py",
    "cifar-10-binary.tar.gz",
    "cifar-10-batches-bin",
    "cifar10-32x32.zip",
)
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
_FULL = {"train": 50_000, "test": 10_000}
# The published batches have 31 MB; more is not one of them.
_MAX_BYTES = 64 << 20


class Cifar10(Table):
    """CIFAR-10 in memory, 3x32x32; 150 MB for the training images.

    Args:
        path: cifar-10-python.tar.gz, cifar-10-binary.tar.gz, the folder either unpacks to, an
            EDM-style zip of training images, or a folder that holds one of these under its
            usual name. None looks in $FASTFLOW_DATA, ./data and ~/.cache/fastflow, and
            downloads otherwise. A file with fewer images than published is accepted.
        flip: mirror images in training.
        split: the training or the test images.

    Raises:
        DataError: not found, damaged, or not CIFAR-10; the text says how to provide it.
    """

    def __init__(self, path: str | None = None, flip: bool = True, split: Split = "train") -> None:
        self.source = _search() if path is None else _given(Path(path).expanduser())
        images, labels = _read(self.source, split)
        name = "cifar10" if split == "train" else "cifar10 (test)"
        super().__init__(name, images, labels, num_classes=10, flip=flip)
        self._published = _FULL[split]

    def summary(self) -> str:
        part = "" if len(self) == self._published else f" (the original has {self._published:,})"
        return f"{super().summary()}, from {self.source}{part}"


def find_cifar10() -> Path | None:
    """Where CIFAR-10 is found without a download: $FASTFLOW_DATA, ./data, ~/.cache/fastflow."""
    return next((found for folder in _folders() if (found := _in_folder(folder))), None)


def _folders() -> tuple[Path, ...]:
    given = os.environ.get("FASTFLOW_DATA")
    own = (Path(given).expanduser(),) if given else ()
    return (*own, Path("data"), Path.home() / ".cache" / "fastflow")


def _in_folder(folder: Path) -> Path | None:
    if folder.name in NAMES and folder.exists():
        return folder
    return next((folder / name for name in NAMES if (folder / name).exists()), None)


def _given(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"data.path: {path} does not exist, accepted: {_accepted()}")
    if path.is_file() or _batch_files(path):
        return path
    found = _in_folder(path)
    if found is None:
        raise DataError(f"data.path: nothing of CIFAR-10 in folder {path}, accepted: {_accepted()}")
    return found


def _accepted() -> str:
    return f"{', '.join(NAMES)}, or a folder that holds one of them"


def _search() -> Path:
    found = find_cifar10()
    if found is not None:
        return found
    folder = cache_folder()
    try:
        return download(PYTHON_ARCHIVE, folder)
    except DataError as error:
        looked = ", ".join(str(path) for path in _folders())
        raise DataError(
            f"CIFAR-10 is not in {looked}, and {error}. Provide it in one of three ways: "
            f"(1) download {PYTHON_ARCHIVE.url} on another machine and put the file at "
            f"{folder / PYTHON_ARCHIVE.name}; (2) set FASTFLOW_DATA=FOLDER or data.path=FILE to "
            f"where it is already; (3) set data.path to an EDM-style zip such as {NAMES[-1]}"
        ) from error


def _read(path: Path, split: Split) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N]."""
    if path.suffix == ".zip":
        return _read_zip(path, split)
    members = _folder_members(path, split) if path.is_dir() else _tar_members(path, split)
    parts = []
    for batch in _BATCHES[split]:
        # Either format, one or the other: the names tell them apart.
        if batch in members:
            parts.append(_python_batch(f"{path}: {batch}", members[batch]))
        elif f"{batch}.bin" in members:
            parts.append(_binary_batch(f"{path}: {batch}.bin", members[f"{batch}.bin"]))
        else:
            found = ", ".join(sorted(members)) or "none of the batches"
            raise DataError(f"{path}: {batch} is missing (found: {found}), not a CIFAR-10 archive")
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    wrong = labels[(labels < 0) | (labels > 9)]
    if wrong.size:
        raise DataError(f"{path}: label {wrong[0]} found, 0 to 9 accepted in CIFAR-10")
    return torch.from_numpy(images.reshape(-1, *_SHAPE)), torch.from_numpy(labels)


def _wanted(name: str, split: Split) -> bool:
    return name.removesuffix(".bin") in _BATCHES[split]


def _batch_files(folder: Path) -> list[Path]:
    files = (folder / f"{batch}{end}" for batch in _BATCHES["train"] for end in ("", ".bin"))
    return [file for file in files if file.is_file()]


def _folder_members(folder: Path, split: Split) -> dict[str, bytes]:
    try:
        files = [file for file in folder.iterdir() if file.is_file() and _wanted(file.name, split)]
        for file in files:
            _check_size(str(file), file.stat().st_size)
        return {file.name: file.read_bytes() for file in files}
    except OSError as error:
        raise DataError(f"{folder} is unreadable: {error}") from error


def _tar_members(path: Path, split: Split) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if not _wanted(name, split):
                    continue
                _check_size(f"{path}: {member.name}", member.size)
                file = archive.extractfile(member) if member.isfile() else None
                if file is None or name in members:
                    raise DataError(f"{path}: {member.name} is not a plain file, or there twice")
                members[name] = file.read()
            # The checksum of the whole is at the very end.
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is damaged or not a .tar.gz archive: {error}; delete it and get it again"
        ) from error
    return members


def _check_size(where: str, size: int) -> None:
    if size > _MAX_BYTES:
        raise DataError(f"{where} has {size} bytes, at most {_MAX_BYTES} accepted")


def _python_batch(where: str, data: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels [n, 3072] and labels [n] of a batch of the Python format."""
    try:
        batch = read_plain_pickle(data)
    except RefusedPickle as error:
        raise DataError(f"{where}: {error}") from error
    if not isinstance(batch, dict):
        raise DataError(
            f"{where}: {type(batch).__name__} given, a dict of data and labels expected"
        )
    entries = {k.decode("latin-1") if isinstance(k, bytes) else k: v for k, v in batch.items()}
    pixels, labels = entries.get("data"), entries.get("labels")
    if not isinstance(pixels, ByteArray) or pixels.values is None or not isinstance(labels, list):
        raise DataError(f"{where}: keys {sorted(entries)} given, data and labels expected")
    if pixels.values.ndim != 2 or pixels.values.shape[1] != _PIXELS:
        raise DataError(f"{where}: data of shape {pixels.values.shape}, (n, {_PIXELS}) expected")
    if not all(type(label) is int for label in labels) or len(labels) != len(pixels.values):
        raise DataError(f"{where}: labels are not {len(pixels.values)} integers")
    return pixels.values, np.array(labels, dtype=np.int64)


def _binary_batch(where: str, data: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels [n, 3072] and labels [n] of a batch of the binary format: label byte, then pixels."""
    if len(data) % (1 + _PIXELS):
        raise DataError(f"{where}: {len(data)} bytes, a multiple of {1 + _PIXELS} expected")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, 1 + _PIXELS)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _read_zip(path: Path, split: Split) -> tuple[Tensor, Tensor]:
    if split != "train":
        raise DataError(f"{path}: a zip has training images only; give an archive for the test set")
    source = ImageZip(str(path))
    if source.shape != _SHAPE or source.num_classes > 10:
        raise DataError(
            f"{path}: images of {source.shape} in {source.num_classes} classes, "
            f"{_SHAPE} in 10 classes expected"
        )
    images, labels = source.read(torch.arange(len(source))), source.labels
    assert labels is not None, "read with labels"
    return images, labels
