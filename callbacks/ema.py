"""Evaluation EMAs of the student, one per callback."""

from __future__ import annotations

import re

from fastflow.callback import Driver
from fastflow.ema import EMA, EMALaw, PowerEMA
from fastflow.errors import ConfigError
from fastflow.posthoc import save_snapshot, std_of_gamma
from fastflow.state import TrainState


class EMACallback(Driver):
    """Keeps an exponential moving average of the student in `state.emas[name]`.

    Several may be used; the first is the one that is sampled and evaluated unless another is
    named.

    Args:
        law: decay of each update.
        name: its name; None takes one that the law gives, e.g. "ema_0.9999".
        start_step: up to this many steps the average is the current weights.
        snapshot_every: steps between snapshots in `ema_snapshots/`, from which
            `fastflow.posthoc.reconstruct` makes averages of other widths; only for `PowerEMA`
            from step 0. None writes none.

    Raises:
        ConfigError: snapshots of a law that cannot be reconstructed from, a name that is no file
            name, a value below its range; (when a run is set up) a name that is used twice.
    """

    def __init__(
        self,
        law: EMALaw,
        name: str | None = None,
        start_step: int = 0,
        snapshot_every: int | None = None,
    ) -> None:
        if start_step < 0:
            raise ConfigError(f"EMACallback.start_step: {start_step} given, 0 or more accepted")
        if snapshot_every is not None:
            if snapshot_every < 1:
                raise ConfigError(
                    f"EMACallback.snapshot_every: {snapshot_every} given, 1 or more accepted"
                )
            if not isinstance(law, PowerEMA) or start_step > 0:
                raise ConfigError(
                    f"EMACallback.snapshot_every: given with law={type(law).__name__}, "
                    f"start_step={start_step}; post-hoc averages are made from "
                    f"law=PowerEMA(...), start_step=0"
                )
        self._law = law
        self._name = law.label if name is None else name
        if not re.fullmatch(r"[\w.-]+", self._name) or self._name == "student":
            raise ConfigError(
                f"EMACallback.name: {name!r} given; letters, digits, '_', '-' and '.' accepted, "
                f"for it becomes a file name ('student' is taken)"
            )
        self._start_step = start_step
        self._snapshot_every = snapshot_every

    def setup(self, state: TrainState) -> None:
        if self._name in state.emas:
            raise ConfigError(
                f"EMACallback.name: two callbacks keep an EMA named {self._name!r}; give each "
                f"its own name"
            )
        state.emas[self._name] = EMA(state.networks.student, self._law, self._start_step)

    def after_update(self, state: TrainState) -> None:
        ema = state.emas[self._name]
        ema.update(state.networks.student, state.now)
        if self._snapshot_every is not None and state.step % self._snapshot_every == 0:
            self._snapshot(state, ema)

    def _snapshot(self, state: TrainState, ema: EMA) -> None:
        assert isinstance(self._law, PowerEMA)
        weights = ema.gathered()
        if state.world.is_main:
            folder = state.run_dir / "ema_snapshots"
            save_snapshot(
                folder / f"{self._name}-step_{state.step:08d}.safetensors",
                weights,
                std=std_of_gamma(self._law.exponent),
                images=state.images,
                buffers=sorted(ema.buffers),
            )
