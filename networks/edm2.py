"""EDM2's magnitude-preserving U-Net as a raw network F of the EDM preconditioning.

arXiv 2312.02696, configuration G: activations, weights and updates keep their expected magnitude,
because every layer uses normalised weights, every sum and concatenation is scaled to unit variance,
and there are no biases and no group norms. Parameter names are those of the published checkpoints
behind `unet.`; their numbers without a dimension have shape [1] here.

Weights are normalised where they are used, at every forward pass, and are never rewritten there:
the forced normalisation of the stored weights (section 2.3 of the paper) is `after_step()`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from fastflow.errors import ConfigError, one_of
from fastflow.raw import Conditions, RawNetwork, require_full_precision
from networks.attention import Backend, attention
from networks.layers import (
    Direction,
    positional_features,
    require_labels,
    require_positive,
    require_probability,
    require_sizes,
    without_autocast,
)

_EPS = 1e-4
_SILU_MAGNITUDE = 0.596  # root mean square of silu(z) for z ~ N(0, 1)


# Magnitude-preserving operations (sections 2.2, 2.3 and 2.5 of the paper)


def normalize(x: Tensor, dim: int | None = None) -> Tensor:
    """Scale to unit root mean square over `dim`, or over all dimensions but the first.

    Divides by eps + ||x|| / sqrt(n) over n elements, eps = 1e-4, computed in float32 or wider.
    """
    dims = tuple(range(1, x.ndim)) if dim is None else (dim,)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=dims, keepdim=True)
    count = math.prod([x.shape[d] for d in dims])  # also of no rows, in an empty shard
    return (wide / (_EPS + norm / math.sqrt(count))).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU of unit magnitude for a standard normal input."""
    return F.silu(x) / _SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b, of unit magnitude for uncorrelated a, b of unit magnitude."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Channels of a [B, Ca, ...], then of b [B, Cb, ...], contributing as 1 - t to t.

    The magnitude of the whole is one for parts of magnitude one, and the shares do not depend on
    the numbers of channels.
    """
    whole = math.sqrt(a.shape[1] + b.shape[1]) / math.hypot(1 - t, t)
    scaled_a = a * (whole * (1 - t) / math.sqrt(a.shape[1]))
    return torch.cat([scaled_a, b * (whole * t / math.sqrt(b.shape[1]))], dim=1)


def resample(x: Tensor, taps: tuple[int, ...], direction: Direction) -> Tensor:
    """Halve or double the resolution of x [B, C, H, W] with a separable filter of even length."""
    if taps == (1, 1):  # the same numbers as below, several times faster
        if direction == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    channels, padding = x.shape[1], (len(taps) - 1) // 2
    line = torch.tensor(taps, dtype=x.dtype, device=x.device) / sum(taps)
    kernel = torch.outer(line, line).expand(channels, 1, -1, -1)
    if direction == "down":
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)


class MPFourier(nn.Module):
    """sqrt(2) cos(f t + phase): t [B] to [B, channels] in the type of t.

    Frequencies f ~ N(0, (2 pi bandwidth)^2) and phases ~ U(0, 2 pi) are fixed.
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int, bandwidth: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * bandwidth * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, t: Tensor) -> Tensor:
        phase = torch.outer(t, self.freqs.to(t.dtype)) + self.phases.to(t.dtype)
        return math.sqrt(2) * phase.cos()


class MPPositional(nn.Module):
    """`positional_features` of bandwidth * t times sqrt(2): exactly of unit magnitude.

    Smoother in t than Fourier features; consistency training in continuous time asks for it
    (arXiv 2410.11081, section 4.1).
    """

    def __init__(self, channels: int, bandwidth: float = 1.0) -> None:
        super().__init__()
        if channels % 2:
            raise ConfigError(
                f"channels: {channels} features of the noise level, an even number accepted by "
                f"embedding 'positional'"
            )
        self.channels, self.bandwidth = channels, bandwidth

    def forward(self, t: Tensor) -> Tensor:
        features = positional_features(self.bandwidth * t, self.channels, endpoint=False)
        return math.sqrt(2) * features


class MPConv(nn.Module):
    """Convolution or linear layer without bias whose output has the magnitude of its input.

    Every row of the weight (one output channel) is used normalised to length 1, whatever its
    stored length; the stored one is meant to be sqrt(fan-in), see `normalize_weight`.

    Args:
        in_channels, out_channels: widths.
        kernel: (size, size), odd, keeping the resolution; () for a linear layer.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(normalize(torch.randn(out_channels, in_channels, *kernel)))

    def forward(self, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        """Runs in the type of x [B, in_channels, ...]; `gain` is a number or a tensor [1]."""
        wide = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        weight = normalize(wide) * (gain / math.sqrt(wide[0].numel()))
        weight = weight.to(x.dtype)
        if weight.ndim == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    @torch.no_grad()
    def normalize_weight(self) -> None:
        """Forced weight normalisation: set every row to length sqrt(fan-in), in place.

        A sharded weight must hold whole rows, as FSDP's sharding of the first dimension does.
        """
        weight: Tensor = self.weight
        if isinstance(weight, DTensor):
            assert all(p in (Shard(0), Replicate()) for p in weight.placements)
            weight = weight.to_local()
        weight.copy_(normalize(weight))


def normalize_weights(module: nn.Module) -> None:
    """`MPConv.normalize_weight` on every such layer in the module."""
    for layer in module.modules():
        if isinstance(layer, MPConv):
            layer.normalize_weight()


class LogVariance(nn.Module):
    """The learned log-variance u(c_noise) of a loss over noise levels, for any network.

    The loss is L / exp(u) + u (arXiv 2312.02696, equation 21).

    Args:
        channels: Fourier features of the noise level.
        bandwidth: of their frequencies.
    """

    def __init__(self, channels: int = 128, bandwidth: float = 1.0) -> None:
        super().__init__()
        require_sizes(channels=channels)
        require_positive(bandwidth=bandwidth)
        self.fourier = MPFourier(channels, bandwidth)
        self.linear = MPConv(channels, 1, ())

    def forward(self, c_noise: Tensor) -> Tensor:
        """c_noise [B], float32 or float64, to u [B] in the same type."""
        require_full_precision("c_noise", c_noise)
        with without_autocast(c_noise):
            u: Tensor = self.linear(self.fourier(c_noise))
        return u.squeeze(1).clone()  # FSDP wants no views

    def after_step(self) -> None:
        """Forced weight normalisation."""
        normalize_weights(self)


# The network


class _AddedEmbedding(nn.Module):
    """An embedding of one more number, times a learnt gain that is zero at first.

    Magnitude-preserving layers cannot start at zero, so the gain does.
    """

    def __init__(self, features: nn.Module, width: int, emb_channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(1))
        self.features = features
        self.linear = MPConv(width, emb_channels, ())

    def forward(self, value: Tensor) -> Tensor:
        """value [B] -> [B, emb_channels]."""
        out: Tensor = self.linear(self.features(value), gain=self.gain)
        return out


class EDM2Block(nn.Module):
    """Residual block: two convolutions, modulated by the embedding; then self-attention.

    Args:
        in_channels, out_channels: widths before and after.
        emb_channels: width of the embedding.
        role: "encoder" blocks change the width and normalise each pixel before branch and shortcut
            part; in "decoder" blocks each changes the width by itself.
        direction: how the resolution changes first, None for not at all.
        taps: filter of that change.
        heads: attention heads; 0 for no attention.
        dropout: probability before the second convolution.
        res_balance, attn_balance: shares of the branch and of attention in their sums.
        clip_act: bound on the absolute value of outputs; None for none.
        backend: see `networks.attention`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        role: Literal["encoder", "decoder"],
        direction: Direction | None = None,
        taps: tuple[int, ...] = (1, 1),
        heads: int = 0,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.role, self.direction, self.taps = role, direction, taps
        self.heads, self.dropout, self.backend = heads, dropout, backend
        self.res_balance, self.attn_balance = res_balance, attn_balance
        self.clip_act = clip_act
        self.emb_gain = nn.Parameter(torch.zeros(1))
        branch = out_channels if role == "encoder" else in_channels
        self.conv_res0 = MPConv(branch, out_channels, (3, 3))
        self.emb_linear = MPConv(emb_channels, out_channels, ())
        self.conv_res1 = MPConv(out_channels, out_channels, (3, 3))
        self.conv_skip: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.conv_skip = MPConv(in_channels, out_channels, (1, 1))
        if heads:
            self.attn_qkv = MPConv(out_channels, 3 * out_channels, (1, 1))
            self.attn_proj = MPConv(out_channels, out_channels, (1, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, in_channels, H, W], emb [B, emb_channels] -> [B, out_channels, H', W']."""
        if self.direction is not None:
            x = resample(x, self.taps, self.direction)
        if self.role == "encoder":
            x = normalize(self.conv_skip(x), dim=1)
        h = self._branch(x, emb)
        if self.role == "decoder":
            x = self.conv_skip(x)
        x = mp_sum(x, h, self.res_balance)
        if self.heads:
            x = mp_sum(x, self._attend(x), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def _branch(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        h = mp_silu(h * scale[:, :, None, None].to(h.dtype))
        out: Tensor = self.conv_res1(F.dropout(h, self.dropout, training=self.training))
        return out

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # Channel order of the checkpoints: head, channel of the head, q | k | v.
        parts = (batch, self.heads, channels // self.heads, 3, height * width)
        qkv = self.attn_qkv(x).reshape(parts).permute(3, 0, 1, 4, 2)
        # Fused kernels take no other layout.
        q, k, v = normalize(qkv.contiguous(), dim=-1).unbind()
        out = attention(q, k, v, self.backend)
        return self.attn_proj(out.transpose(-2, -1).reshape(x.shape))


class EDM2UNet(RawNetwork):
    """The U-Net of EDM2 (configuration G); XS to XXL have 128 to 448 `channels`.

    Args:
        resolution: side of the square images or latents.
        in_channels: channels of the input and of the output.
        cond_dim: width of class rows; 0 for none.
        channels: base width, 192 in S, 384 in XL; level i has `channels * channel_mult[i]`.
        channel_mult: width multipliers from the full resolution down.
        channel_mult_noise: features of the noise level over `channels`; None for the first of
            `channel_mult`.
        channel_mult_emb: width of the embedding over `channels`; None for the largest of
            `channel_mult`.
        num_blocks: residual blocks per level.
        attn_resolutions: resolutions with self-attention.
        channels_per_head: width of one attention head.
        label_balance, concat_balance, res_balance, attn_balance: the second operand's share, in
            [0, 1], in sums of time and label embeddings, in concatenations with encoder outputs,
            and in sums with residual branches and with attention.
        clip_act: bound on the absolute value of activations; None for none.
        resample_filter: taps of the filter that changes the resolution.
        dropout: probability in the blocks of `dropout_resolutions`.
        dropout_resolutions: resolutions with dropout; None for all.
        embedding: features of the noise level (and of the second time and the guidance scale).
        bandwidth: factor on their frequencies.
        label_dropout: probability that a class row is zeroed in training.
        two_times: take a second time.
        takes_guidance: take a guidance scale.
        attention: see `networks.attention`.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        resolution: int,
        in_channels: int = 3,
        cond_dim: int = 0,
        channels: int = 192,
        channel_mult: tuple[int, ...] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: tuple[int, ...] = (16, 8),
        channels_per_head: int = 64,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
        resample_filter: tuple[int, ...] = (1, 1),
        dropout: float = 0.0,
        dropout_resolutions: tuple[int, ...] | None = None,
        embedding: Literal["fourier", "positional"] = "fourier",
        bandwidth: float = 1.0,
        label_dropout: float = 0.0,
        two_times: bool = False,
        takes_guidance: bool = False,
        attention: Backend = "auto",
    ) -> None:
        super().__init__()
        require_sizes(
            num_blocks=num_blocks,
            in_channels=in_channels,
            resolution=resolution,
            channels=channels,
            channels_per_head=channels_per_head,
        )
        require_labels(cond_dim=cond_dim)
        require_probability(dropout=dropout, label_dropout=label_dropout)
        _require_shares(
            label_balance=label_balance,
            concat_balance=concat_balance,
            res_balance=res_balance,
            attn_balance=attn_balance,
        )
        resolutions = _resolutions(resolution, channel_mult)
        dropped = resolutions if dropout_resolutions is None else dropout_resolutions
        _require_levels(resolutions, attn_resolutions=attn_resolutions, dropout_resolutions=dropped)
        _require_taps(resample_filter)
        require_positive(bandwidth=bandwidth)
        if clip_act is not None:
            require_positive(clip_act=clip_act)

        self.sample_shape = (in_channels, resolution, resolution)
        self.cond_dim, self.label_dropout = cond_dim, label_dropout
        self.two_times, self.takes_guidance = two_times, takes_guidance
        self.label_balance, self.concat_balance = label_balance, concat_balance
        widths = [channels * mult for mult in channel_mult]
        noise_mult = channel_mult[0] if channel_mult_noise is None else channel_mult_noise
        emb_mult = max(channel_mult) if channel_mult_emb is None else channel_mult_emb
        require_sizes(channel_mult_noise=noise_mult, channel_mult_emb=emb_mult)
        noise, emb = channels * noise_mult, channels * emb_mult

        def features() -> nn.Module:
            kind = MPFourier if embedding == "fourier" else MPPositional
            return kind(noise, bandwidth)

        def block(
            role: Literal["encoder", "decoder"],
            before: int,
            after: int,
            res: int,
            *,
            attend: bool = False,
            direction: Direction | None = None,
        ) -> EDM2Block:
            if attend and after % channels_per_head:
                raise ConfigError(
                    f"channels_per_head: {channels_per_head} given, a divisor of {after}, the "
                    f"width at resolution {res}, accepted"
                )
            return EDM2Block(
                before,
                after,
                emb,
                role=role,
                direction=direction,
                taps=resample_filter,
                heads=after // channels_per_head if attend else 0,
                dropout=dropout if res in dropped else 0.0,
                res_balance=res_balance,
                attn_balance=attn_balance,
                clip_act=clip_act,
                backend=attention,
            )

        self.out_gain = nn.Parameter(torch.zeros(1))
        self.emb_fourier = features()  # named as in the checkpoints, whatever its kind
        self.emb_noise = MPConv(noise, emb, ())
        if cond_dim:
            self.emb_label = MPConv(cond_dim, emb, ())
        if two_times:
            self.emb_second = _AddedEmbedding(features(), noise, emb)
        if takes_guidance:
            self.emb_guidance = _AddedEmbedding(features(), noise, emb)

        self.enc = nn.ModuleDict()
        skips = [widths[0]]
        width = widths[0]
        for level, (res, after) in enumerate(zip(resolutions, widths, strict=True)):
            if level == 0:  # one more input channel, see `forward`
                self.enc[f"{res}x{res}_conv"] = MPConv(in_channels + 1, width, (3, 3))
            else:
                self.enc[f"{res}x{res}_down"] = block(
                    "encoder", width, width, res, direction="down"
                )
                skips.append(width)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(
                    "encoder", width, after, res, attend=res in attn_resolutions
                )
                width = after
                skips.append(width)

        self.dec = nn.ModuleDict()
        for res, after in reversed(list(zip(resolutions, widths, strict=True))):
            if res == resolutions[-1]:
                self.dec[f"{res}x{res}_in0"] = block("decoder", width, width, res, attend=True)
                self.dec[f"{res}x{res}_in1"] = block("decoder", width, width, res)
            else:
                self.dec[f"{res}x{res}_up"] = block("decoder", width, width, res, direction="up")
            for i in range(num_blocks + 1):
                before = width + skips.pop()
                self.dec[f"{res}x{res}_block{i}"] = block(
                    "decoder", before, after, res, attend=res in attn_resolutions
                )
                width = after
        self.out_conv = MPConv(width, in_channels, (3, 3))

    def shard_units(self) -> list[nn.Module]:
        """The residual blocks."""
        return [module for module in self.modules() if isinstance(module, EDM2Block)]

    def additions(self) -> tuple[str, ...]:
        names = [("emb_second.", self.two_times), ("emb_guidance.", self.takes_guidance)]
        return tuple(name for name, there in names if there)

    def after_step(self) -> None:
        """Forced weight normalisation."""
        normalize_weights(self)

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
            augment: None; there are no augmentation labels.
            c_second: second times [B] like `c_noise`, exactly where `two_times`.
            guidance: guidance scales [B] like `c_noise`, or None for ones.

        Returns:
            [B, in_channels, resolution, resolution], in the type of `x`.
        """
        given = self.conditions(c_noise, cond, augment, c_second, guidance)
        with without_autocast(c_noise):
            emb = self._embed(given)
        # A channel of ones stands in for the biases that the layers lack.
        h = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips: list[Tensor] = []
        for unit in self.enc.values():
            h = unit(h, emb) if isinstance(unit, EDM2Block) else unit(h)
            skips.append(h)
        for name, unit in self.dec.items():
            if "block" in name:
                h = mp_cat(h, skips.pop(), self.concat_balance)
            h = unit(h, emb)
        out: Tensor = self.out_conv(h, gain=self.out_gain)
        return out.to(x.dtype)

    def _embed(self, given: Conditions) -> Tensor:
        emb: Tensor = self.emb_noise(self.emb_fourier(given.c_noise))
        if self.cond_dim:  # one-hot rows times this have unit magnitude
            label = self.emb_label(given.cond * math.sqrt(self.cond_dim))
            emb = mp_sum(emb, label, self.label_balance)
        if given.c_second is not None:
            emb = emb + self.emb_second(given.c_second)
        if given.guidance is not None:
            emb = emb + self.emb_guidance(given.guidance)
        return mp_silu(emb)


def _resolutions(resolution: int, channel_mult: tuple[int, ...]) -> tuple[int, ...]:
    """Sides of the feature maps, from the full resolution down; ConfigError where none fit."""
    if not channel_mult or min(channel_mult) < 1:
        raise ConfigError(
            f"channel_mult: {channel_mult} given, at least one positive whole number accepted"
        )
    halvings = len(channel_mult) - 1
    if resolution % 2**halvings:
        raise ConfigError(
            f"resolution: {resolution} cannot be halved {halvings} times, as channel_mult "
            f"{channel_mult} asks; shorten channel_mult or pad the images"
        )
    return tuple(resolution >> level for level in range(len(channel_mult)))


def _require_levels(resolutions: tuple[int, ...], **wanted: tuple[int, ...]) -> None:
    """Raise ConfigError for a wanted resolution that the network does not have."""
    for name, sides in wanted.items():
        for side in sides:
            if side not in resolutions:
                raise ConfigError(
                    f"{name}: the network has no resolution {side}; "
                    f"{one_of(side, map(str, resolutions))}"
                )


def _require_shares(**values: float) -> None:
    """Raise ConfigError unless every named value lies in [0, 1]."""
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ConfigError(f"{name}: {value} given, 0 <= {name} <= 1 accepted")


def _require_taps(taps: tuple[int, ...]) -> None:
    """Raise ConfigError unless `resample` can use the filter."""
    if len(taps) % 2 or not taps or sum(taps) <= 0:
        raise ConfigError(
            f"resample_filter: {taps} given, an even number of taps with a positive sum "
            f"accepted, e.g. (1, 1) or (1, 3, 3, 1)"
        )
