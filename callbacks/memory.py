"""Memory use."""

from __future__ import annotations

import resource
import sys

import torch

from fastflow.callback import Observer
from fastflow.errors import ConfigError
from fastflow.state import TrainState


class MemoryUse(Observer):
    """Adds `memory/peak_mib` of this process, and `memory/cuda_peak_mib`, to the metrics.

    Place it before the loggers. Asking neither waits for the device nor resets its counters.

    Args:
        every: steps between measurements.

    Raises:
        ConfigError: `every` below 1.
    """

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise ConfigError(f"MemoryUse.every: {every} given, 1 or more accepted")
        self._every = every

    def after_step(self, state: TrainState) -> None:
        if state.step % self._every == 0:
            state.metrics["memory/peak_mib"] = _peak_mib()
            if state.world.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(state.world.device)
                state.metrics["memory/cuda_peak_mib"] = peak / 2**20


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
