"""CM on CIFAR-10 in about an hour of one GPU: 8,000 steps, one stage with q = 256.

Source: ECT's one-hour run (arXiv 2406.14548) as in NVIDIA FastGen's configuration of the same
name; like it, only what differs from config_cm_cifar10.py is set here.
Expected FID: 2.73 in two steps (ECT, one hour on one A100). Cost: 1.02 million images.

    python train.py --config configs/experiments/EDM/config_cm_cifar10_fast.py
"""

import dataclasses

from callbacks.checkpoint import CheckpointCallback
from callbacks.ct_schedule import CTScheduleCallback
from callbacks.ema import EMACallback
from callbacks.grad_clip import GradClipCallback
from callbacks.jsonl_log import JsonlLog
from callbacks.model_summary import ModelSummary
from callbacks.nonfinite import NonFiniteGuard
from callbacks.progress_bar import ProgressBar
from callbacks.sample_grid import SampleGrid
from configs.experiments.EDM import config_cm_cifar10
from fastflow.config import lazy
from fastflow.ema import ConstantEMA
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment
from fastflow.schedules import RatioStages


def experiment() -> Experiment:
    return dataclasses.replace(
        config_cm_cifar10.experiment(),
        name="cm_cifar10_fast",
        batch_size=128,
        steps=8_000,
        callbacks=(
            lazy(
                CTScheduleCallback,
                schedule=RatioStages(q=256.0, kimg_per_stage=512_000, limit=0.999),
            ),
            lazy(NonFiniteGuard),
            lazy(GradClipCallback, max_norm=1e6),
            lazy(EMACallback, law=ConstantEMA(beta=0.9993)),
            lazy(ModelSummary),
            lazy(ProgressBar),
            lazy(JsonlLog, every=50),
            lazy(SampleGrid, every=500),
            lazy(CheckpointCallback, every=500),
        ),
        expected=(Expected(steps=2, value=2.73, source="ECT", note="one hour on one A100"),),
    )
