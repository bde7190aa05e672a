"""Layers and checks shared by the raw networks of EDM (arXiv 2206.00364, appendix F.1).

Module and buffer names follow the published checkpoints, so that those load strictly. Every
operation runs in the type of its input (float64 included) and supports forward-mode
differentiation: no activation is changed in place, and normalisation keeps primal and tangent in
one type under autocast.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow.errors import ConfigError
from fastflow.raw import RawNetwork

Direction = Literal["down", "up"]


def positional_features(t: Tensor, width: int, *, endpoint: bool) -> Tensor:
    """Cosines, then sines of `t` at width/2 frequencies falling geometrically from 1 to 1e-4.

    Args:
        t: values [B], float32 or float64.
        width: number of features, even.
        endpoint: whether the last frequency is 1e-4 itself, or the one before it in the series.

    Returns:
        Features [B, width], in the type of `t`.
    """
    half = width // 2
    steps = torch.arange(half, dtype=t.dtype, device=t.device) / max(half - int(endpoint), 1)
    phase = torch.outer(t, 1e-4**steps)
    return torch.cat([phase.cos(), phase.sin()], dim=1)


def without_autocast(like: Tensor) -> contextlib.AbstractContextManager[object]:
    """Compute in the types as they are, on the device of `like`."""
    device = like.device.type
    if not torch.amp.is_autocast_available(device):  # the meta device
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


class PositionalEmbedding(nn.Module):
    """`positional_features` as a module: noise labels [B] to [B, width]."""

    def __init__(self, width: int, *, endpoint: bool) -> None:
        super().__init__()
        self.width, self.endpoint = width, endpoint

    def forward(self, t: Tensor) -> Tensor:
        return positional_features(t, self.width, endpoint=self.endpoint)


class FourierEmbedding(nn.Module):
    """Cosines, then sines of 2 pi f t with fixed random frequencies f ~ N(0, scale^2)."""

    freqs: Tensor

    def __init__(self, width: int, *, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(width // 2) * scale)

    def forward(self, t: Tensor) -> Tensor:
        phase = torch.outer(t, (2 * math.pi * self.freqs).to(t.dtype))
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class GroupNorm(nn.GroupNorm):
    """Group normalisation with at least 4 channels in each of at most 32 groups."""

    def __init__(self, channels: int, eps: float) -> None:
        groups = min(32, channels // 4)
        if groups == 0 or channels % groups:
            raise ConfigError(
                f"channels: a layer of width {channels} cannot be normalised in groups; accepted: "
                f"widths of 4 to 128 that are multiples of 4, and multiples of 32 above"
            )
        super().__init__(groups, channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast a float32 affine would give a bfloat16 primal with a float32 tangent, and
        # forward-mode differentiation takes no other memory layout.
        x, weight, bias = x.contiguous(), self.weight.to(x.dtype), self.bias.to(x.dtype)
        if torch.compiler.is_compiling():  # cannot trace the tangent of the affine form
            h = F.group_norm(x, self.num_groups, None, None, self.eps)
            return h * weight[:, None, None] + bias[:, None, None]
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class Resample(nn.Module):
    """Halve or double the resolution with a fixed separable filter.

    Args:
        taps: one-dimensional filter of even length, normalised here.
        direction: "down" or "up".
    """

    resample_filter: Tensor

    def __init__(self, taps: tuple[int, ...], direction: Direction) -> None:
        super().__init__()
        if len(taps) % 2 or not taps or sum(taps) <= 0:
            raise ConfigError(
                f"resample_filter: {taps} given, an even number of taps with a positive sum "
                f"accepted, e.g. (1, 1) or (1, 3, 3, 1)"
            )
        line = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer(
            "resample_filter", (torch.outer(line, line) / line.sum() ** 2)[None, None]
        )
        self.direction = direction
        self.padding = (len(taps) - 1) // 2
        self.box = len(taps) == 2 and taps[0] == taps[1]

    def resample(self, x: Tensor, padding: int) -> Tensor:
        """Filter and change the resolution of x [B, C, H, W], zero-padded by `padding`."""
        if self.box:  # the same numbers as below, several times faster
            if self.direction == "down":
                return F.avg_pool2d(x, 2)
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        channels = x.shape[1]
        kernel = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        if self.direction == "down":
            return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x, self.padding)


class ResampleConv(Resample):
    """Change the resolution, then convolve."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        taps: tuple[int, ...],
        direction: Direction,
    ) -> None:
        super().__init__(taps, direction)
        like = nn.Conv2d(in_channels, out_channels, kernel)  # for its initial values
        self.weight, self.bias = like.weight, like.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.resample(x, self.padding)
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class ConvDownsample(ResampleConv):
    """Convolve with the padding of both filters, then halve: the other order of `ResampleConv`."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, taps: tuple[int, ...]
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, taps, "down")

    def forward(self, x: Tensor) -> Tensor:
        padding = self.weight.shape[-1] // 2 + self.padding
        return self.resample(F.conv2d(x, self.weight, self.bias, padding=padding), 0)


def conv3(
    in_channels: int,
    out_channels: int,
    direction: Direction | None = None,
    taps: tuple[int, ...] = (1, 1),
) -> nn.Module:
    """A 3x3 convolution that keeps the resolution, or changes it first."""
    if direction is None:
        return nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return ResampleConv(in_channels, out_channels, 3, taps, direction)


def require_sizes(**sizes: int) -> None:
    """Raise ConfigError unless every named value is positive."""
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name}: {value} given, a positive whole number accepted")


def require_labels(**widths: int) -> None:
    """Raise ConfigError for a negative width of label rows."""
    for name, value in widths.items():
        if value < 0:
            raise ConfigError(f"{name}: {value} given, 0 (for none) or more accepted")


def require_probability(**values: float) -> None:
    """Raise ConfigError unless every named value lies in [0, 1)."""
    for name, value in values.items():
        if not 0.0 <= value < 1.0:
            raise ConfigError(f"{name}: {value} given, 0 <= {name} < 1 accepted")


def require_positive(**values: float) -> None:
    """Raise ConfigError unless every named value is a finite number above 0."""
    for name, value in values.items():
        if not 0.0 < value < math.inf:
            raise ConfigError(f"{name}: {value} given, a finite number above 0 accepted")


def map_additions(net: RawNetwork) -> tuple[str, ...]:
    """`additions()` of networks that embed second times and guidance in layers called `map_*`."""
    return ("map_second.",) * net.two_times + ("map_guidance.",) * net.takes_guidance


def zero_(layers: Iterable[nn.Module]) -> None:
    """Set weights and biases of the layers to zero."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
