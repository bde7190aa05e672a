"""The U-Net of OpenAI's consistency models in small, as its papers describe it, for tests.

ADM (arXiv 2105.05233, section 3 and appendix A) with attention in blocks q | k | v. Modules are
nested so that tensors have the names of the published files.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 64


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width)


def conv(before: int, after: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, padding=size // 2)


class Residual(nn.Module):
    """Residual block; `factor` 2 doubles the resolution, 0.5 halves it."""

    def __init__(self, before: int, after: int, emb: int, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.in_layers = nn.Sequential(norm(before), nn.SiLU(), conv(before, after))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * after))
        self.out_layers = nn.Sequential(norm(after), nn.SiLU(), nn.Dropout(), conv(after, after))
        self.skip_connection = nn.Identity() if before == after else conv(before, after, 1)

    def resize(self, x: Tensor) -> Tensor:
        if self.factor == 2:
            return x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        return x if self.factor == 1 else F.avg_pool2d(x, 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resize(F.silu(self.in_layers[0](x))))
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.skip_connection(self.resize(x)) + self.out_layers[3](F.silu(h))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.qkv = conv(width, 3 * width, 1)
        self.proj_out = conv(width, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(1, (-1, HEAD)).transpose(-2, -1)  # [B, heads, tokens, 64]
            for part in self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        )
        mixed = ((q @ k.mT) / HEAD**0.5).softmax(-1) @ v
        return x + self.proj_out(mixed.mT.flatten(1, 2).view_as(x))


class OpenAIUNet(nn.Module):
    """F(x, t, class) with t = 1000 ln(sigma)/4; `attended` are levels, 0 the finest."""

    def __init__(
        self,
        channels: int = 128,
        mult: tuple[int, ...] = (1, 2),
        blocks: int = 1,
        attended: tuple[int, ...] = (1,),
        classes: int = 5,
    ) -> None:
        super().__init__()
        self.channels, emb = channels, 4 * channels
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb = nn.Embedding(classes, emb) if classes else None

        def stage(before: int, level: int) -> nn.ModuleList:
            width = channels * mult[level]
            here = [Attention(width)] if level in attended else []
            return nn.ModuleList([Residual(before, width, emb), *here])

        width = channels * mult[0]
        self.input_blocks = nn.ModuleList([nn.ModuleList([conv(3, width)])])
        skips = [width]
        for level in range(len(mult)):
            if level:
                self.input_blocks.append(nn.ModuleList([Residual(width, width, emb, 0.5)]))
                skips.append(width)
            for _ in range(blocks):
                self.input_blocks.append(stage(width, level))
                width = channels * mult[level]
                skips.append(width)
        self.middle_block = nn.ModuleList(
            [Residual(width, width, emb), Attention(width), Residual(width, width, emb)]
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(mult))):
            for i in range(blocks + 1):
                last = stage(width + skips.pop(), level)
                width = channels * mult[level]
                if level and i == blocks:
                    last.append(Residual(width, width, emb, 2))
                self.output_blocks.append(last)
        self.out = nn.Sequential(norm(width), nn.SiLU(), conv(width, 3))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        half = self.channels // 2
        rates = 10_000.0 ** (-torch.arange(half, dtype=t.dtype) / half)
        angles = t[:, None] * rates
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        if self.label_emb is not None:
            emb = emb + self.label_emb(labels)
        (first,), *others = self.input_blocks
        x = first(x)
        skips = [x]
        for stage in others:
            for layer in stage:
                x = layer(x, emb)
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, emb)
        for stage in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for layer in stage:
                x = layer(x, emb)
        return self.out(x)
