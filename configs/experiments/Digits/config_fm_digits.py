"""Flow matching on the digits (arXiv 2210.02747): a teacher on the linear path.

Times are uniform; the network reads 4 t.

    fastflow train --config configs/experiments/Digits/config_fm_digits.py
"""

from configs.experiments.Digits.common import COMMON, UNET, at_most, callbacks, evaluation
from fastflow.config import lazy
from fastflow.experiment import Experiment
from fastflow.wrappers import VelocityNetwork
from methods.flow_matching import FlowMatching


def experiment() -> Experiment:
    network = lazy(VelocityNetwork, model=UNET, time_scale=4.0)
    return Experiment(
        name="fm_digits",
        method=FlowMatching(),
        network=network,
        callbacks=callbacks(),
        evaluation=evaluation({}, steps=(32,)),
        expected=at_most({32: 3.9}),
        **COMMON,
    )
