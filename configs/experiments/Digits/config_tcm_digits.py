"""TCM on the digits: the second stage after ECT, on t >= 1 only (arXiv 2410.14895).

Both the student and the frozen model below t = 1 are the ECT run; the ratio stays at its cap.

    fastflow train --config configs/experiments/Digits/config_tcm_digits.py
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
from fastflow.consistency import PseudoHuber
from fastflow.experiment import Experiment, Prerequisite
from fastflow.method import Frozen
from fastflow.schedules import RatioStages
from fastflow.wrappers import EDMDenoiser
from methods.tcm import TCM

STAGE1 = Prerequisite(
    config="configs/experiments/Digits/config_ect_digits.py", run_dir="runs/ect_digits"
)


def experiment() -> Experiment:
    schedule = RatioStages(q=4.0, kimg_per_stage=12.8, limit=0.9961, offset_images=179_200)
    return Experiment(
        name="tcm_digits",
        method=TCM(
            stage1=Frozen(weights=STAGE1.run_dir), distance=PseudoHuber(c=0.03), transition=1.0
        ),
        network=lazy(EDMDenoiser, model=UNET),
        callbacks=callbacks(lazy(CTScheduleCallback, schedule=schedule)),
        evaluation=evaluation(SIGMA_TIMES),
        expected=at_most({1: 3.9}),
        init_from=STAGE1.run_dir,
        prerequisites=(STAGE1,),
        **COMMON,
    )
