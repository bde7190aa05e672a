"""sCD on a ring of eight Gaussians in the plane, where the true flow map is known.

Distils the denoiser of config_edm_gaussian_mixture.py, from whose weights the student starts
(arXiv 2410.11081, section 5): as a TrigFlow network it reads ln(sigma)/4 as before. Seen so,
sampling starts (ln 80 = 4.4) far above most of the paper's times; the wider law here halved the
error.

    fastflow train --config configs/experiments/Toy/config_scd_gaussian_mixture.py
    fastflow evaluate runs/scd_gaussian_mixture
"""

from torch.optim import RAdam

from configs.experiments.Toy.common import (
    ANGLES,
    COMMON,
    MODEL,
    TEACHER,
    at_most,
    callbacks,
    evaluation,
)
from fastflow.config import lazy
from fastflow.experiment import Experiment
from fastflow.method import Frozen
from fastflow.schedules import LinearRamp
from fastflow.teacher import Teacher
from fastflow.times import LogNormal
from fastflow.wrappers import EDMDenoiser, TrigFlowNetwork
from methods.scm import SCM
from networks.edm2 import LogVariance


def experiment() -> Experiment:
    teacher = Frozen(weights=TEACHER.run_dir, network=lazy(EDMDenoiser, model=MODEL))
    return Experiment(
        name="scd_gaussian_mixture",
        method=SCM(
            times=LogNormal(mean=-0.4, std=2.0),
            teacher=Teacher(source=teacher),
            warmup=LinearRamp(steps=600),
        ),
        network=lazy(
            TrigFlowNetwork,
            model=MODEL,
            time="log_sigma",
            logvar_head=lazy(LogVariance, channels=32),
        ),
        optimizer=lazy(RAdam, lr=1e-3, betas=(0.9, 0.99)),
        batch_size=256,
        steps=2500,
        callbacks=callbacks(ema=0.997),
        evaluation=evaluation(ANGLES),
        expected=at_most({1: 0.01}),
        init_from=TEACHER.run_dir,
        prerequisites=(TEACHER,),
        **COMMON,
    )
