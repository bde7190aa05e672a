"""What every toy experiment has in common: a ring of eight Gaussians whose flow map is known.

A small multilayer perceptron; the mean squared error per coordinate of the samples, and of single
jumps of methods with two times, against the exact flow map from the same noise; the energy distance
beside that between two sets of real points. The data has variance 0.26.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from callbacks.checkpoint import CheckpointCallback
from callbacks.curves import Curves
from callbacks.ema import EMACallback
from callbacks.jsonl_log import JsonlLog
from callbacks.loss_by_time import LossByTime
from callbacks.nonfinite import NonFiniteGuard
from callbacks.progress_bar import ProgressBar
from callbacks.sample_grid import SampleGrid
from fastflow.config import Lazy, lazy
from fastflow.data.toy import GaussianMixture2D
from fastflow.ema import ConstantEMA
from fastflow.evaluation.spec import Evaluation, Expected
from fastflow.evaluation.toy_metrics import EnergyDistance, FlowMapError
from fastflow.experiment import Prerequisite
from fastflow.schedules import CosineLR
from networks.mlp import ToyMLP

MODEL = lazy(ToyMLP, data_dim=2, width=128, depth=4)

COMMON: Mapping[str, Any] = {
    "data": lazy(GaussianMixture2D, modes=8, radius=0.7, radial_std=0.1, tangential_std=0.1),
    "lr": CosineLR(),
}
"""Data and learning-rate law of an `Experiment`."""

TEACHER = Prerequisite(
    config="configs/experiments/Toy/config_edm_gaussian_mixture.py",
    run_dir="runs/edm_gaussian_mixture",
)
"""The denoiser that methods distil or start from."""

SIGMA_TIMES = {2: (0.821,), 4: (5.3, 0.821, 0.2)}
"""Intermediate times of methods on EDM's path, for two and four steps."""

ANGLES = {2: (1.1,), 4: (1.48, 1.1, 0.4)}
"""Intermediate times of methods on the TrigFlow path."""


def callbacks(*drivers: Lazy, ema: float) -> tuple[Lazy, ...]:
    """The drivers of a method's curriculum, then what all experiments have; `ema` is the decay."""
    return (
        *drivers,
        lazy(NonFiniteGuard),
        lazy(EMACallback, law=ConstantEMA(beta=ema)),
        lazy(LossByTime),
        lazy(ProgressBar),
        lazy(JsonlLog, every=50),
        lazy(SampleGrid, every=2000),
        lazy(CheckpointCallback, every=1000),
        lazy(Curves),
    )


def evaluation(
    times: Mapping[int, tuple[float, ...]],
    steps: tuple[int, ...] = (1, 2, 4),
    samples: int = 1024,
    jumps: tuple[tuple[float, float], ...] = (),
) -> Evaluation:
    """The map's error on `samples` points, and the distance of 4,096 samples from the data.

    The exact map is solved anew in each step, so many steps ask for few points.
    """
    return Evaluation(
        metrics=(FlowMapError(samples=samples, jumps=jumps), EnergyDistance()),
        samples=4096,
        steps=steps,
        times=dict(times),
        batch_size=4096,
        quantisation="none",
    )


def at_most(
    errors: Mapping[int, float], metric: str = "flow_map_error", samples: int = 1024
) -> tuple[Expected, ...]:
    """Bounds of an error by number of steps, which `make bench-toy` holds runs to."""
    source = "bound: 1.5 to 2 times what was measured"
    return tuple(
        Expected(metric=metric, steps=steps, value=value, source=source, samples=samples)
        for steps, value in errors.items()
    )
