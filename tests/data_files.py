"""Writes small image files in the layouts that are read: CIFAR-10's two archives, EDM's zip.

    write_cifar10_python(tmp_path / "cifar-10-python.tar.gz", 50)

`path` may be a .tar.gz (or .zip) file or a folder; all writers give the images of `cifar_images`.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))


def cifar_images(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random images uint8 [n, 3, 32, 32] and labels [n] in 0 .. 9."""
    random = np.random.RandomState(seed)
    return random.randint(0, 256, (n, 3, 32, 32), dtype=np.uint8), random.randint(0, 10, n)


def write_cifar10_python(path: Path, n: int = 50, seed: int = 0) -> Path:
    """The original Python archive with n training and n test images."""
    members = {name: python2_batch(*part) for name, part in _divided(n, seed).items()}
    return write_members(path, "cifar-10-batches-py", members)


def write_cifar10_binary(path: Path, n: int = 50, seed: int = 0) -> Path:
    """The original binary archive with n training and n test images."""
    members = {f"{name}.bin": binary_batch(*part) for name, part in _divided(n, seed).items()}
    return write_members(path, "cifar-10-batches-bin", members)


def write_edm_zip(path: Path, n: int = 50, seed: int = 0, labels: bool = True) -> Path:
    """EDM's layout, stored PNGs and dataset.json, with n images as a .zip or a folder."""
    images, classes = cifar_images(n, seed)
    names = [f"{i // 20:05d}/img{i:08d}.png" for i in range(n)]
    members = {name: png(image) for name, image in zip(names, images, strict=True)}
    rows = [[name, int(label)] for name, label in zip(names, classes, strict=True)]
    members["dataset.json"] = json.dumps({"labels": rows if labels else None}).encode()
    return write_zip(path, members)


def png(image: np.ndarray) -> bytes:
    """A PNG of uint8 [C, H, W], C = 1 or 3."""
    file = io.BytesIO()
    pixels = image.transpose(1, 2, 0) if image.shape[0] == 3 else image[0]
    Image.fromarray(pixels).save(file, format="png", compress_level=0)
    return file.getvalue()


def write_zip(path: Path, members: Mapping[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return path
    return _write_folder(path, members)


def write_members(path: Path, folder: str, members: Mapping[str, bytes]) -> Path:
    """A .tar.gz holding `folder`, or the unpacked folder itself when path ends otherwise."""
    if not path.name.endswith(".tar.gz"):
        return _write_folder(path, members)
    with (
        gzip.open(path, "wb", compresslevel=1) as file,
        tarfile.open(mode="w", fileobj=file) as tar,
    ):
        for name, data in members.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def python2_batch(images: np.ndarray, labels: np.ndarray) -> bytes:
    """A batch as Python 2's cPickle wrote it: protocol 2, texts as byte strings."""
    pixels = images.reshape(len(images), -1)
    rows, columns = (b"J" + struct.pack("<i", size) for size in pixels.shape)
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87Rq\x04(K\x03U\x01|NNNJ\xff\xff\xff\xffJ" + (
        b"\xff\xff\xff\xffK\x00tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nK\x00\x85U\x01b\x87Rq\x03"
        + (b"(K\x01" + rows + columns + b"\x86" + dtype + b"\x89")
        + (b"T" + struct.pack("<i", pixels.size) + pixels.tobytes() + b"tb")
    )
    numbers = b"]q\x05(" + b"".join(b"K" + bytes([int(label)]) for label in labels) + b"e"
    names = b"]q\x06(" + b"".join(_short(f"img_{i}.png") for i in range(len(labels))) + b"e"
    return (
        (b"\x80\x02}q\x00(" + _short("batch_label") + _short("training batch 1 of 5"))
        + (_short("labels") + numbers + _short("data") + array + _short("filenames") + names)
        + b"u."
    )


def binary_batch(images: np.ndarray, labels: np.ndarray) -> bytes:
    pixels = images.reshape(len(images), -1)
    return np.concatenate([labels[:, None].astype(np.uint8), pixels], 1).tobytes()


def _short(text: str) -> bytes:
    """Python 2's pickled short byte string."""
    return b"U" + bytes([len(text)]) + text.encode()


def _divided(n: int, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    images, labels = cifar_images(n, seed)
    parts = zip(np.array_split(images, 5), np.array_split(labels, 5), strict=True)
    return dict(zip(TRAIN, parts, strict=True)) | {"test_batch": cifar_images(n, seed + 1)}


def _write_folder(path: Path, members: Mapping[str, bytes]) -> Path:
    for name, data in members.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return path
