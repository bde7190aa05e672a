"""Networks that features come from: where their weights are, and how these are read safely."""

from __future__ import annotations

import dataclasses
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.download import Remote, download
from fastflow.errors import DataError
from fastflow.evaluation.dinov2 import DINOv2Features, DINOv2ViT, Resize
from fastflow.torchvision_shim import import_beside_torchvision


@dataclasses.dataclass(frozen=True)
class Published:
    """A network of the literature whose features are compared.

    Attributes:
        name: for people.
        part: the class of `fastflow.evaluation.extractors` that takes `weights=FILE`.
        version: what the published weights are called.
        weights: the published file.
    """

    name: str
    part: str
    version: str
    weights: Remote

    def label(self, digest: str) -> str:
        """Its name with its version; weights of another SHA-256 are called so."""
        version = self.version if digest == self.weights.sha256 else "with other weights"
        return f"{self.name} {version}"


INCEPTION_V3 = Published(
    "inception-v3",
    "InceptionV3",
    "2015-12-05",
    Remote(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
)
VGG16 = Published(
    "vgg16",
    "VGG16",
    "imagenet1k-v1",
    Remote(
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
)
DINOV2_L = Published(
    "dinov2-vitl14",
    "DINOv2",
    "lvd142m",
    Remote(
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    ),
)


def weights_file(given: str | None, network: Published) -> Path:
    """The weights file: the given one, or the published one from torch's cache or the network.

    Raises:
        DataError: there is none, or the one in the cache is another; the text names the three
            ways to provide it.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    remote = network.weights
    ways = (
        f"download {remote.url} elsewhere and (1) put it at {folder / remote.name}, or (2) name it "
        f"as {network.part}(weights=FILE); or (3) run once with a network connection"
    )
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            raise DataError(f"{network.name} weights: no file {given}; {ways}")
        return path
    try:
        return download(remote, folder)
    except DataError as error:
        raise DataError(f"{network.name} weights: {error}; {ways}") from None


def load_inception(path: Path) -> nn.Module:
    """torch-fidelity's Inception: uint8 [B, 3, H, W] to features [B, 2048] and logits [B, 1008].

    The logits are those without bias, torch-fidelity's `logits_unbiased`.

    Raises:
        DataError: the file holds anything but tensors, or other tensors than the network's.
    """
    return _fidelity_network(
        path, INCEPTION_V3, "inceptionv3", "InceptionV3", "2048", "logits_unbiased"
    )


def load_vgg16(path: Path) -> nn.Module:
    """torch-fidelity's VGG-16: uint8 [B, 3, H, W] to (second linear layer after ReLU [B, 4096],).

    Raises:
        DataError: as `load_inception`.
    """
    return _fidelity_network(path, VGG16, "vgg16", "VGG16", "fc2_relu")


def load_dinov2(path: Path, resize: Resize) -> nn.Module:
    """DINOv2's ViT-L/14: uint8 [B, 3, H, W] to (class token [B, 1024],).

    torch-fidelity's extractor runs code of the day from GitHub to build this network, and takes no
    file of weights; the network is ours.

    Raises:
        DataError: as `load_inception`.
    """
    state = _tensors(path, DINOV2_L)
    with torch.device("meta"):
        net = DINOv2ViT()
    try:
        net.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise _misfit(path, DINOV2_L, error) from None
    return DINOv2Features(net, resize).eval().requires_grad_(False)


def _tensors(path: Path, network: Published) -> dict[str, Tensor]:
    """The contents of a weights file, by torch's restricted reader."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DataError(f"{network.name} weights: {path} is refused: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"{network.name} weights: {path} holds no dictionary of tensors")
    return dict(state)


def _fidelity_network(
    path: Path, network: Published, module: str, name: str, *outputs: str
) -> nn.Module:
    """A network of torch-fidelity that returns a tuple of its `outputs`.

    torch-fidelity unpickles its weights file without restriction, so it never sees the given one:
    that is read by torch's restricted reader, and only the tensors are handed on.
    """
    state = _tensors(path, network)
    library: Any = import_beside_torchvision(
        f"torch_fidelity.feature_extractor_{module}", f"{name} features", "eval"
    )
    with tempfile.TemporaryDirectory() as folder:
        checked = Path(folder) / "weights.pth"
        torch.save(state, checked)
        try:
            net: nn.Module = getattr(library, f"FeatureExtractor{name}")(
                network.name, list(outputs), feature_extractor_weights_path=str(checked)
            )
        except RuntimeError as error:
            raise _misfit(path, network, error) from None
    # Channels last is three times as fast on a CPU.
    for weight in net.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return net


def _misfit(path: Path, network: Published, error: RuntimeError) -> DataError:
    reason = str(error).strip().splitlines()[-1].strip()
    return DataError(f"{network.name} weights: {path} does not fit the network: {reason}")
