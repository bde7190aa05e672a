"""sCD on the digits: consistency distillation in continuous time (arXiv 2410.11081).

Starts from the teacher, a denoiser that reads ln(sigma): its weights are a TrigFlow network too.

    fastflow train --config configs/experiments/Digits/config_scd_digits.py
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
from fastflow.method import Frozen
from fastflow.schedules import LinearRamp
from fastflow.teacher import Teacher
from fastflow.wrappers import EDMDenoiser, TrigFlowNetwork
from methods.scm import SCM
from networks.edm2 import LogVariance


def experiment() -> Experiment:
    source = Frozen(weights="runs/edm_digits", network=lazy(EDMDenoiser, model=UNET))
    return Experiment(
        name="scd_digits",
        method=SCM(teacher=Teacher(source=source), warmup=LinearRamp(steps=300)),
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
