"""A trace of a few steps."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile

from fastflow.callback import Observer
from fastflow.errors import ConfigError
from fastflow.state import TrainState


class TraceSteps(Observer):
    """Profiles a window of steps on the first process into `profile/`.

    `trace.json` opens in https://ui.perfetto.dev; `operators.txt` lists operators by time.

    Args:
        start: steps finished before the window opens; let the first, slow ones pass.
        steps: length of the window.

    Raises:
        ConfigError: a negative start or an empty window.
    """

    def __init__(self, start: int = 10, steps: int = 3) -> None:
        if start < 0 or steps < 1:
            raise ConfigError(
                f"TraceSteps: start={start}, steps={steps} given, start >= 0, steps >= 1 accepted"
            )
        self._start = start
        self._end = start + steps
        self._profile: profile | None = None

    def on_start(self, state: TrainState) -> None:
        self._turn(state)

    def after_step(self, state: TrainState) -> None:
        self._turn(state)

    def on_end(self, state: TrainState) -> None:
        self._finish(state)

    def _turn(self, state: TrainState) -> None:
        if state.step == self._start and state.world.is_main:
            activities = [ProfilerActivity.CPU]
            if state.world.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
        elif state.step == self._end:
            self._finish(state)

    def _finish(self, state: TrainState) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        folder = state.run_dir / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(folder / "trace.json"))
        on = "cuda" if state.world.device.type == "cuda" else "cpu"
        table = self._profile.key_averages().table(sort_by=f"self_{on}_time_total", row_limit=50)
        (folder / "operators.txt").write_text(table)
        self._profile = None
