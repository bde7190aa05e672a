"""sCT on a ring of eight Gaussians in the plane, where the true flow map is known.

No discretisation and no curriculum but the tangent warm-up (arXiv 2410.11081).

    fastflow train --config configs/experiments/Toy/config_sct_gaussian_mixture.py
    fastflow evaluate runs/sct_gaussian_mixture
"""

from torch.optim import RAdam

from configs.experiments.Toy.common import (
    ANGLES,
    COMMON,
    MODEL,
    at_most,
    callbacks,
    evaluation,
)
from fastflow.config import lazy
from fastflow.experiment import Experiment
from fastflow.schedules import LinearRamp
from fastflow.times import LogNormal
from fastflow.wrappers import TrigFlowNetwork
from methods.scm import SCM
from networks.edm2 import LogVariance


def experiment() -> Experiment:
    return Experiment(
        name="sct_gaussian_mixture",
        method=SCM(times=LogNormal(mean=-1.0, std=1.4), warmup=LinearRamp(steps=600)),
        network=lazy(TrigFlowNetwork, model=MODEL, logvar_head=lazy(LogVariance, channels=32)),
        optimizer=lazy(RAdam, lr=1e-3, betas=(0.9, 0.99)),
        batch_size=256,
        steps=3000,
        callbacks=callbacks(ema=0.997),
        evaluation=evaluation(ANGLES),
        expected=at_most({1: 0.005}),
        **COMMON,
    )
