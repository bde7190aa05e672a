"""Feature extractors: what distances between sets of images are measured in."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastflow.download import sha256_of
from fastflow.errors import DataError
from fastflow.evaluation import published
from fastflow.evaluation.dinov2 import Resize
from fastflow.evaluation.published import Published, weights_file
from fastflow.evaluation.spec import Quantisation
from fastflow.parts import Part


class Extracted(NamedTuple):
    """What an extractor makes of a batch of images.

    Attributes:
        features: [B, dim].
        logits: class logits [B, classes]; None from an extractor without classes.
    """

    features: Tensor
    logits: Tensor | None = None


class Extractor(Protocol):
    """Maps images to features.

    Attributes:
        name: what it is, for the record.
        weights_hash: SHA-256 of its weights.
        dim: number of features.
        classes: number of class logits; 0 for none.
        dtype: type of features and logits.
        frechet: what the Frechet distance in its features is called, "fid" or "fd_...".
        quantisation: what it does itself to make images discrete; "" for nothing.
    """

    name: str
    weights_hash: str
    dim: int
    classes: int
    dtype: torch.dtype
    frechet: str
    quantisation: str

    def require(self, shape: tuple[int, ...]) -> None:
        """Raise DataError unless it takes images of this shape (C, H, W)."""

    def __call__(self, images: Tensor) -> Extracted:
        """Features of images [B, C, H, W].

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
    """64 features and 10 logits of 8x8 grey digits, by the classifier of `digits_features.py`."""

    def build(self, device: torch.device) -> Extractor:
        from fastflow.evaluation.digits_features import DigitFeatureNet

        return DigitFeatureNet(device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionV3(Features):
    """The original Inception network of 2015, through torch-fidelity: 2,048 features, 1,008 logits.

    Attributes:
        weights: file of weights in torch-fidelity's format; None takes it from torch's cache, or
            downloads it there.
    """

    weights: str | None = None

    def build(self, device: torch.device) -> Extractor:
        path = weights_file(self.weights, published.INCEPTION_V3)
        net = published.load_inception(path)
        return ImageNetwork.of(
            published.INCEPTION_V3, path, net, device, dim=2048, classes=1008, frechet="fid"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VGG16(Features):
    """The second linear layer of VGG-16, 4,096 features, through torch-fidelity.

    What improved precision and recall were defined on (arXiv 1904.06991).

    Attributes:
        weights: file of weights in torchvision's format; None takes it from torch's cache, or
            downloads it there.
    """

    weights: str | None = None

    def build(self, device: torch.device) -> Extractor:
        path = weights_file(self.weights, published.VGG16)
        net = published.load_vgg16(path)
        return ImageNetwork.of(published.VGG16, path, net, device, dim=4096, frechet="fd_vgg16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DINOv2(Features):
    """The class token of DINOv2's ViT-L/14, 1,024 features: `FID(extractor=DINOv2())`.

    Distances in them follow people's judgement more closely than those of Inception, which knows
    the classes of ImageNet (arXiv 2306.04675).

    Attributes:
        weights: file of weights in DINOv2's format; None takes it from torch's cache, or downloads
            it there.
        resize: how images become 224 x 224: "bicubic" with antialiasing as EDM2 does for its
            published FD-DINOv2, or "bilinear" without as torch-fidelity does.
    """

    weights: str | None = None
    resize: Resize = "bicubic"

    def build(self, device: torch.device) -> Extractor:
        path = weights_file(self.weights, published.DINOV2_L)
        net = published.load_dinov2(path, self.resize)
        made = ImageNetwork.of(published.DINOV2_L, path, net, device, dim=1024, frechet="fd_dinov2")
        return dataclasses.replace(made, name=f"{made.name}, {self.resize}")


@dataclasses.dataclass(eq=False)
class ImageNetwork:
    """A published network as an extractor of 8-bit images, grey or RGB, in float32.

    Grey images become RGB by repeating their channel, as EDM's fid.py does.

    Attributes:
        net: uint8 [B, 3, H, W] to (features, logits) or (features,).
        device: where it is.
    """

    name: str
    weights_hash: str
    dim: int
    classes: int
    frechet: str
    net: Callable[[Tensor], tuple[Tensor, ...]]
    device: torch.device
    dtype: torch.dtype = torch.float32
    quantisation: str = ""

    @classmethod
    def of(
        cls,
        network: Published,
        path: Path,
        net: nn.Module,
        device: torch.device,
        *,
        dim: int,
        frechet: str,
        classes: int = 0,
    ) -> ImageNetwork:
        """A network with the weights of `path`, which it was loaded from."""
        digest = sha256_of(path)
        name = f"{network.label(digest)}, {dim}"
        return cls(name, digest, dim, classes, frechet, net.to(device), device)

    def require(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise DataError(
                f"{self.name}: images of shape {shape} given; accepted: (1 or 3, H, W), grey or RGB"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Extracted:
        if images.dtype != torch.uint8:
            raise DataError(
                f"{self.name}: images of {images.dtype} given, uint8 accepted: set "
                f"evaluation.quantisation=truncate"
            )
        self.require(tuple(images.shape[1:]))
        rgb = images.to(self.device).expand(-1, 3, -1, -1)
        # Without TF32: a FID must not depend on the kind of GPU.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return Extracted(*self.net(rgb))


def quantise(x: Tensor, rule: Quantisation) -> Tensor:
    """Images in [-1, 1] as uint8 by the rule, or as they are; values outside are clamped.

    "truncate" is 127.5 x + 128 rounded down, the nearest grey level; "floor" is 127.5 x + 127.5
    rounded down, half a grey level darker on average. Both give stored 8-bit images back unchanged.
    """
    if rule == "none":
        return x
    offset = 128 if rule == "truncate" else 127.5
    return (x * 127.5 + offset).clamp(0, 255).to(torch.uint8)
