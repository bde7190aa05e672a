"""ECT on the digits: a denoiser first, tuned into a consistency model (arXiv 2406.14548).

The teacher's weights are where tuning starts, as in the paper; the ratio then rises in stages.

    fastflow train --config configs/experiments/Digits/config_ect_digits.py
"""

from callbacks.ct_schedule import CTScheduleCallback
from configs.experiments.Digits.common import (
    COMMON,
    SIGMA_TIMES,
    TEACHER,
    UNET,
    at_most,
    callbacks,
    evaluation,
)
from fastflow.config import lazy
from fastflow.consistency import PseudoHuber
from fastflow.experiment import Experiment
from fastflow.schedules import RatioStages
from fastflow.wrappers import EDMDenoiser
from methods.ect import ECT


def experiment() -> Experiment:
    schedule = RatioStages(q=4.0, kimg_per_stage=12.8, limit=0.9961)
    return Experiment(
        name="ect_digits",
        method=ECT(distance=PseudoHuber(c=0.03)),
        network=lazy(EDMDenoiser, model=UNET),
        callbacks=callbacks(lazy(CTScheduleCallback, schedule=schedule)),
        evaluation=evaluation(SIGMA_TIMES),
        expected=at_most({1: 3.9}),
        init_from="runs/edm_digits",
        prerequisites=(TEACHER,),
        **COMMON,
    )
