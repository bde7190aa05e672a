"""Weights & Biases."""

from __future__ import annotations

import os
from typing import Any, Literal

from fastflow.callback import Observer
from fastflow.config import to_plain
from fastflow.errors import ConfigError, MissingPackageError
from fastflow.logging import StepLog
from fastflow.state import TrainState


class WandbLog(Observer):
    """Writes the records of the JSON-lines log to Weights & Biases.

    Offline by default: the run lies in `wandb/` of the run directory, and `wandb sync` uploads
    it. Nothing ever asks for a login. The variable WANDB_MODE overrides `mode`.

    Args:
        every: steps between records.
        project: the project's name.
        mode: "online" needs a stored login or WANDB_API_KEY.

    Raises:
        ConfigError: `every` below 1, or (when a run is set up) online without a login.
        MissingPackageError: (when a run is set up) wandb is not installed.
    """

    def __init__(
        self,
        every: int = 50,
        project: str = "fastflow",
        mode: Literal["offline", "online"] = "offline",
    ) -> None:
        if every < 1:
            raise ConfigError(f"WandbLog.every: {every} given, 1 or more accepted")
        self._log = StepLog(every)
        self._project = project
        self._mode = mode
        self._id: str | None = None
        self._run: Any = None

    def setup(self, state: TrainState) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingPackageError("wandb", "WandbLog", "log") from None
        if _mode(self._mode) == "online" and not wandb.login(prompt=False):
            raise ConfigError(
                "WandbLog.mode: 'online' given, but there is no login; run `wandb login`, set "
                "WANDB_API_KEY, or use mode='offline'"
            )

    def on_start(self, state: TrainState) -> None:
        self._log.start(state)
        if state.world.is_main:
            import wandb

            self._run = wandb.init(
                project=self._project,
                name=state.experiment.name,
                dir=str(state.run_dir),
                config=to_plain(state.experiment),
                id=self._id,
                resume="allow" if _mode(self._mode) == "online" else None,
                mode=_mode(self._mode),
            )
            self._id = self._run.id

    def after_step(self, state: TrainState) -> None:
        self._write(self._log.add(state))

    def on_end(self, state: TrainState) -> None:
        self._write(self._log.rest(state))
        if self._run is not None:
            self._run.finish()

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._id = state["id"]

    def _write(self, record: dict[str, float] | None) -> None:
        if record is not None and self._run is not None:
            self._run.log(record, step=int(record["step"]))


def _mode(configured: str) -> Any:
    return os.environ.get("WANDB_MODE", configured)
