"""sCT on the digits: consistency training in continuous time (arXiv 2410.11081).

Starts from the denoiser, whose network reads ln(sigma): the same weights are a TrigFlow network.

    fastflow train --config configs/experiments/Digits/config_sct_digits.py
"""

from configs.experiments.Digits.common import (
    ANGLES,
    COMMON,
    TEACHER,
    UNET,
    at_most,
    callbacks,
    evaluation,
)
from fastflow.config import lazy
from fastflow.experiment import Experiment
from fastflow.schedules import LinearRamp
from fastflow.wrappers import TrigFlowNetwork
from methods.scm import SCM
from networks.edm2 import LogVariance


def experiment() -> Experiment:
    return Experiment(
        name="sct_digits",
        method=SCM(warmup=LinearRamp(steps=300)),
        network=lazy(
            TrigFlowNetwork,
            model=UNET,
            time="log_sigma",
            logvar_head=lazy(LogVariance, channels=32),
        ),
        callbacks=callbacks(),
        evaluation=evaluation(ANGLES),
        expected=at_most({1: 5.2}),
        init_from="runs/edm_digits",
        prerequisites=(TEACHER,),
        **COMMON,
    )
