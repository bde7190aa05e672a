"""A residual multilayer perceptron for vectors: the raw network of the two-dimensional toys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow.raw import RawNetwork
from networks.layers import (
    map_additions,
    require_labels,
    require_sizes,
    without_autocast,
    zero_,
)

_FEATURES = 16
_LOWEST, _HIGHEST = 0.25, 4.0  # radians per unit of time; EDM's spans about [-1.6, 1.1]


class MLPBlock(nn.Module):
    """h + W1 silu(W0 silu(h) + A emb), the identity at initialisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear0 = nn.Linear(width, width)
        self.affine = nn.Linear(width, width)
        self.linear1 = nn.Linear(width, width)
        zero_([self.linear1])

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """h and emb [B, width] -> [B, width]."""
        return h + self.linear1(F.silu(self.linear0(F.silu(h)) + self.affine(emb)))


class ToyMLP(RawNetwork):
    """Raw network F(x, c_noise, cond) on vectors [B, data_dim]; its initial output is zero.

    Times enter by sines and cosines of low frequency only: the map to be learnt is smooth in
    c_noise, and high frequencies would amplify its derivative. They suit times that span about 3:
    EDM's c_noise, or t in [0, 1] by `VelocityNetwork(..., time_scale=2.0)`.

    Args:
        data_dim: length of one sample.
        width: hidden width.
        depth: residual blocks.
        cond_dim: width of class rows; 0 for none.
        two_times: whether a second time is taken.
        takes_guidance: whether a guidance scale is taken.

    Raises:
        ConfigError: a size below its minimum.
    """

    def __init__(
        self,
        *,
        data_dim: int = 2,
        width: int = 128,
        depth: int = 4,
        cond_dim: int = 0,
        two_times: bool = False,
        takes_guidance: bool = False,
    ) -> None:
        super().__init__()
        require_sizes(data_dim=data_dim, width=width, depth=depth)
        require_labels(cond_dim=cond_dim)
        self.sample_shape = (data_dim,)
        self.cond_dim = cond_dim
        self.two_times, self.takes_guidance = two_times, takes_guidance
        self.map_layer = nn.Linear(_FEATURES, width)
        if cond_dim:
            self.map_label = nn.Linear(cond_dim, width, bias=False)
        if two_times:
            self.map_second = nn.Linear(_FEATURES, width, bias=False)
            zero_([self.map_second])
        if takes_guidance:
            self.map_guidance = nn.Linear(_FEATURES, width, bias=False)
            zero_([self.map_guidance])
        self.first = nn.Linear(data_dim, width)
        self.blocks = nn.ModuleList(MLPBlock(width) for _ in range(depth))
        self.last = nn.Linear(width, data_dim)
        zero_([self.last])

    def shard_units(self) -> list[nn.Module]:
        """The residual blocks."""
        return list(self.blocks)

    def additions(self) -> tuple[str, ...]:
        return map_additions(self)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Tensor | None = None,
        augment: Tensor | None = None,
        c_second: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Raw output F.

        Args:
            x: scaled noisy vectors [B, data_dim].
            c_noise: noise labels [B], float32 or float64.
            cond: class rows [B, cond_dim], or None for zero rows.
            augment: not taken: anything but None raises ConfigError.
            c_second: second times [B] like `c_noise`, exactly where `two_times`.
            guidance: guidance scales [B] like `c_noise`, or None for ones.

        Returns:
            [B, data_dim], in the type of `x`.
        """
        given = self.conditions(c_noise, cond, augment, c_second, guidance)
        with without_autocast(c_noise):
            emb = self.map_layer(self._features(given.c_noise))
            if self.cond_dim:
                emb = emb + self.map_label(given.cond)
            if given.c_second is not None:
                emb = emb + self.map_second(self._features(given.c_second))
            if given.guidance is not None:
                emb = emb + self.map_guidance(self._features(given.guidance))
        h = self.first(x)
        for block in self.blocks:
            h = block(h, emb)
        return self.last(F.silu(h)).to(x.dtype)

    def _features(self, t: Tensor) -> Tensor:
        return noise_features(t).to(self.map_layer.weight.dtype)


def noise_features(c_noise: Tensor) -> Tensor:
    """Sines and cosines of c_noise [B] at 8 frequencies from 0.25 to 4 rad: [B, 16]."""
    exponents = torch.linspace(0, 1, _FEATURES // 2, dtype=c_noise.dtype, device=c_noise.device)
    phase = torch.outer(c_noise, _LOWEST * (_HIGHEST / _LOWEST) ** exponents)
    return torch.cat([phase.sin(), phase.cos()], dim=1)
