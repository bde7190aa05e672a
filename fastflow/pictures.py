"""Pictures: grids of images, clouds of points, curves. Files appear whole or not at all."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from fastflow.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

MARGIN = 8
_HEADING = 24
BACKGROUND = (255, 255, 255)
SIDE = 64
MOST_COLUMNS = 16


def class_columns(classes: int) -> int | None:
    """One column per class where they fit side by side; None for no classes or many."""
    return classes if 2 <= classes <= MOST_COLUMNS else None


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, rounded; what lies outside is clamped, NaN is black."""
    values = ((images.float() + 1.0) * 127.5).round().clamp(0, 255)
    return torch.where(values.isnan(), 0.0, values).to(torch.uint8)


def grid(images: Tensor, columns: int | None = None, side: int = SIDE) -> Image:
    """Images [N, C, H, W] in [-1, 1], C 1 or 3, as one grid, small ones enlarged.

    Args:
        images: row by row.
        columns: images in a row; None makes the grid nearly square.
        side: smaller images are enlarged by a whole factor, to about this many pixels.
    """
    from PIL import Image

    count, _, height, width = images.shape
    factor = max(1, side // max(height, width))
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    gap = max(1, factor // 2)
    tiles = to_bytes(images).expand(count, 3, height, width)
    tiles = repeat(tiles, "n c y x -> n c (y down) (x across)", down=factor, across=factor)
    tiles = F.pad(tiles, (gap, 0, gap, 0, 0, 0, 0, rows * columns - count), value=255)
    canvas = rearrange(tiles, "(row column) c y x -> c (row y) (column x)", row=rows)
    canvas = F.pad(canvas, (0, gap, 0, gap), value=255)
    return Image.fromarray(rearrange(canvas, "c y x -> y x c").numpy())


def save_samples(samples: Tensor, path: Path, columns: int | None = None) -> None:
    """One PNG of samples: images [N, C, H, W] in [-1, 1] or points [N, 2].

    Raises:
        ConfigError: samples of another shape.
    """
    save_panels({"": samples}, path, columns)


def save_panels(panels: Mapping[str, Tensor], path: Path, columns: int | None = None) -> None:
    """Sets of samples of one kind side by side, each under its title, as a PNG.

    Args:
        panels: images [N, C, H, W] in [-1, 1], C 1 or 3, or points [N, 2], by title.
        path: the file; its folder is made.
        columns: images in a row, see `grid`.

    Raises:
        ConfigError: samples of another shape.
    """
    first = next(iter(panels.values()))
    if first.ndim == 4 and first.shape[1] in (1, 3):
        grids = {title: grid(images.cpu(), columns) for title, images in panels.items()}
        picture = _side_by_side(grids)
        _write(lambda file: picture.save(file, format="png"), path)
    elif first.ndim == 2 and first.shape[1] == 2:
        _write(_clouds(panels).savefig, path)
    else:
        raise ConfigError(
            f"pictures: samples of shape {tuple(first.shape[1:])} given; images of 1 or 3 "
            f"channels or points in the plane accepted"
        )


def save_rows(
    rows: Mapping[str, Mapping[str, Tensor]], path: Path, columns: int | None = None
) -> None:
    """Grids of images in a table, each row under its name and each column under its title, as PNG.

    Args:
        rows: images [N, C, H, W] in [-1, 1], C 1 or 3, by title, by name; all of one shape.
        path: the file; its folder is made.
        columns: images in a row of a grid, see `grid`.
    """
    from PIL import Image, ImageDraw, ImageFont

    grids = [
        {title: grid(images.cpu(), columns, side=SIDE // 2) for title, images in panels.items()}
        for panels in rows.values()
    ]
    font = ImageFont.load_default(size=16)
    left = max(math.ceil(font.getlength(name)) for name in rows) + 2 * MARGIN
    first = next(iter(grids[0].values()))
    across, down = first.width + MARGIN, first.height + MARGIN
    size = (left + across * max(map(len, grids)), MARGIN + _HEADING + down * len(grids))
    canvas = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for place, title in enumerate(grids[0]):
        draw.text((left + place * across, MARGIN), title, fill=(0, 0, 0), font=font)
    for row, (name, panels) in enumerate(zip(rows, grids, strict=True)):
        top = MARGIN + _HEADING + row * down
        draw.text((MARGIN, top + first.height // 2), name, fill=(0, 0, 0), font=font, anchor="lm")
        for place, panel in enumerate(panels.values()):
            canvas.paste(panel, (left + place * across, top))
    _write(lambda file: canvas.save(file, format="png"), path)


def save_curves(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Every value of a log over its steps, one small plot each, as a PNG.

    Args:
        records: each with a "step" and numbers by name.
        path: the file.
        title: above all plots.
    """
    from matplotlib.figure import Figure

    names = sorted({n for r in records for n in r} - {"step", "images", "seconds"})
    names.sort(key=lambda name: name != "loss")
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.0 * rows), layout="constrained")
    figure.suptitle(title)
    for number, name in enumerate(names, start=1):
        axes = figure.add_subplot(rows, columns, number)
        points = [(r["step"], r[name]) for r in records if name in r]
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        if min(value for _, value in points) > 0 and name in ("loss", "grad_norm"):
            axes.set_yscale("log")
        axes.set_xlabel("step")
    _write(figure.savefig, path)


def _side_by_side(pictures: Mapping[str, Image]) -> Image:
    from PIL import Image, ImageDraw, ImageFont

    heading = _HEADING if any(pictures) else 0
    width = sum(p.width + MARGIN for p in pictures.values()) + MARGIN
    height = max(p.height for p in pictures.values()) + heading + 2 * MARGIN
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=16)
    left = MARGIN
    for title, picture in pictures.items():
        draw.text((left, MARGIN), title, fill=(0, 0, 0), font=font)
        canvas.paste(picture, (left, MARGIN + heading))
        left += picture.width + MARGIN
    return canvas


def _clouds(panels: Mapping[str, Tensor]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(panels), 4.2), layout="constrained")
    # The data, which comes first, sets the frame: a few wild samples must not shrink the rest.
    first = next(iter(panels.values())).cpu()
    low, high = first.quantile(0.001, dim=0), first.quantile(0.999, dim=0)
    centre, half = (low + high) / 2, float((high - low).max()) * 0.65
    for number, (title, points) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        x, y = points.cpu().T.numpy()
        axes.scatter(x, y, s=3, alpha=0.5, linewidths=0)
        axes.set_title(title)
        axes.set_aspect("equal")
        axes.set_xlim(float(centre[0]) - half, float(centre[0]) + half)
        axes.set_ylim(float(centre[1]) - half, float(centre[1]) + half)
    return figure


def _write(save: Callable[[io.BytesIO], None], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    save(data)
    partial = path.with_suffix(".partial")
    partial.write_bytes(data.getvalue())
    os.replace(partial, path)
