"""ECT on a ring of eight Gaussians in the plane, where the true flow map is known.

The denoiser of config_edm_gaussian_mixture.py, tuned into a consistency model (arXiv 2406.14548):
the ratio rises in stages.

    fastflow train --config configs/experiments/Toy/config_ect_gaussian_mixture.py
    fastflow evaluate runs/ect_gaussian_mixture
"""

from torch.optim import RAdam

from callbacks.ct_schedule import CTScheduleCallback
from configs.experiments.Toy.common import (
    COMMON,
    MODEL,
    SIGMA_TIMES,
    TEACHER,
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
    schedule = RatioStages(q=2.0, kimg_per_stage=128)
    return Experiment(
        name="ect_gaussian_mixture",
        method=ECT(distance=PseudoHuber(c=0.03)),
        network=lazy(EDMDenoiser, model=MODEL),
        optimizer=lazy(RAdam, lr=1e-3, betas=(0.9, 0.999)),
        batch_size=512,
        steps=2500,
        callbacks=callbacks(lazy(CTScheduleCallback, schedule=schedule), ema=0.998),
        evaluation=evaluation(SIGMA_TIMES),
        expected=at_most({1: 0.008}),
        init_from=TEACHER.run_dir,
        prerequisites=(TEACHER,),
        **COMMON,
    )
