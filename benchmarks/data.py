"""Samples per second of the loader, and what per-sample random numbers cost beside one call."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

import torch

from benchmarks.common import interleaved, machine, parsed, parser, print_table
from fastflow.data.dataset import Table
from fastflow.data.loader import Loader
from fastflow.distributed import World
from fastflow.rng import Draws

SHAPES = {"8x8 grey": (1, 8, 8), "32x32 colour": (3, 32, 32), "64x64 colour": (3, 64, 64)}


def main(argv: Sequence[str] | None = None) -> None:
    options = parsed(parser(__doc__ or ""), argv)
    device, batch = torch.device(options.device), options.batch or 256
    rows = [("samples", "what", "batch", "ms a batch", "samples/s")]
    for name, shape in SHAPES.items():
        pixels = torch.randint(0, 256, (4 * batch, *shape), dtype=torch.uint8)
        dataset = Table("noise", pixels, None, num_classes=0, flip=True)
        batches = Loader(dataset, batch, 0, World(device=device), cond_dim=0).batches()
        step = itertools.count()
        rows_of = tuple(range(batch))
        actions = {
            "loader": lambda batches=batches: next(batches),
            "noise, one stream per sample": lambda shape=shape, step=step, rows_of=rows_of: Draws(
                0, next(step), rows_of, device
            ).normal("eps", shape),
            "noise, one stream": lambda shape=shape: torch.randn(batch, *shape, device=device),
        }
        for what, seconds in interleaved(actions, options).items():
            median = statistics.median(seconds)
            rows.append((name, what, str(batch), f"{1000 * median:.2f}", f"{batch / median:,.0f}"))
    print_table(f"data, {machine(options)}", rows)


if __name__ == "__main__":
    main()
