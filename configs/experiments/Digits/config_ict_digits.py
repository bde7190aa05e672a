"""iCT on the digits, from scratch: the number of steps doubles (arXiv 2310.14189).

fastflow train --config configs/experiments/Digits/config_ict_digits.py
"""

from callbacks.ct_schedule import CTScheduleCallback
from configs.experiments.Digits.common import (
    COMMON,
    SIGMA_TIMES,
    UNET,
    at_most,
    callbacks,
    evaluation,
)
from fastflow.config import lazy
from fastflow.experiment import Experiment
from fastflow.schedules import DoublingDiscretization
from fastflow.wrappers import EDMDenoiser
from methods.ict import ICT


def experiment() -> Experiment:
    schedule = DoublingDiscretization(s0=10, s1=160)
    return Experiment(
        name="ict_digits",
        method=ICT(huber=0.00375),
        network=lazy(EDMDenoiser, model=UNET),
        callbacks=callbacks(lazy(CTScheduleCallback, schedule=schedule)),
        evaluation=evaluation(SIGMA_TIMES),
        expected=at_most({1: 3.9}),
        **COMMON,
    )
