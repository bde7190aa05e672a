"""What every digits experiment has in common, so that methods can be compared at equal budgets.

scikit-learn's 8x8 digits with class labels; a DDPM++ of 0.3 million parameters; batches of 128;
the FID of one-, two- and four-step samples in the features of a small digit classifier, beside the
FID between two halves of the real digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import RAdam

from callbacks.checkpoint import CheckpointCallback
from callbacks.curves import Curves
from callbacks.ema import EMACallback
from callbacks.jsonl_log import JsonlLog
from callbacks.loss_by_time import LossByTime
from callbacks.nonfinite import NonFiniteGuard
from callbacks.progress_bar import ProgressBar
from callbacks.sample_grid import SampleGrid
from fastflow.config import Lazy, lazy
from fastflow.data.digits import Digits
from fastflow.ema import PowerEMA
from fastflow.evaluation.extractors import DigitFeatures
from fastflow.evaluation.metrics import FID, RealHalves
from fastflow.evaluation.spec import Evaluation, Expected
from fastflow.experiment import Prerequisite
from fastflow.schedules import CosineLR
from networks.song_unet import SongUNet

UNET = lazy(
    SongUNet,
    resolution=8,
    in_channels=1,
    out_channels=1,
    cond_dim=10,
    channels=32,
    channel_mult=(1, 1),
    num_blocks=1,
    attn_resolutions=(),
    dropout=0.0,
)

COMMON: Mapping[str, Any] = {
    "data": lazy(Digits),
    "optimizer": lazy(RAdam, lr=5e-3, betas=(0.9, 0.999)),
    "lr": CosineLR(),
    "batch_size": 128,
    "steps": 1400,
}
"""Data and budget of an `Experiment`."""

TEACHER = Prerequisite(
    config="configs/experiments/Digits/config_edm_digits.py", run_dir="runs/edm_digits"
)
"""The denoiser that methods distil or start from."""

SIGMA_TIMES = {2: (0.821,), 4: (5.3, 0.821, 0.2)}
"""Intermediate times of methods on EDM's path, for two and four steps."""

ANGLES = {2: (1.0238,), 4: (1.4768, 1.0238, 0.3805)}
"""The same noise on the TrigFlow path: atan(sigma / 0.5)."""


def callbacks(*drivers: Lazy) -> tuple[Lazy, ...]:
    """The drivers of a method's curriculum, then what all experiments have."""
    return (
        *drivers,
        lazy(NonFiniteGuard),
        lazy(EMACallback, law=PowerEMA(std=0.07)),
        lazy(LossByTime),
        lazy(ProgressBar),
        lazy(JsonlLog, every=20),
        lazy(SampleGrid, every=700),
        lazy(CheckpointCallback, every=700),
        lazy(Curves),
    )


SAMPLES = 5000


def evaluation(
    times: Mapping[int, tuple[float, ...]], steps: tuple[int, ...] = (1, 2, 4)
) -> Evaluation:
    """The FID of 5,000 samples for each number of steps, through these intermediate times."""
    return Evaluation(
        metrics=(FID(extractor=DigitFeatures(), baseline=RealHalves()),),
        samples=SAMPLES,
        steps=steps,
        times=dict(times),
        batch_size=500,
        quantisation="none",
    )


def at_most(fids: Mapping[int, float]) -> tuple[Expected, ...]:
    """Bounds by number of steps, which `make bench-digits` holds a run to."""
    source = "bound: 1.5 or 2 times the FID between halves of the real digits, 2.60"
    return tuple(
        Expected(steps=steps, value=value, source=source, samples=SAMPLES)
        for steps, value in fids.items()
    )
