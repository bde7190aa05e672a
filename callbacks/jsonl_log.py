"""The log of every run: one JSON object per line."""

from __future__ import annotations

from fastflow.callback import Observer
from fastflow.errors import ConfigError
from fastflow.logging import JsonLines, StepLog
from fastflow.state import TrainState


class JsonlLog(Observer):
    """Appends to `log.jsonl`: step, images, seconds, images/s, curriculum and metrics.

    Metrics are means over the steps since the line before. Between lines nothing waits for the
    device. A resumed run first removes the lines after the step it continues from.

    Args:
        every: steps between lines.

    Raises:
        ConfigError: `every` below 1.
    """

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise ConfigError(f"JsonlLog.every: {every} given, 1 or more accepted")
        self._log = StepLog(every)

    def on_start(self, state: TrainState) -> None:
        if state.world.is_main:
            _file(state).rewind(state.step)
        self._log.start(state)

    def after_step(self, state: TrainState) -> None:
        self._write(state, self._log.add(state))

    def on_end(self, state: TrainState) -> None:
        self._write(state, self._log.rest(state))

    def _write(self, state: TrainState, record: dict[str, float] | None) -> None:
        if record is not None and state.world.is_main:
            _file(state).write(record)


def _file(state: TrainState) -> JsonLines:
    return JsonLines(state.run_dir / "log.jsonl")
