"""DDPM++ and NCSN++ as raw networks F of the EDM preconditioning.

arXiv 2206.00364, appendix F.1 and table 7; the architectures come from arXiv 2011.13456. Parameter
names are those of the published checkpoints behind `model.`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow.raw import Conditions
from networks.attention import Backend
from networks.layers import (
    ConvDownsample,
    Direction,
    FourierEmbedding,
    GroupNorm,
    PositionalEmbedding,
    Resample,
    ResampleConv,
    conv3,
    require_positive,
    require_probability,
    require_sizes,
)
from networks.unet import SecondTime, UNet, UNetBlock

_EPS = 1e-6


class SongBlock(UNetBlock):
    """Residual block that adds the embedding and keeps the variance of every sum."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        attention: bool = False,
        direction: Direction | None = None,
        taps: tuple[int, ...] = (1, 1),
        dropout: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        skip: nn.Module = nn.Identity()
        if direction is not None:
            skip = ResampleConv(in_channels, out_channels, 1, taps, direction)
        elif in_channels != out_channels:
            skip = nn.Conv2d(in_channels, out_channels, 1)
        super().__init__(
            in_channels,
            out_channels,
            conv0=conv3(in_channels, out_channels, direction, taps),
            affine=nn.Linear(emb_channels, out_channels),
            skip=skip,
            heads=int(attention),
            dropout=dropout,
            eps=_EPS,
            skip_scale=math.sqrt(0.5),
            backend=backend,
        )

    def modulate(self, h: Tensor, emb: Tensor) -> Tensor:
        return self.norm1(h + self.affine(emb)[:, :, None, None].to(h.dtype))


class SongUNet(UNet):
    """DDPM++ (the defaults) and NCSN++ (fourier, residual encoder, blur (1, 3, 3, 1)).

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
        embedding: features of the noise level.
        channel_mult_noise: width of these features over `channels`; NCSN++ uses 2.
        fourier_scale: standard deviation of the frequencies of "fourier", in cycles per unit of
            the noise level; continuous-time consistency models use 0.02.
        encoder: how the downsampled input enters the encoder; NCSN++ uses "residual".
        decoder: "skip" sums an image from every resolution, "standard" reads the last one.
        resample_filter: taps of the resampling blur.
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
        channels: int = 128,
        channel_mult: tuple[int, ...] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding: Literal["positional", "fourier"] = "positional",
        channel_mult_noise: int = 1,
        fourier_scale: float = 16.0,
        encoder: Literal["standard", "skip", "residual"] = "standard",
        decoder: Literal["standard", "skip"] = "standard",
        resample_filter: tuple[int, ...] = (1, 1),
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
        emb, noise = channels * channel_mult_emb, channels * channel_mult_noise
        require_sizes(channel_mult_noise=channel_mult_noise)
        require_positive(fourier_scale=fourier_scale)
        self.encoder, self.decoder = encoder, decoder

        self.map_noise: nn.Module = (
            PositionalEmbedding(noise, endpoint=True)
            if embedding == "positional"
            else FourierEmbedding(noise, scale=fourier_scale)
        )
        if cond_dim:
            self.map_label = nn.Linear(cond_dim, noise)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, noise, bias=False)
        self.map_layer0 = nn.Linear(noise, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        if two_times:
            self.map_second = SecondTime(noise, emb, cond_dim=cond_dim, augment_dim=augment_dim)
        if takes_guidance:
            self.map_guidance = nn.Linear(noise, emb, bias=False)

        def block(
            before: int, after: int, *, attention_here: bool, direction: Direction | None = None
        ) -> SongBlock:
            return SongBlock(
                before,
                after,
                emb,
                attention=attention_here,
                direction=direction,
                taps=resample_filter,
                dropout=dropout,
                backend=attention,
            )

        self.enc = nn.ModuleDict()
        width, aux, skips = channels, in_channels, [channels]
        for level, res in enumerate(self.resolutions):
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = conv3(in_channels, channels)
            else:
                down = block(width, width, attention_here=False, direction="down")
                self.enc[f"{res}x{res}_down"] = down
                if encoder == "skip":
                    self.enc[f"{res}x{res}_aux_down"] = Resample(resample_filter, "down")
                    self.enc[f"{res}x{res}_aux_skip"] = nn.Conv2d(aux, width, 1)
                if encoder == "residual":
                    residual = ConvDownsample(aux, width, 3, resample_filter)
                    self.enc[f"{res}x{res}_aux_residual"] = residual
                    aux = width
                skips.append(width)
            for i in range(num_blocks):
                after = channels * channel_mult[level]
                here = res in attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = block(width, after, attention_here=here)
                width = after
                skips.append(width)

        self.dec = nn.ModuleDict()
        for level, res in reversed(list(enumerate(self.resolutions))):
            deepest = level == len(self.resolutions) - 1
            if deepest:
                self.dec[f"{res}x{res}_in0"] = block(width, width, attention_here=True)
                self.dec[f"{res}x{res}_in1"] = block(width, width, attention_here=False)
            else:
                up = block(width, width, attention_here=False, direction="up")
                self.dec[f"{res}x{res}_up"] = up
            for i in range(num_blocks + 1):
                after = channels * channel_mult[level]
                here = i == num_blocks and res in attn_resolutions
                before = width + skips.pop()
                self.dec[f"{res}x{res}_block{i}"] = block(before, after, attention_here=here)
                width = after
            if decoder == "skip" or level == 0:
                if decoder == "skip" and not deepest:
                    self.dec[f"{res}x{res}_aux_up"] = Resample(resample_filter, "up")
                self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(width, _EPS)
                self.dec[f"{res}x{res}_aux_conv"] = conv3(width, out_channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier-uniform weights, times sqrt(0.2) before attention and 1e-5 before every sum.

        Zero for what second time and guidance add.
        """
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d | ResampleConv):
                continue
            last = name.rpartition(".")[-1]
            gain = 1.0
            if last in ("conv1", "proj") or last.endswith("aux_conv"):
                gain = 1e-5
            elif last == "qkv":
                gain = math.sqrt(0.2)
            elif name in ("map_second.layer", "map_guidance"):
                gain = 0.0
            nn.init.xavier_uniform_(module.weight, gain=gain)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def features(self, t: Tensor) -> Tensor:
        cosines, sines = self.map_noise(t).chunk(2, dim=1)
        return torch.cat([sines, cosines], dim=1).to(self.map_layer0.weight.dtype)

    def embed(self, given: Conditions) -> Tensor:
        given = given._replace(cond=given.cond * math.sqrt(self.cond_dim))
        emb = self.features(given.c_noise)
        if self.cond_dim:
            emb = emb + self.map_label(given.cond)
        if self.augment_dim:
            emb = emb + self.map_augment(given.augment)
        emb = self.added(self.map_layer0(emb), given)
        return F.silu(self.map_layer1(F.silu(emb)))

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
        return self._decode(*self._encode(x, emb), emb).to(x.dtype)

    def _encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        aux = x
        skips: list[Tensor] = []
        for level, res in enumerate(self.resolutions):
            at = f"{res}x{res}"
            if level == 0:
                x = self.enc[f"{at}_conv"](x)
            else:
                x = self.enc[f"{at}_down"](x, emb)
                if self.encoder == "skip":
                    aux = self.enc[f"{at}_aux_down"](aux)
                    x = x + self.enc[f"{at}_aux_skip"](aux)
                if self.encoder == "residual":
                    x = aux = (x + self.enc[f"{at}_aux_residual"](aux)) * math.sqrt(0.5)
            skips.append(x)
            for i in range(self.num_blocks):
                x = self.enc[f"{at}_block{i}"](x, emb)
                skips.append(x)
        return x, skips

    def _decode(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        deepest, full = self.resolutions[-1], self.resolutions[0]
        image: Tensor | None = None
        for res in reversed(self.resolutions):
            at = f"{res}x{res}"
            if res == deepest:
                x = self.dec[f"{at}_in1"](self.dec[f"{at}_in0"](x, emb), emb)
            else:
                x = self.dec[f"{at}_up"](x, emb)
            for i in range(self.num_blocks + 1):
                x = self.dec[f"{at}_block{i}"](torch.cat([x, skips.pop()], dim=1), emb)
            if self.decoder == "skip" or res == full:
                here = self.dec[f"{at}_aux_conv"](F.silu(self.dec[f"{at}_aux_norm"](x)))
                image = here if image is None else self.dec[f"{at}_aux_up"](image) + here
        assert image is not None
        return image
