"""When checkpoints are written."""

from __future__ import annotations

from fastflow import checkpoint
from fastflow.callback import Observer
from fastflow.errors import ConfigError
from fastflow.state import TrainState


class CheckpointCallback(Observer):
    """Writes a checkpoint every so many steps; the trainer writes one itself when it stops.

    Place it last, so that it saves what the other callbacks know of the step.

    Args:
        every: steps between checkpoints.
        keep: the newest that are kept when one is written; older ones are removed.

    Raises:
        ConfigError: `every` or `keep` below 1.
    """

    def __init__(self, every: int, keep: int = 3) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value < 1:
                raise ConfigError(f"CheckpointCallback.{name}: {value} given, 1 or more accepted")
        self._every = every
        self._keep = keep

    def after_step(self, state: TrainState) -> None:
        if state.step % self._every == 0:
            state.save_checkpoint()
            if state.world.is_main:
                checkpoint.prune(state.run_dir, self._keep)
