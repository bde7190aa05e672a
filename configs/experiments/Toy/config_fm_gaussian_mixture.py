"""Flow matching on a ring of eight Gaussians in the plane: a velocity whose flow is known.

A teacher for the methods that distil on the linear path; by itself it needs many steps.

    fastflow train --config configs/experiments/Toy/config_fm_gaussian_mixture.py
    fastflow evaluate runs/fm_gaussian_mixture
"""

from torch.optim import Adam

from configs.experiments.Toy.common import COMMON, MODEL, at_most, callbacks, evaluation
from fastflow.config import lazy
from fastflow.experiment import Experiment
from fastflow.times import LogitNormal
from fastflow.wrappers import VelocityNetwork
from methods.flow_matching import FlowMatching


def experiment() -> Experiment:
    return Experiment(
        name="fm_gaussian_mixture",
        method=FlowMatching(times=LogitNormal(mean=-0.6, std=1.4)),
        network=lazy(VelocityNetwork, model=MODEL, time_scale=2.0),
        optimizer=lazy(Adam, lr=4e-3, betas=(0.9, 0.99)),
        batch_size=1024,
        steps=3000,
        callbacks=callbacks(ema=0.99),
        evaluation=evaluation({}, steps=(4, 32), samples=128),
        expected=at_most({32: 0.0009}, samples=128),
        **COMMON,
    )
