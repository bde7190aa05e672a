"""CM on CIFAR-10 in about an hour of one GPU: 8,000 steps, one stage with q = 256.

Source: ECT's one-hour run (arXiv 2406.14548) as in NVIDIA FastGen's configuration of the same name;
like it, only what differs from config_cm_cifar10.py is set here.
Expected FID: 2.73 in two steps (ECT, one hour on one A100). Cost: 1.02 million images.

    python train.py --config configs/experiments/EDM/config_cm_cifar10_fast.py
"""

import dataclasses

from callbacks.ct_schedule import CTScheduleCallback
from configs.experiments.common import callbacks
from configs.experiments.EDM import config_cm_cifar10
from fastflow.config import lazy
from fastflow.ema import ConstantEMA
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment
from fastflow.schedules import RatioStages


def experiment() -> Experiment:
    schedule = RatioStages(q=256.0, kimg_per_stage=512_000, limit=0.999)
    return dataclasses.replace(
        config_cm_cifar10.experiment(),
        name="cm_cifar10_fast",
        batch_size=128,
        steps=8_000,
        callbacks=callbacks(
            lazy(CTScheduleCallback, schedule=schedule),
            emas=(ConstantEMA(beta=0.9993),),
            log_every=50,
            every=500,
        ),
        expected=(Expected(steps=2, value=2.73, source="ECT", note="one hour on one A100"),),
    )
