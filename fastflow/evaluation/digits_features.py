"""Features of 8x8 digits for a digits FID: a small classifier, trained by a script kept with it.

`tools/train_digit_classifier.py` makes the weights, `assets/digit_classifier.safetensors`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import silu

from fastflow.errors import DataError
from fastflow.evaluation.extractors import Extracted

WEIGHTS = Path(__file__).parent / "assets" / "digit_classifier.safetensors"
DIM = 64
LEVELS = 17


def quantise_levels(x: Tensor) -> Tensor:
    """Clamp [-1, 1] images and round them to the 17 levels of the scanned digits, 0/16 .. 16/16.

    Real digits come back as they are; generated ones become as coarse as the real ones.
    """
    steps = (LEVELS - 1) / 2
    return ((x.clamp(-1, 1) + 1) * steps).round() / steps - 1


class DigitClassifier(nn.Module):
    """Three convolutions, two linear layers: [B, 1, 8, 8] in [-1, 1] -> 64 features -> 10 logits.

    The features are taken before their nonlinearity, where they are closest to a Gaussian, which
    is what the Frechet distance assumes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 48, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(48, 64, 3, stride=2, padding=1)
        self.linear = nn.Linear(64 * 2 * 2, DIM)
        self.head = nn.Linear(DIM, 10)

    def features(self, x: Tensor) -> Tensor:
        """Features [B, 64] of images [B, 1, 8, 8]."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = silu(conv(x))
        features: Tensor = self.linear(x.flatten(1))
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Class logits [B, 10] of features [B, 64]."""
        logits: Tensor = self.head(silu(features))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Class logits [B, 10] of images [B, 1, 8, 8]."""
        return self.logits(self.features(x))


def load_classifier(path: Path = WEIGHTS) -> DigitClassifier:
    """The trained classifier, in evaluation mode, without gradients."""
    net = DigitClassifier()
    net.load_state_dict(load_file(path))
    return net.eval().requires_grad_(False)


class DigitFeatureNet:
    """The classifier as a feature extractor: 8x8 grey images to features [B, 64], logits [B, 10].

    Accepts float images in [-1, 1] (anything outside is clamped) or uint8 images.
    """

    name = "digit-classifier-64"
    dim = DIM
    classes = 10
    dtype = torch.float64
    frechet = "fid"
    quantisation = "17 levels"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.weights_hash = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
        # float64: 8x8 images cost nothing, and no rounding depends on the batch.
        self._net = load_classifier().to(device=device, dtype=self.dtype)
        self._device = device

    def require(self, shape: tuple[int, ...]) -> None:
        if shape != (1, 8, 8):
            raise DataError(
                f"digit features: images of shape {shape} given, (1, 8, 8) accepted; use "
                f"InceptionV3 for other images"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Extracted:
        self.require(tuple(images.shape[1:]))
        x = images.to(self._device, self.dtype)
        if images.dtype == torch.uint8:
            x = x / 127.5 - 1
        features = self._net.features(quantise_levels(x))
        return Extracted(features, self._net.logits(features))
