"""When checkpoints are written."""

from __future__ import annotations

from fastflow.callback import Observer
from fastflow.checkpoint import Keep
from fastflow.errors import ConfigError
from fastflow.state import TrainState


class CheckpointCallback(Observer):
    """Writes a checkpoint every so many steps; the trainer writes one itself when it stops.

    Steps go on while it is written; only copying the state to the CPU takes their time, and waiting
    for the checkpoint before, where that is not complete yet. Place it last, so that it saves what
    the other callbacks know of the step.

    Args:
        every: steps between checkpoints.
        keep: the newest that are kept when one is written; older ones are removed.
        keep_every: checkpoints of steps divisible by this are never removed; None removes all.

    Raises:
        ConfigError: `every` or `keep` below 1, or `keep_every` no multiple of `every`.
    """

    def __init__(self, every: int, keep: int = 3, keep_every: int | None = None) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value < 1:
                raise ConfigError(f"CheckpointCallback.{name}: {value} given, 1 or more accepted")
        if keep_every is not None and (keep_every < 1 or keep_every % every):
            raise ConfigError(
                f"CheckpointCallback.keep_every: {keep_every} given, accepted: a multiple of "
                f"every={every}, as no other checkpoints are written"
            )
        self._every = every
        self._keep = Keep(newest=keep, every=keep_every)

    def after_step(self, state: TrainState) -> None:
        if state.step % self._every == 0:
            state.save_checkpoint(self._keep)
