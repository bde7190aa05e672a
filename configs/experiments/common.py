"""What the published experiments share: sets of EMAs, callbacks, notes."""

from __future__ import annotations

from callbacks.checkpoint import CheckpointCallback
from callbacks.ema import EMACallback
from callbacks.grad_clip import GradClipCallback
from callbacks.jsonl_log import JsonlLog
from callbacks.model_summary import ModelSummary
from callbacks.nonfinite import NonFiniteGuard
from callbacks.progress_bar import ProgressBar
from callbacks.sample_grid import SampleGrid
from fastflow.config import Lazy, lazy
from fastflow.ema import ConstantEMA, EMALaw, PowerEMA

CONSTANT_EMAS = tuple(ConstantEMA(beta=beta) for beta in (0.9999, 0.99995, 0.9996))
"""NVIDIA FastGen's set `const`; the first EMA is the one that is evaluated."""

POWER_EMAS = tuple(PowerEMA(gamma=gamma) for gamma in (96.99, 16.97, 6.94))
"""FastGen's set `power`: widths of 1, 5 and 10 % of training."""

START = {"start of sampling": "sigma 79.56 (FastGen), here 80"}
"""A note for `Experiment.published`, as the next."""

SCALER = {"gradient scaler": "from 16, doubled every 20,000 steps; here from 65,536 and 2,000"}

UNIFORM_TIMES = {steps: tuple(1 - k / steps for k in range(1, steps)) for steps in (2, 4, 8)}
"""Intermediate times of MeanFlow: jumps of equal length, of which 2 steps are published."""

EDM_CDN = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
EDM2_CDN = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/"
EDM_CIFAR10_WEIGHTS = EDM_CDN + "edm-cifar10-32x32-uncond-vp.pkl"
EDM_IMAGENET64_WEIGHTS = EDM_CDN + "edm-imagenet-64x64-cond-adm.pkl"
EDM2_S_WEIGHTS = EDM2_CDN + "edm2-img64-s-1073741-0.075.pkl"
EDM2_XL_WEIGHTS = EDM2_CDN + "edm2-img64-xl-0671088-0.040.pkl"


def callbacks(
    *schedules: Lazy,
    emas: tuple[EMALaw, ...],
    max_norm: float = 1e6,
    log_every: int = 100,
    every: int = 5000,
    pictures: tuple[Lazy, ...] | None = None,
) -> tuple[Lazy, ...]:
    """All callbacks of an experiment.

    Args:
        schedules: drivers of the method's curriculum.
        emas: decay laws; the first EMA is the one that is evaluated.
        max_norm: largest norm of the gradient.
        log_every: steps between lines of the log.
        every: steps between checkpoints, and between pictures.
        pictures: what draws samples; None for `SampleGrid`.
    """
    grids = (lazy(SampleGrid, every=every),) if pictures is None else pictures
    return (
        *schedules,
        lazy(NonFiniteGuard),
        lazy(GradClipCallback, max_norm=max_norm),
        *(lazy(EMACallback, law=law) for law in emas),
        lazy(ModelSummary),
        lazy(ProgressBar),
        lazy(JsonlLog, every=log_every),
        *grids,
        lazy(CheckpointCallback, every=every),
    )
