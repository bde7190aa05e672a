"""Diffusion transformers: DiT (arXiv 2212.09748), as SiT (2401.08740) and MeanFlow (2505.13447) use
them for latents.

Parameter names are those of the published DiT and SiT files, so that these load strictly. What
`DiT` reads as `c_noise` is up to its wrapper: DiT counts diffusion steps 0 to 999, SiT and MeanFlow
read t in [0, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow.errors import ConfigError
from fastflow.raw import Conditions, RawNetwork
from networks.attention import Backend, attention
from networks.layers import (
    positional_features,
    require_labels,
    require_positive,
    require_probability,
    require_sizes,
    without_autocast,
    zero_,
)

_FREQUENCIES = 256
_STD = 0.02  # of the initial embeddings of times and classes
_EPS = 1e-6


def grid_positions(side: int, width: int) -> Tensor:
    """Fixed features of the tokens of a square grid, row by row: [side * side, width], float64.

    The first half of the features is of the column, the second of the row; each half holds sines,
    then cosines of the coordinate 0 .. side - 1 at width/4 frequencies falling from 1 to 1e-4 (not
    reached).
    """
    line = torch.arange(side, dtype=torch.float64)
    cosines, sines = positional_features(line, width // 2, endpoint=False).chunk(2, dim=1)
    features = torch.cat([sines, cosines], dim=1)
    return torch.cat([features.repeat(side, 1), features.repeat_interleave(side, 0)], dim=1)


def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) norm(h) + shift of tokens h [B, tokens, width], with shift, scale [B, 1, width].

    The norm has no weights of its own, which under autocast would part the types of primal and
    tangent, and which the compiler cannot trace in forward mode.
    """
    return F.layer_norm(h, h.shape[-1:], eps=_EPS) * (1 + scale) + shift


class PatchEmbedder(nn.Module):
    """Images [B, channels, R, R] to tokens [B, (R / patch_size)^2, width], row by row."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ScalarEmbedder(nn.Module):
    """A time or a guidance scale [B] to [B, width]: sinusoidal features and two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, last = nn.Linear(_FREQUENCIES, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)
        for layer in (first, last):
            nn.init.normal_(layer.weight, std=_STD)
            nn.init.zeros_(layer.bias)

    def features(self, t: Tensor) -> Tensor:
        """128 cosines, then 128 sines of t [B], in the type of t."""
        return positional_features(t, _FREQUENCIES, endpoint=False)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.features(t).to(next(self.parameters()).dtype))


class ClassEmbedder(nn.Module):
    """Class rows [B, classes] to [B, width]: products with a table of one row per class.

    With a null class the table has one more row, which counts by what a class row lacks to the sum
    1: a one-hot row gives its row of the table, a zero row the null class's, both to the bit.
    """

    def __init__(self, classes: int, width: int, *, null_class: bool) -> None:
        super().__init__()
        self.null_class = null_class
        self.embedding_table = nn.Embedding(classes + int(null_class), width)
        nn.init.normal_(self.embedding_table.weight, std=_STD)

    def forward(self, rows: Tensor) -> Tensor:
        if self.null_class:
            rows = torch.cat([rows, 1 - rows.sum(dim=1, keepdim=True)], dim=1)
        return rows @ self.embedding_table.weight


class SelfAttention(nn.Module):
    """Attention of tokens [B, tokens, width] to each other."""

    def __init__(self, width: int, heads: int, backend: Backend) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        parts = self.qkv(h).unflatten(2, (3, self.heads, -1))  # [B, tokens, 3, heads, channels]
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind()
        out = attention(q, k, v, self.backend)
        return self.proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two layers with the tanh form of GELU between them, on each token by itself."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, h: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


def modulation(width: int, parts: int) -> nn.Sequential:
    """From a condition [B, width] to `parts` times as much, all zero at initialisation."""
    last = nn.Linear(width, parts * width)
    zero_([last])
    return nn.Sequential(nn.SiLU(), last)


class DiTBlock(nn.Module):
    """Attention, then feed-forward, each modulated and gated by the condition (adaLN-Zero).

    The identity at initialisation (arXiv 2212.09748, section 3.2).
    """

    def __init__(self, width: int, heads: int, inner: int, backend: Backend) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads, backend)
        self.mlp = FeedForward(width, inner)
        self.adaLN_modulation = modulation(width, 6)
        for layer in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            _xavier(layer)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """h [B, tokens, width], c [B, width] -> [B, tokens, width]."""
        parts = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        h = h + gate * self.attn(modulated(h, shift, scale))
        return h + mlp_gate * self.mlp(modulated(h, mlp_shift, mlp_scale))


class FinalLayer(nn.Module):
    """From tokens to the values of their patches, zero at initialisation."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = modulation(width, 2)
        zero_([self.linear])

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """h [B, tokens, width], c [B, width] -> [B, tokens, outputs]."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulated(h, shift, scale))


class DiT(RawNetwork):
    """A diffusion transformer with adaLN-Zero; the defaults are DiT-B/2 on latents of 32 x 32.

    Published sizes (hidden_size, depth, num_heads): S (384, 12, 6), B (768, 12, 12),
    L (1024, 24, 16), XL (1152, 28, 16), with patches of 2, 4 or 8.

    Args:
        resolution: side of the square images or latents.
        patch_size: side of a patch; it divides `resolution`.
        in_channels: channels of the input.
        hidden_size: width of a token, a multiple of 4.
        depth: number of blocks.
        num_heads: attention heads; a divisor of `hidden_size`.
        mlp_ratio: width inside the feed-forward layers over `hidden_size`.
        cond_dim: number of classes, the width of class rows; 0 for none.
        null_class: whether the class table has a row for no class, which a zero class row means;
            without it a zero row adds nothing.
        learn_sigma: whether as many channels again follow the first `in_channels` of the output.
        label_dropout: probability that a class row is zeroed in training.
        two_times: whether a second time is taken.
        takes_guidance: whether a guidance scale is taken.
        attention: see `networks.attention`.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        resolution: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        cond_dim: int = 0,
        null_class: bool = True,
        learn_sigma: bool = False,
        label_dropout: float = 0.0,
        two_times: bool = False,
        takes_guidance: bool = False,
        attention: Backend = "auto",
    ) -> None:
        super().__init__()
        require_sizes(
            resolution=resolution,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
        )
        require_positive(mlp_ratio=mlp_ratio)
        require_labels(cond_dim=cond_dim)
        require_probability(label_dropout=label_dropout)
        if resolution % patch_size:
            raise ConfigError(
                f"patch_size: {patch_size} given, a divisor of the resolution {resolution} accepted"
            )
        if hidden_size % num_heads or hidden_size % 4:
            raise ConfigError(
                f"hidden_size: {hidden_size} given, a multiple of 4 and of num_heads={num_heads} "
                f"accepted"
            )
        self.sample_shape = (in_channels, resolution, resolution)
        self.cond_dim, self.label_dropout = cond_dim, label_dropout
        self.two_times, self.takes_guidance = two_times, takes_guidance
        self.patch_size, self.side = patch_size, resolution // patch_size
        inner = max(round(hidden_size * mlp_ratio), 1)

        # A buffer, for nothing trains it; in the state dict, where published files have it.
        positions = grid_positions(self.side, hidden_size)
        self.register_buffer("pos_embed", positions[None].to(torch.get_default_dtype()))
        self.x_embedder = PatchEmbedder(in_channels, patch_size, hidden_size)
        _xavier(self.x_embedder.proj)
        self.t_embedder = ScalarEmbedder(hidden_size)
        if cond_dim:
            self.y_embedder = ClassEmbedder(cond_dim, hidden_size, null_class=null_class)
        if two_times:
            self.s_embedder = ScalarEmbedder(hidden_size)
            zero_([self.s_embedder.mlp[-1]])
        if takes_guidance:
            self.w_embedder = ScalarEmbedder(hidden_size)
            zero_([self.w_embedder.mlp[-1]])
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, inner, attention) for _ in range(depth)
        )
        outputs = patch_size**2 * in_channels * (2 if learn_sigma else 1)
        self.final_layer = FinalLayer(hidden_size, outputs)

    def shard_units(self) -> list[nn.Module]:
        """The transformer blocks."""
        return list(self.blocks)

    def additions(self) -> tuple[str, ...]:
        return ("s_embedder.",) * self.two_times + ("w_embedder.",) * self.takes_guidance

    def embed(self, given: Conditions) -> Tensor:
        """The sum [B, hidden_size] of the embeddings of all conditions."""
        c = self.t_embedder(given.c_noise)
        if self.cond_dim:
            c = c + self.y_embedder(given.cond)
        if given.c_second is not None:
            c = c + self.s_embedder(given.c_second)
        if given.guidance is not None:
            c = c + self.w_embedder(given.guidance)
        return c

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
            c_noise: times [B], float32 or float64.
            cond: class rows [B, cond_dim], or None for zero rows.
            augment: not taken: anything but None or rows of width 0 raises ConfigError.
            c_second: second times [B] like `c_noise`, exactly where `two_times`.
            guidance: guidance scales [B] like `c_noise`, or None for ones.

        Returns:
            [B, in_channels, resolution, resolution], in the type of `x`; twice the channels with
            `learn_sigma`.
        """
        given = self.conditions(c_noise, cond, augment, c_second, guidance)
        with without_autocast(c_noise):
            c = self.embed(given)
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        patches = self.final_layer(h, c)  # values of a patch: rows, columns, channels
        tiles = patches.unflatten(2, (self.patch_size, self.patch_size, -1))
        tiles = tiles.unflatten(1, (self.side, self.side))
        image = tiles.permute(0, 5, 1, 3, 2, 4)  # [B, channels, side, patch_size, side, patch_size]
        return image.flatten(4).flatten(2, 3).to(x.dtype)


def _xavier(layer: nn.Linear | nn.Conv2d) -> None:
    """Weights as of a linear layer (a patch is its input), biases zero."""
    nn.init.xavier_uniform_(layer.weight.detach().flatten(1))
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
