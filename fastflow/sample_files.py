"""Samples as files: pictures, the archives that other projects evaluate, or plain numbers.

.png            one picture: a grid of images, or a cloud of points
.npz            uint8 [N, H, W, C] as `arr_0` and int64 labels [N] as `arr_1`: what ADM's evaluator
                reads
.zip, a folder  a PNG per sample and `dataset.json` with labels, as EDM's tools and
                `fastflow.data.edm_zip.ImageZip` read
.safetensors    float32 as sampled: x [N, *shape], seeds [N], labels [N]
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from fastflow.errors import ConfigError
from fastflow.evaluation.extractors import quantise
from fastflow.evaluation.interface import Samples
from fastflow.evaluation.spec import Quantisation
from fastflow.pictures import save_samples

SUFFIXES = (".png", ".npz", ".zip", ".safetensors", "")
MOST_PICTURED = 4096


def check_target(path: Path, shape: tuple[int, ...], count: int) -> None:
    """Raise ConfigError unless so many samples of a shape can be written there."""
    images = len(shape) == 3 and shape[0] in (1, 3)
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"--out: {path} given, accepted: a .png, .npz, .zip or .safetensors file, or a folder"
        )
    if path.suffix == ".png":
        if not images and shape != (2,):
            raise ConfigError(
                f"--out: {path} given for samples of shape {shape}; pictures are of images of 1 or "
                f"3 channels and of points in the plane: give a .safetensors file"
            )
        if count > MOST_PICTURED:
            raise ConfigError(
                f"--out: {path} given for {count:,} samples, accepted in a picture: up to "
                f"{MOST_PICTURED:,}; give a .npz or .zip file"
            )
    elif path.suffix != ".safetensors" and not images:
        raise ConfigError(
            f"--out: {path} given for samples of shape {shape}; images of 1 or 3 channels are "
            f"written there: give a .safetensors file"
        )
    if path.is_dir() and (path.suffix or any(path.iterdir())):
        raise ConfigError(f"--out: {path} is a folder that is there already; name another")


def write_samples(
    path: Path,
    batches: Iterable[Samples],
    *,
    shape: tuple[int, ...],
    count: int,
    rule: Quantisation,
    about: Mapping[str, object],
    columns: int | None = None,
) -> None:
    """Write samples as the file's name says; it appears whole or not at all.

    Args:
        path: accepted by `check_target`.
        batches: all samples in order, on the CPU.
        shape: of one sample.
        count: of all batches together.
        rule: how images become bytes; not for .png and .safetensors.
        about: what made them, for .safetensors.
        columns: images in a row of a .png.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        save_samples(torch.cat([batch.x for batch in batches]), path, columns)
        return
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".npz":
            _write_npz(scratch, _bytes(batches, rule), count, shape)
        elif path.suffix == ".zip":
            with zipfile.ZipFile(scratch, "w") as file:
                _write_pngs(_bytes(batches, rule), file.writestr)
        elif path.suffix == ".safetensors":
            _write_numbers(scratch, batches, about)
        else:
            _write_pngs(_bytes(batches, rule), lambda name, data: _put(scratch / name, data))
            with contextlib.suppress(FileNotFoundError):
                path.rmdir()  # empty, or it would not have been accepted
        scratch.replace(path)
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        scratch.unlink(missing_ok=True)


_Batch = tuple[range, NDArray[np.uint8], NDArray[np.int64] | None]


def _bytes(batches: Iterable[Samples], rule: Quantisation) -> Iterator[_Batch]:
    """Seeds, images [n, H, W, C] and labels."""
    for batch in batches:
        images = quantise(batch.x, rule).permute(0, 2, 3, 1).contiguous().numpy()
        yield batch.seeds, images, None if batch.labels is None else batch.labels.numpy()


def _write_npz(path: Path, batches: Iterable[_Batch], count: int, shape: tuple[int, ...]) -> None:
    """As numpy.savez does, but a batch at a time."""
    channels, height, width = shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, channels)}
    labels: list[NDArray[np.int64]] = []
    with zipfile.ZipFile(path, "w") as file:
        with file.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for _, images, some in batches:
                member.write(images.data)
                if some is not None:
                    labels.append(some)
        if labels:
            with file.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.concatenate(labels))


def _write_pngs(batches: Iterable[_Batch], put: Callable[[str, bytes], None]) -> None:
    """`put` each image under a name that tells its seed, a thousand to a folder; then labels."""
    from PIL import Image

    labels: list[tuple[str, int]] = []
    for seeds, images, some in batches:
        for place, (seed, image) in enumerate(zip(seeds, images, strict=True)):
            name, data = f"{seed // 1000:05d}/img{seed:08d}.png", io.BytesIO()
            Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(data, "png")
            put(name, data.getvalue())
            if some is not None:
                labels.append((name, int(some[place])))
    put("dataset.json", json.dumps({"labels": labels or None}).encode())


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _write_numbers(path: Path, batches: Iterable[Samples], about: Mapping[str, object]) -> None:
    every = list(batches)
    tensors = {
        "x": torch.cat([batch.x for batch in every]),
        "seeds": torch.tensor([seed for batch in every for seed in batch.seeds]),
    }
    labels = [batch.labels for batch in every if batch.labels is not None]
    if labels:
        tensors["labels"] = torch.cat(labels)
    save_file(tensors, path, metadata={"fastflow_samples": json.dumps(about)})
