"""The vision transformer of DINOv2 (arXiv 2304.07193) and how images come to it."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention

from fastflow.torchvision_shim import import_beside_torchvision

Resize: TypeAlias = Literal["bicubic", "bilinear"]

SIDE = 224
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class DINOv2ViT(nn.Module):
    """Images [B, 3, H, W], normalised, to the class token after the last norm [B, width].

    Names and shapes of the weights are those of the published files. The defaults are ViT-L/14,
    which was trained at 518 x 518; for other sizes its position table is interpolated.

    Args:
        width: features.
        depth: blocks.
        heads: attention heads.
        patch: side of a patch.
        grid: patches along a side of the position table.
    """

    def __init__(
        self, width: int = 1024, depth: int = 24, heads: int = 16, patch: int = 14, grid: int = 37
    ) -> None:
        super().__init__()
        self.grid, self.patch = grid, patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # in the files, only for training
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed["proj"](x)
        positions = self._positions(tokens.shape[-2], tokens.shape[-1])
        tokens = tokens.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1) + positions
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.norm(x)[:, 0]
        return features

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The position table [1, 1 + rows columns, width]."""
        if (rows, columns) == (self.grid, self.grid):
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        # The official code interpolates by these factors, a tenth of a patch off the exact ones.
        factors = [(n + 0.1) / self.grid for n in (rows, columns)]
        table = interpolate(table, scale_factor=factors, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], 1)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.ls1 = _Scale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _Perceptron(width)
        self.ls2 = _Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class _Perceptron(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(gelu(self.fc1(x)))
        return out


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def prepare(images: Tensor, resize: Resize) -> Tensor:
    """uint8 images [B, 3, H, W] as the transformer sees them, [B, 3, 224, 224] float32.

    Args:
        images: of any size.
        resize: "bicubic" with antialiasing, as EDM2's calculate_metrics.py (FD-DINOv2 figures of
            the literature), or "bilinear" without, as torch-fidelity's extractor.
    """
    x = images.float()
    if resize == "bicubic":
        x = interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True)
    else:
        module = import_beside_torchvision(
            "torch_fidelity.interpolate_compat_tensorflow", "DINOv2(resize='bilinear')", "eval"
        )
        x = module.interpolate_bilinear_2d_like_tensorflow1x(x, (SIDE, SIDE), align_corners=False)
    mean, std = (x.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return (x / 255 - mean) / std


class DINOv2Features(nn.Module):
    """uint8 images [B, 3, H, W] to (features [B, width],)."""

    def __init__(self, net: DINOv2ViT, resize: Resize) -> None:
        super().__init__()
        self.net, self.resize = net, resize

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.net(prepare(images, self.resize)),)
