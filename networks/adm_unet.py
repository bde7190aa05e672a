"""ADM as a raw network F of the EDM preconditioning.

arXiv 2105.05233 as used in arXiv 2206.00364, appendix F.1 and tables 7, 8. Parameter names are
those of the published checkpoints behind `model.`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow.raw import Conditions
from networks.attention import Backend
from networks.layers import (
    Direction,
    GroupNorm,
    PositionalEmbedding,
    Resample,
    conv3,
    require_probability,
    zero_,
)
from networks.unet import SecondTime, UNet, UNetBlock

HEAD_CHANNELS = 64
_EPS = 1e-5


class AdmBlock(UNetBlock):
    """Residual block whose embedding scales and shifts the second normalisation.

    `heads` divides the channels, 0 for no attention.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        heads: int = 0,
        direction: Direction | None = None,
        dropout: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        skip: nn.Module = nn.Identity()
        if direction is not None:
            skip = Resample((1, 1), direction)
        elif in_channels != out_channels:
            skip = nn.Conv2d(in_channels, out_channels, 1)
        super().__init__(
            in_channels,
            out_channels,
            conv0=conv3(in_channels, out_channels, direction),
            affine=nn.Linear(emb_channels, 2 * out_channels),
            skip=skip,
            heads=heads,
            dropout=dropout,
            eps=_EPS,
            skip_scale=1.0,
            backend=backend,
        )
        zero_([self.conv1, self.proj] if heads else [self.conv1])

    def modulate(self, h: Tensor, emb: Tensor) -> Tensor:
        params = self.affine(emb)[:, :, None, None].to(h.dtype)
        scale, shift = params.chunk(2, dim=1)
        return torch.addcmul(shift, self.norm1(h), scale + 1)


class DhariwalUNet(UNet):
    """The ADM U-Net; the defaults are its ImageNet-64 size.

    Attention heads have 64 channels: a block narrower than 64 has no attention, also where
    `attn_resolutions` asks for it, as in the published networks.

    Args:
        resolution: side of the square images.
        in_channels, out_channels: channels of the input and of the output.
        cond_dim: width of class rows; 0 for none.
        augment_dim: width of augmentation labels; 0 for none.
        channels: base width; level i has `channels * channel_mult[i]`.
        channel_mult: width multipliers from the full resolution down.
        channel_mult_emb: width of the embedding over `channels`.
        num_blocks: residual blocks per level.
        attn_resolutions: resolutions with self-attention.
        dropout: probability in every block.
        label_dropout: probability that a class row is zeroed in training.
        attention: see `networks.attention`.
        two_times: whether a second time is taken.
        takes_guidance: whether a guidance scale is taken.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        resolution: int,
        in_channels: int = 3,
        out_channels: int = 3,
        cond_dim: int = 0,
        augment_dim: int = 0,
        channels: int = 192,
        channel_mult: tuple[int, ...] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: tuple[int, ...] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        attention: Backend = "auto",
        two_times: bool = False,
        takes_guidance: bool = False,
    ) -> None:
        super().__init__(
            resolution=resolution,
            in_channels=in_channels,
            out_channels=out_channels,
            channels=channels,
            channel_mult=channel_mult,
            channel_mult_emb=channel_mult_emb,
            attn_resolutions=attn_resolutions,
            num_blocks=num_blocks,
            cond_dim=cond_dim,
            augment_dim=augment_dim,
            label_dropout=label_dropout,
            two_times=two_times,
            takes_guidance=takes_guidance,
        )
        require_probability(dropout=dropout)
        emb = channels * channel_mult_emb

        self.map_noise = PositionalEmbedding(channels, endpoint=False)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, channels, bias=False)
            zero_([self.map_augment])
        self.map_layer0 = nn.Linear(channels, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        if two_times:
            self.map_second = SecondTime(channels, emb, augment_dim=augment_dim)
        if takes_guidance:
            self.map_guidance = nn.Linear(channels, emb, bias=False)
            zero_([self.map_guidance])
        if cond_dim:
            self.map_label = nn.Linear(cond_dim, emb, bias=False)
            # Kaiming-normal, 1/sqrt(cond_dim), times sqrt(cond_dim): unit variance for a one-hot.
            nn.init.normal_(self.map_label.weight)

        def block(
            before: int, after: int, *, attention_here: bool, direction: Direction | None = None
        ) -> AdmBlock:
            return AdmBlock(
                before,
                after,
                emb,
                heads=after // HEAD_CHANNELS if attention_here else 0,
                direction=direction,
                dropout=dropout,
                backend=attention,
            )

        self.enc = nn.ModuleDict()
        width, skips = channels, []
        for level, res in enumerate(self.resolutions):
            if level == 0:
                width = channels * channel_mult[0]
                self.enc[f"{res}x{res}_conv"] = conv3(in_channels, width)
            else:
                down = block(width, width, attention_here=False, direction="down")
                self.enc[f"{res}x{res}_down"] = down
            skips.append(width)
            for i in range(num_blocks):
                after = channels * channel_mult[level]
                here = res in attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = block(width, after, attention_here=here)
                width = after
                skips.append(width)

        self.dec = nn.ModuleDict()
        for level, res in reversed(list(enumerate(self.resolutions))):
            if level == len(self.resolutions) - 1:
                self.dec[f"{res}x{res}_in0"] = block(width, width, attention_here=True)
                self.dec[f"{res}x{res}_in1"] = block(width, width, attention_here=False)
            else:
                up = block(width, width, attention_here=False, direction="up")
                self.dec[f"{res}x{res}_up"] = up
            for i in range(num_blocks + 1):
                after = channels * channel_mult[level]
                here = res in attn_resolutions
                before = width + skips.pop()
                self.dec[f"{res}x{res}_block{i}"] = block(before, after, attention_here=here)
                width = after
        self.out_norm = GroupNorm(width, _EPS)
        self.out_conv = conv3(width, out_channels)
        zero_([self.out_conv])

    def features(self, t: Tensor) -> Tensor:
        return self.map_noise(t).to(self.map_layer0.weight.dtype)

    def embed(self, given: Conditions) -> Tensor:
        emb = self.features(given.c_noise)
        if self.augment_dim:
            emb = emb + self.map_augment(given.augment)
        emb = self.added(self.map_layer0(emb), given)
        emb = self.map_layer1(F.silu(emb))
        if self.cond_dim:
            emb = emb + self.map_label(given.cond)
        return F.silu(emb)

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
            x: scaled noisy images [B, in_channels, resolution, resolution].
            c_noise: noise labels [B], float32 or float64.
            cond: class rows [B, cond_dim], or None for zero rows.
            augment: augmentation labels [B, augment_dim], or None for zero rows.
            c_second: second times [B] like `c_noise`, exactly where `two_times`.
            guidance: guidance scales [B] like `c_noise`, or None for ones.

        Returns:
            [B, out_channels, resolution, resolution], in the type of `x`.
        """
        emb = self.embedding(c_noise, cond, augment, c_second, guidance)
        h, skips = x, []
        for level, res in enumerate(self.resolutions):
            at = f"{res}x{res}"
            h = self.enc[f"{at}_conv"](h) if level == 0 else self.enc[f"{at}_down"](h, emb)
            skips.append(h)
            for i in range(self.num_blocks):
                h = self.enc[f"{at}_block{i}"](h, emb)
                skips.append(h)
        for res in reversed(self.resolutions):
            at = f"{res}x{res}"
            if res == self.resolutions[-1]:
                h = self.dec[f"{at}_in1"](self.dec[f"{at}_in0"](h, emb), emb)
            else:
                h = self.dec[f"{at}_up"](h, emb)
            for i in range(self.num_blocks + 1):
                h = self.dec[f"{at}_block{i}"](torch.cat([h, skips.pop()], dim=1), emb)
        return self.out_conv(F.silu(self.out_norm(h))).to(x.dtype)
