"""MeanFlow on the digits, from scratch (arXiv 2505.13447).

Half of the rows have r = t and learn the velocity, the others its average over [r, t]. Times are
uniform: one step starts from t = 1, which the paper's logit-normal laws hardly ever draw.

    fastflow train --config configs/experiments/Digits/config_mf_digits.py
"""

from configs.experiments.Digits.common import COMMON, UNET, at_most, callbacks, evaluation
from fastflow.config import lazy
from fastflow.experiment import Experiment
from fastflow.regression import AdaptiveL2
from fastflow.times import PairLaw, Uniform
from fastflow.wrappers import VelocityNetwork
from methods.mean_flow import MeanFlow


def experiment() -> Experiment:
    return Experiment(
        name="mf_digits",
        method=MeanFlow(
            times=PairLaw(times=Uniform(), equal=0.5),
            regression=AdaptiveL2(power=0.75, c=1e-3),
        ),
        network=lazy(VelocityNetwork, model=UNET.replace(two_times=True), time_scale=4.0),
        callbacks=callbacks(),
        evaluation=evaluation({2: (0.5,), 4: (0.75, 0.5, 0.25)}),
        expected=at_most({1: 5.2}),
        **COMMON,
    )
