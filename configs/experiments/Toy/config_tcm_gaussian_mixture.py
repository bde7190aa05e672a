"""TCM on a ring of eight Gaussians in the plane, where the true flow map is known.

The second stage after config_ect_gaussian_mixture.py, on t >= 1 only (arXiv 2410.14895): that run
is both where the student starts and the frozen model below t = 1. The ratio goes on from there.

    fastflow train --config configs/experiments/Toy/config_tcm_gaussian_mixture.py
    fastflow evaluate runs/tcm_gaussian_mixture
"""

from torch.optim import RAdam

from callbacks.ct_schedule import CTScheduleCallback
from configs.experiments.Toy.common import (
    COMMON,
    MODEL,
    SIGMA_TIMES,
    at_most,
    callbacks,
    evaluation,
)
from fastflow.config import lazy
from fastflow.consistency import PseudoHuber
from fastflow.experiment import Experiment, Prerequisite
from fastflow.method import Frozen
from fastflow.schedules import RatioStages
from fastflow.wrappers import EDMDenoiser
from methods.tcm import TCM

STAGE1 = Prerequisite(
    config="configs/experiments/Toy/config_ect_gaussian_mixture.py",
    run_dir="runs/ect_gaussian_mixture",
)


def experiment() -> Experiment:
    schedule = RatioStages(q=2.0, kimg_per_stage=128, limit=0.999, offset_images=1_280_000)
    return Experiment(
        name="tcm_gaussian_mixture",
        method=TCM(
            stage1=Frozen(weights=STAGE1.run_dir), distance=PseudoHuber(c=0.03), transition=1.0
        ),
        network=lazy(EDMDenoiser, model=MODEL),
        optimizer=lazy(RAdam, lr=1e-3, betas=(0.9, 0.999)),
        batch_size=512,
        steps=1000,
        callbacks=callbacks(lazy(CTScheduleCallback, schedule=schedule), ema=0.998),
        evaluation=evaluation(SIGMA_TIMES),
        expected=at_most({1: 0.005}),
        init_from=STAGE1.run_dir,
        prerequisites=(STAGE1,),
        **COMMON,
    )
