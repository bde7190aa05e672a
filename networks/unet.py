"""What EDM's U-Nets share: the residual block, the checks, and the precision of the embedding.

arXiv 2206.00364, appendix F.1 and tables 7, 8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fastflow.errors import ConfigError, one_of
from networks.layers import (
    Backend,
    GroupNorm,
    attention,
    label_rows,
    require_full_precision,
    require_labels,
    require_probability,
    require_sizes,
    without_autocast,
)


class UNetBlock(nn.Module):
    """Residual block: norm, conv, embedding, norm, conv, skip; then self-attention.

    Subclasses say how the embedding enters, in `modulate`.

    Args:
        in_channels, out_channels: widths before and after.
        conv0: first convolution, resampling where the block does.
        affine: layer from the embedding to what `modulate` adds or scales with.
        skip: the shortcut, from the input of the block to the shape of its output.
        heads: attention heads; 0 for no attention.
        dropout: probability before the second convolution.
        eps: of the normalisations.
        skip_scale: factor on every sum with a shortcut.
        backend: see `attention`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        conv0: nn.Module,
        affine: nn.Linear,
        skip: nn.Module,
        heads: int,
        dropout: float,
        eps: float,
        skip_scale: float,
        backend: Backend,
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.skip_scale, self.backend = (
            heads,
            dropout,
            skip_scale,
            backend,
        )
        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = conv0
        self.affine = affine
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = skip
        if heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def modulate(self, h: Tensor, emb: Tensor) -> Tensor:
        """Normalise h [B, C, H, W] with `norm1` and let `affine(emb)` [B, *] act on it."""
        raise NotImplementedError(f"{type(self).__name__} does not define modulate()")

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, in_channels, H, W], emb [B, emb_channels] -> [B, out_channels, H', W']."""
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.modulate(h, emb))
        h = self.conv1(F.dropout(h, self.dropout, training=self.training))
        h = self._join(h, self.skip(x))
        return self._join(self._attend(h), h) if self.heads else h

    def _join(self, h: Tensor, skip: Tensor) -> Tensor:
        return h + skip if self.skip_scale == 1.0 else (h + skip) * self.skip_scale

    def _attend(self, h: Tensor) -> Tensor:
        # Channel order of the checkpoints: head, channel of the head, q | k | v.
        parts = "b (head c three) y x -> three b head c (y x)"
        q, k, v = rearrange(self.qkv(self.norm2(h)), parts, head=self.heads, three=3)
        out = attention(q, k, v, self.backend)
        return self.proj(rearrange(out, "b head c (y x) -> b (head c) y x", y=h.shape[2]))


class UNet(nn.Module):
    """What the raw networks F of EDM share: sizes, labels and the precision of the embedding.

    Attributes:
        sample_shape: (in_channels, resolution, resolution).
        cond_dim: width of `cond`; 0 for an unconditional network.
        augment_dim: width of `augment`; 0 for none.
    """

    enc: nn.ModuleDict
    dec: nn.ModuleDict

    def __init__(
        self,
        *,
        resolution: int,
        in_channels: int,
        out_channels: int,
        channels: int,
        channel_mult: tuple[int, ...],
        channel_mult_emb: int,
        attn_resolutions: tuple[int, ...],
        num_blocks: int,
        cond_dim: int,
        augment_dim: int,
        label_dropout: float,
    ) -> None:
        super().__init__()
        require_sizes(
            num_blocks=num_blocks,
            in_channels=in_channels,
            out_channels=out_channels,
            resolution=resolution,
            channels=channels,
            channel_mult_emb=channel_mult_emb,
        )
        require_labels(cond_dim=cond_dim, augment_dim=augment_dim)
        if out_channels != in_channels:
            raise ConfigError(
                f"out_channels: {out_channels} given, {in_channels} accepted, as many as "
                f"in_channels: the output is an image of the same kind"
            )
        if not channel_mult or min(channel_mult) < 1:
            raise ConfigError(
                f"channel_mult: {channel_mult} given, at least one positive whole number accepted"
            )
        if resolution % 2 ** (len(channel_mult) - 1):
            raise ConfigError(
                f"resolution: {resolution} cannot be halved {len(channel_mult) - 1} times, as "
                f"channel_mult {channel_mult} asks; shorten channel_mult or pad the images"
            )
        self.resolutions = tuple(resolution >> level for level in range(len(channel_mult)))
        for wanted in attn_resolutions:
            if wanted not in self.resolutions:
                raise ConfigError(
                    f"attn_resolutions: the network has no resolution {wanted}; "
                    f"{one_of(wanted, map(str, self.resolutions))}"
                )
        require_probability(label_dropout=label_dropout)
        self.sample_shape = (in_channels, resolution, resolution)
        self.num_blocks = num_blocks
        self.cond_dim, self.augment_dim = cond_dim, augment_dim
        self.label_dropout = label_dropout

    def shard_units(self) -> list[nn.Module]:
        """The residual blocks."""
        return [module for module in self.modules() if isinstance(module, UNetBlock)]

    def embed(self, c_noise: Tensor, cond: Tensor, augment: Tensor) -> Tensor:
        """The embedding [B, emb_channels] of c_noise [B] and of both label rows."""
        raise NotImplementedError(f"{type(self).__name__} does not define embed()")

    def embedding(self, c_noise: Tensor, cond: Tensor | None, augment: Tensor | None) -> Tensor:
        """Check the conditions and embed them, in float32 or wider whatever autocast says.

        Absent labels stand for zero rows, so that every parameter takes part in every step.
        """
        require_full_precision(c_noise)
        dtype = next(self.parameters()).dtype
        rows = label_rows("cond", cond, self.cond_dim, c_noise, dtype)
        augments = label_rows("augment", augment, self.augment_dim, c_noise, dtype)
        if self.training and self.label_dropout:
            keep = torch.rand(len(rows), 1, device=rows.device) >= self.label_dropout
            rows = rows * keep
        with without_autocast(c_noise):
            return self.embed(c_noise, rows, augments)
