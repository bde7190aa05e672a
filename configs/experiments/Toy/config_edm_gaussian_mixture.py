"""EDM on a ring of eight Gaussians in the plane, where the true flow map is known.

The teacher of sCD, and where ECT starts; by itself it needs many steps.

    fastflow train --config configs/experiments/Toy/config_edm_gaussian_mixture.py
    fastflow evaluate runs/edm_gaussian_mixture
"""

from torch.optim import RAdam

from configs.experiments.Toy.common import COMMON, MODEL, at_most, callbacks, evaluation
from fastflow.config import lazy
from fastflow.experiment import Experiment
from fastflow.times import LogNormal
from fastflow.wrappers import EDMDenoiser
from methods.edm import EDM


def experiment() -> Experiment:
    return Experiment(
        name="edm_gaussian_mixture",
        method=EDM(times=LogNormal(mean=-1.2, std=1.6)),
        network=lazy(EDMDenoiser, model=MODEL),
        optimizer=lazy(RAdam, lr=2e-3, betas=(0.9, 0.999)),
        batch_size=512,
        steps=6000,
        callbacks=callbacks(ema=0.999),
        evaluation=evaluation({}, steps=(8, 32), samples=128),
        expected=at_most({32: 0.0008}, samples=128),
        **COMMON,
    )
