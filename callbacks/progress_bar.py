"""What a person watches while training."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from fastflow.callback import Observer
from fastflow.distributed import World
from fastflow.errors import ConfigError
from fastflow.logging import Averages
from fastflow.state import TrainState

SMOOTHING = 0.7


class ProgressBar(Observer):
    """Steps, images/s, time left and the smoothed loss, on stderr of the first process.

    A bar on a terminal; elsewhere a line every 30 seconds. The loss is read from the device when
    it is shown, never in between.

    Args:
        seconds: between updates on a terminal.

    Raises:
        ConfigError: `seconds` not positive.
    """

    def __init__(self, seconds: float = 1.0) -> None:
        if not seconds > 0:
            raise ConfigError(f"ProgressBar.seconds: {seconds:g} given, a value > 0 is accepted")
        self._seconds = seconds if sys.stderr.isatty() else max(seconds, 30.0)
        self._losses = Averages()
        self._loss: float | None = None
        self._bar: Any = None
        self._shown_at = 0.0
        self._shown_step = 0

    def on_start(self, state: TrainState) -> None:
        self._shown_at, self._shown_step = time.monotonic(), state.step
        if state.world.is_main and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=state.experiment.steps,
                initial=state.step,
                desc=state.experiment.name,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}]{postfix}",
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def after_step(self, state: TrainState) -> None:
        if state.world.is_main:
            self._losses.add({"loss": state.metrics["loss"]})
            if time.monotonic() - self._shown_at >= self._seconds:
                self._show(state)

    def on_end(self, state: TrainState) -> None:
        if state.world.is_main and state.step > self._shown_step:
            self._show(state)
        if self._bar is not None:
            self._bar.close()

    def _show(self, state: TrainState) -> None:
        # Only this process shows, at moments of its own: its reading must not wait for others.
        loss = self._losses.read(World(device=state.world.device))["loss"]
        smooth = SMOOTHING if self._loss is not None else 0.0
        self._loss = smooth * (self._loss or 0.0) + (1 - smooth) * loss
        now = time.monotonic()
        pace = (state.step - self._shown_step) / max(now - self._shown_at, 1e-9)
        self._shown_at, self._shown_step = now, state.step
        left = timedelta(seconds=round((state.experiment.steps - state.step) / pace))
        speed = pace * state.experiment.batch_size
        facts = f"{speed:,.0f} images/s, {left} left, loss {self._loss:.4g}"
        if self._bar is not None:
            self._bar.n = state.step
            self._bar.set_postfix_str(facts)
        else:
            print(f"step {state.step:,}/{state.experiment.steps:,}: {facts}", file=sys.stderr)
