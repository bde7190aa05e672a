"""Feature extractors: what a Frechet distance is measured in."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import pickle
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastflow.errors import DataError
from fastflow.evaluation.spec import Quantisation
from fastflow.parts import Part
from fastflow.torchvision_shim import import_beside_torchvision

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d"  # first digits; also part of the file's name


class Extractor(Protocol):
    """Maps images to features.

    Attributes:
        name: what it is, for the record.
        weights_hash: SHA-256 of its weights.
        dim: number of features.
        quantisation: what it does itself to make images discrete; "" for nothing.
    """

    name: str
    weights_hash: str
    dim: int
    quantisation: str

    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, dim], of float32 or float64, of images [B, C, H, W].

        The images are uint8, or float in [-1, 1] where the evaluation does not quantise.

        Raises:
            DataError: images it cannot take.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features(Part, abc.ABC):
    """The description of a feature extractor."""

    @abc.abstractmethod
    def build(self, device: torch.device) -> Extractor:
        """Load it.

        Raises:
            DataError: its weights are missing or unreadable.
            MissingPackageError: a package it needs is not installed.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitFeatures(Features):
    """64 features of 8x8 grey digits, by the classifier of `digits_features.py`."""

    def build(self, device: torch.device) -> Extractor:
        from fastflow.evaluation.digits_features import DigitFeatureNet

        return DigitFeatureNet(device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionV3(Features):
    """The 2,048 features of the original Inception network of 2015, through torch-fidelity.

    Attributes:
        weights: file of weights in torch-fidelity's format; None takes it from torch's cache, or
            downloads it there.
    """

    weights: str | None = None

    def build(self, device: torch.device) -> Extractor:
        return _Inception(inception_weights(self.weights), device)


class _Inception:
    dim = 2048
    quantisation = ""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.weights_hash = hashlib.sha256(path.read_bytes()).hexdigest()
        official = self.weights_hash.startswith(INCEPTION_SHA256)
        self.name = f"inception-v3 {'2015-12-05' if official else 'with other weights'}, 2048"
        # Channels last is three times as fast on a CPU.
        self._net = load_inception(path).to(device)
        for weight in self._net.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        self._device = device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise DataError(
                f"Inception features: {images.dtype} of shape {tuple(images.shape)} given; uint8 "
                f"images [B, 1 or 3, H, W] accepted: set evaluation.quantisation=truncate"
            )
        rgb = images.to(self._device).expand(-1, 3, -1, -1)
        # Without TF32: a FID must not depend on the kind of GPU.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features: Tensor = self._net(rgb)[0]
        return features


def inception_weights(given: str | None) -> Path:
    """The weights file: the given one, or the published one from torch's cache or the network.

    Raises:
        DataError: there is none; the text names the three ways to provide it.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[-1]
    ways = (
        f"download {INCEPTION_URL} elsewhere and (1) put it at {cached}, or (2) name it as "
        f"InceptionV3(weights=FILE); or (3) run once with a network connection"
    )
    if given is not None:
        if not Path(given).is_file():
            raise DataError(f"Inception weights: no file {given}; {ways}")
        return Path(given)
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, str(cached), INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"Inception weights could not be downloaded ({error}); {ways}"
            ) from None
    return cached


def load_inception(path: Path) -> torch.nn.Module:
    """torch-fidelity's network with the weights of `path`.

    torch-fidelity unpickles its weights file without restriction, so it never sees the given one:
    that is read by torch's restricted reader, and only the tensors are handed on.

    Raises:
        DataError: the file holds anything but tensors, or other tensors than the network's.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DataError(f"Inception weights: {path} is refused: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"Inception weights: {path} holds no dictionary of tensors")
    module: Any = import_beside_torchvision(
        "torch_fidelity.feature_extractor_inceptionv3", "Inception features", "eval"
    )
    with tempfile.TemporaryDirectory() as folder:
        checked = Path(folder) / "weights.pth"
        torch.save(dict(state), checked)
        try:
            net: torch.nn.Module = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(checked)
            )
        except RuntimeError as error:
            raise DataError(
                f"Inception weights: {path} does not fit torch-fidelity's Inception v3: "
                f"{str(error).strip().splitlines()[-1].strip()}"
            ) from None
    return net


def quantise(x: Tensor, rule: Quantisation) -> Tensor:
    """Images in [-1, 1] as uint8 by the rule, or as they are; values outside are clamped.

    "truncate" maps -1, 0, 1 to 0, 128, 255 (127.5 x + 128, rounded down), "round" to 0, 128, 255
    ((x + 1) 127.5 to the nearest, ties to even). Both give stored 8-bit images back unchanged.
    """
    if rule == "none":
        return x
    scaled = x * 127.5 + 128 if rule == "truncate" else (x * 127.5 + 127.5).round()
    return scaled.clamp(0, 255).to(torch.uint8)
