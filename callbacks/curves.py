"""A picture of the log."""

from __future__ import annotations

from fastflow.callback import Observer
from fastflow.errors import ConfigError, MissingPackageError
from fastflow.logging import JsonLines
from fastflow.pictures import save_curves
from fastflow.state import TrainState


class Curves(Observer):
    """Draws every value of `log.jsonl` over the steps into `curves.png`, at the end at least.

    Place it after `JsonlLog`.

    Args:
        every: steps between drawings; None draws only at the end.

    Raises:
        ConfigError: `every` below 1.
        MissingPackageError: (when a run is set up) matplotlib is not installed.
    """

    def __init__(self, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise ConfigError(f"Curves.every: {every} given, 1 or more accepted")
        self._every = every

    def setup(self, state: TrainState) -> None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise MissingPackageError("matplotlib", "Curves", "log") from None

    def after_step(self, state: TrainState) -> None:
        if self._every is not None and state.step % self._every == 0:
            _draw(state)

    def on_end(self, state: TrainState) -> None:
        _draw(state)


def _draw(state: TrainState) -> None:
    if state.world.is_main:
        records = JsonLines(state.run_dir / "log.jsonl").read()
        if records:
            save_curves(records, state.run_dir / "curves.png", state.experiment.name)
