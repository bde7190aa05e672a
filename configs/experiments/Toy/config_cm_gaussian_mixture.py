"""CM on a ring of eight Gaussians in the plane, where the true flow map is known.

Shows what consistency training learns against what it should: the mean squared error of the map
from noise to data. As the steps to the target shrink (ratio towards 1) the bias of training on
conditional lines goes to zero (arXiv 2303.01469, theorem 2).

    fastflow train --config configs/experiments/Toy/config_cm_gaussian_mixture.py
    fastflow evaluate runs/cm_gaussian_mixture
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
from fastflow.consistency import InverseGap, PseudoHuber, RatioPairing
from fastflow.experiment import Experiment
from fastflow.schedules import ConstantLR, RatioStages, SigmoidRatio
from fastflow.times import LogNormal
from fastflow.wrappers import EDMDenoiser
from methods.cm import CM


def experiment() -> Experiment:
    schedule = RatioStages(q=2.0, kimg_per_stage=768)
    return Experiment(
        name="cm_gaussian_mixture",
        method=CM(
            pairs=RatioPairing(times=LogNormal(mean=-1.1, std=2.0), gap=SigmoidRatio(k=8.0, b=1.0)),
            distance=PseudoHuber(c=0.03),
            weight=InverseGap(),
            boundary=0.0,
        ),
        network=lazy(EDMDenoiser, model=MODEL),
        optimizer=lazy(RAdam, lr=1e-3, betas=(0.9, 0.999)),
        batch_size=1024,
        steps=6000,
        callbacks=callbacks(lazy(CTScheduleCallback, schedule=schedule), ema=0.999),
        evaluation=evaluation(SIGMA_TIMES),
        expected=at_most({1: 0.01}),
        **{**COMMON, "lr": ConstantLR()},
    )
