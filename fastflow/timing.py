"""Time of things that take turns, so that load from elsewhere falls on all of them alike."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Literal

import torch


@dataclasses.dataclass(frozen=True)
class Stopwatch:
    """How time is taken.

    Attributes:
        device: what must have finished when time is taken.
        clock: "wall", or "cpu": the process's own time, for a machine that others use too.
        repeats: turns.
    """

    device: torch.device
    clock: Literal["wall", "cpu"] = "wall"
    repeats: int = 7

    def now(self) -> float:
        """Seconds, the device having finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.clock == "cpu" else time.perf_counter()

    def interleaved(self, actions: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of each action, taken in turns after one warm-up each.

        Ratios of medians then stay meaningful whatever else the machine does.
        """
        for action in actions.values():
            action()
        return self.in_turns(actions)

    def in_turns(self, actions: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """The same without the warm-up."""
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(self.repeats):
            for name, action in actions.items():
                began = self.now()
                action()
                seconds[name].append(self.now() - began)
        return seconds

    def machine(self) -> str:
        """The hardware, the versions and how busy the machine was, on one line."""
        if self.device.type == "cuda":
            hardware = torch.cuda.get_device_name(self.device)
        else:
            hardware = f"{os.cpu_count()} CPU cores ({platform.machine()})"
        return (
            f"{hardware}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, "
            f"{self.clock} clock, torch {torch.__version__}"
        )
