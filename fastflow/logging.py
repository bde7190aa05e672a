"""What loggers share: means accumulated on the device, records of a moment, JSON-lines files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastflow.distributed import World
from fastflow.state import TrainState


class Averages:
    """Means of scalars over steps, kept where the scalars live: `add` never waits for a device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Count one value of each name."""
        for name, value in values.items():
            plain = value.detach() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums.get(name, 0.0) + plain
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, world: World) -> dict[str, float]:
        """The means since the last reading, also over processes: every process must call it."""
        names = list(self._sums)
        if not names:
            return {}
        means = [self._sums[name] / self._counts[name] for name in names]
        stacked = torch.stack([_scalar(mean, world.device) for mean in means])
        self._sums, self._counts = {}, {}
        return dict(zip(names, world.mean(stacked).tolist(), strict=True))


def _scalar(value: Tensor | float, device: torch.device) -> Tensor:
    """In float64, so that plain numbers come out as they went in."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64).reshape(())
    return torch.tensor(value, dtype=torch.float64, device=device)


class StepLog:
    """Gathers what every logger writes of the steps since its last record.

    Args:
        every: steps between records.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._averages = Averages()
        self._since = time.monotonic()
        self._images = 0
        self._recorded = -1

    def start(self, state: TrainState) -> None:
        """Start the clock that the speed is measured by."""
        self._since = time.monotonic()
        self._images, self._recorded = state.images, state.step

    def add(self, state: TrainState) -> dict[str, float] | None:
        """Count a step; every `every` steps, the record. Every process must call it."""
        self._averages.add(state.metrics)
        return self._record(state) if state.step % self._every == 0 else None

    def rest(self, state: TrainState) -> dict[str, float] | None:
        """The record of the steps after the last full interval, if there are any."""
        return self._record(state) if state.step > self._recorded else None

    def _record(self, state: TrainState) -> dict[str, float]:
        means = self._averages.read(state.world)
        now = time.monotonic()
        speed = (state.images - self._images) / max(now - self._since, 1e-9)
        self._images, self._since, self._recorded = state.images, now, state.step
        return {
            "step": state.step,
            "images": state.images,
            "seconds": round(state.seconds, 3),
            "images_per_second": round(speed, 2),
            **{f"curriculum/{name}": value for name, value in state.curriculum.items()},
            # Nine digits hold a float32; the rest would be the rounding of the mean.
            **{name: float(f"{value:.9g}") for name, value in means.items()},
        }


class JsonLines:
    """A file with one JSON object per line, each with a "step", in order of steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Drop lines after `step` and broken ones, so that a resumed run repeats nothing."""
        kept = [json.dumps(record) for record in self.read() if record["step"] <= step]
        if self.path.exists():
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept))
            os.replace(partial, self.path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line and hand it to the operating system."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a line that was cut off by a crash is left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
        return records
