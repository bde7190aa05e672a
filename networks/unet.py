"""What EDM's U-Nets share: the residual block, the checks, and the precision of the embedding.

arXiv 2206.00364, appendix F.1 and tables 7, 8.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastflow.errors import ConfigError, one_of
from fastflow.raw import Conditions, RawNetwork
from networks.attention import Backend, attention
from networks.layers import (
    GroupNorm,
    map_additions,
    require_labels,
    require_probability,
    require_sizes,
    without_autocast,
    zero_,
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
        backend: see `networks.attention`.
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
        batch, channels, height, width = h.shape
        # Channel order of the checkpoints: head, channel of the head, q | k | v.
        parts = (batch, self.heads, channels // self.heads, 3, height * width)
        qkv = self.qkv(self.norm2(h)).reshape(parts).permute(3, 0, 1, 4, 2)
        q, k, v = qkv.contiguous().unbind()  # fused kernels take no other layout
        out = attention(q, k, v, self.backend)
        return self.proj(out.transpose(-2, -1).reshape(h.shape))


class SecondTime(nn.Module):
    """What a second time adds to the output of the embedding's first layer; nothing at first.

    layer(features + label(cond) + augment(augment)): together with the layer of the first time
    this is one layer over both times' features side by side, as in MeanFlow's U-Net (arXiv
    2505.13447), but a network of one time keeps the names and shapes of its parameters.

    Args:
        width: number of features of a time.
        emb_channels: width of the embedding.
        cond_dim, augment_dim: widths of the label rows that are added to the features.
    """

    def __init__(
        self, width: int, emb_channels: int, *, cond_dim: int = 0, augment_dim: int = 0
    ) -> None:
        super().__init__()
        self.label = nn.Linear(cond_dim, width) if cond_dim else None
        self.augment = nn.Linear(augment_dim, width, bias=False) if augment_dim else None
        self.layer = nn.Linear(width, emb_channels, bias=False)
        zero_([self.layer])

    def forward(self, features: Tensor, cond: Tensor, augment: Tensor) -> Tensor:
        """features [B, width], cond [B, cond_dim], augment [B, augment_dim] -> [B, emb_channels].

        Rows of labels that this module has no layer for are left out.
        """
        if self.label is not None:
            features = features + self.label(cond)
        if self.augment is not None:
            features = features + self.augment(augment)
        return self.layer(features)


class UNet(RawNetwork):
    """What the raw networks F of EDM share: sizes, labels and the precision of the embedding.

    Attributes:
        resolutions: sides of the feature maps, from the full resolution down.
        num_blocks: residual blocks per level.
        enc, dec: encoder and decoder, by the checkpoints' names.
        map_second, map_guidance: embeddings of the second time and of the guidance scale, where
            the network takes them.
    """

    enc: nn.ModuleDict
    dec: nn.ModuleDict
    map_second: SecondTime
    map_guidance: nn.Linear

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
        two_times: bool,
        takes_guidance: bool,
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
        self.two_times, self.takes_guidance = two_times, takes_guidance

    def shard_units(self) -> list[nn.Module]:
        """The residual blocks."""
        return [module for module in self.modules() if isinstance(module, UNetBlock)]

    def additions(self) -> tuple[str, ...]:
        return map_additions(self)

    def features(self, t: Tensor) -> Tensor:
        """Features [B, width] of a time or guidance scale t [B], in the type of the weights."""
        raise NotImplementedError(f"{type(self).__name__} does not define features()")

    def added(self, emb: Tensor, given: Conditions) -> Tensor:
        """emb [B, emb_channels], of the first layer, with second time and guidance added."""
        if given.c_second is not None:
            features = self.features(given.c_second)
            emb = emb + self.map_second(features, given.cond, given.augment)
        if given.guidance is not None:
            emb = emb + self.map_guidance(self.features(given.guidance))
        return emb

    def embed(self, given: Conditions) -> Tensor:
        """The embedding [B, emb_channels] of all conditions."""
        raise NotImplementedError(f"{type(self).__name__} does not define embed()")

    def embedding(
        self,
        c_noise: Tensor,
        cond: Tensor | None,
        augment: Tensor | None,
        c_second: Tensor | None,
        guidance: Tensor | None,
    ) -> Tensor:
        """Check the conditions and embed them, in float32 or wider whatever autocast says."""
        given = self.conditions(c_noise, cond, augment, c_second, guidance)
        with without_autocast(c_noise):
            return self.embed(given)
