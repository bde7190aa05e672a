"""TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastflow.callback import Observer
from fastflow.errors import ConfigError, MissingPackageError
from fastflow.logging import StepLog
from fastflow.state import TrainState

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLog(Observer):
    """Writes the records of the JSON-lines log as TensorBoard scalars into `tensorboard/`.

    Args:
        every: steps between records.

    Raises:
        ConfigError: `every` below 1.
        MissingPackageError: (when a run is set up) tensorboard is not installed.
    """

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise ConfigError(f"TensorBoardLog.every: {every} given, 1 or more accepted")
        self._log = StepLog(every)
        self._writer: SummaryWriter | None = None

    def setup(self, state: TrainState) -> None:
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            raise MissingPackageError("tensorboard", "TensorBoardLog", "log") from None

    def on_start(self, state: TrainState) -> None:
        self._log.start(state)
        if state.world.is_main:
            from torch.utils.tensorboard import SummaryWriter

            folder = state.run_dir / "tensorboard"
            # Events from this step on, left by an interrupted run, are dropped by the viewer.
            self._writer = SummaryWriter(str(folder), purge_step=state.step + 1)

    def after_step(self, state: TrainState) -> None:
        self._write(self._log.add(state))

    def on_end(self, state: TrainState) -> None:
        self._write(self._log.rest(state))
        if self._writer is not None:
            self._writer.close()

    def _write(self, record: dict[str, float] | None) -> None:
        if record is not None and self._writer is not None:
            for name, value in record.items():
                if name != "step":
                    self._writer.add_scalar(name, value, int(record["step"]))
