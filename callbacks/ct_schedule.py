"""The curriculum of consistency training: how near the two times of a pair lie."""

from __future__ import annotations

from fastflow.callback import Driver
from fastflow.schedules import Curriculum
from fastflow.state import TrainState


class CTScheduleCallback(Driver):
    """Writes the values of a curriculum into `state.curriculum` before each step.

    Args:
        schedule: what is provided, as a function of progress, e.g. `RatioStages` or
            `SqrtDiscretization`. It keeps no state, so a resumed run needs none.
    """

    def __init__(self, schedule: Curriculum) -> None:
        self._schedule = schedule

    @property
    def provides(self) -> frozenset[str]:
        return self._schedule.provides

    def before_step(self, state: TrainState) -> None:
        state.curriculum.update(self._schedule(state.now))
