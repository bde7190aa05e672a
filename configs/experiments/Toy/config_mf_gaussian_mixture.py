"""MeanFlow on a ring of eight Gaussians in the plane, where the true flow map is known.

Shows what is learnt of the jumps between any two times, against the exact ones. Least squares
(power 0) has the exact average velocity as its fixed point; with the paper's power 1 the
conditional velocities, which scatter, are no longer averaged but their bulk is followed.

    fastflow train --config configs/experiments/Toy/config_mf_gaussian_mixture.py
    fastflow evaluate runs/mf_gaussian_mixture
"""

from torch.optim import Adam

from configs.experiments.Toy.common import COMMON, MODEL, at_most, callbacks, evaluation
from fastflow.config import lazy
from fastflow.experiment import Experiment
from fastflow.regression import AdaptiveL2
from fastflow.times import LogitNormal, PairLaw
from fastflow.wrappers import VelocityNetwork
from methods.mean_flow import MeanFlow

JUMPS = ((1.0, 0.5), (0.9, 0.3), (0.5, 0.0), (0.3, 0.1))


def experiment() -> Experiment:
    return Experiment(
        name="mf_gaussian_mixture",
        method=MeanFlow(
            times=PairLaw(times=LogitNormal(mean=-0.6, std=1.4), equal=0.5),
            regression=AdaptiveL2(power=0.0),
        ),
        network=lazy(VelocityNetwork, model=MODEL.replace(two_times=True), time_scale=2.0),
        optimizer=lazy(Adam, lr=4e-3, betas=(0.9, 0.99)),
        batch_size=1024,
        steps=2500,
        callbacks=callbacks(ema=0.99),
        evaluation=evaluation({2: (0.5,), 4: (0.75, 0.5, 0.25)}, jumps=JUMPS),
        expected=(
            *at_most({1: 0.007, 2: 0.003, 4: 0.003}),
            *at_most({1: 0.003}, metric="jump_error_0.5_0"),
            *at_most({1: 0.00018}, metric="jump_error_0.9_0.3"),
        ),
        **COMMON,
    )
