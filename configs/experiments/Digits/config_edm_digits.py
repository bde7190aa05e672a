"""A denoiser on the digits (EDM, arXiv 2206.00364): the teacher of the distilled methods.

The default hyperparameters are EDM's own.

    fastflow train --config configs/experiments/Digits/config_edm_digits.py
"""

from configs.experiments.Digits.common import COMMON, UNET, at_most, callbacks, evaluation
from fastflow.config import lazy
from fastflow.experiment import Experiment
from fastflow.wrappers import EDMDenoiser
from methods.edm import EDM


def experiment() -> Experiment:
    return Experiment(
        name="edm_digits",
        method=EDM(),
        network=lazy(EDMDenoiser, model=UNET),
        callbacks=callbacks(),
        evaluation=evaluation({}, steps=(32,)),
        expected=at_most({32: 3.9}),
        **COMMON,
    )
