"""CM on scikit-learn's 8x8 digits with class labels: from scratch, in minutes on a CPU.

The pairing, the gap r(t), the distance and the weight are those of ECT (arXiv 2406.14548). The
schedule is shortened: 100 steps for each of four stages, then the last ratio, 0.9961, to the end.
What to expect is measured, not published: the FID in the features of a small digit classifier,
beside the FID between two halves of the real digits.

    fastflow train --config configs/experiments/Digits/config_cm_digits.py
"""

from callbacks.ct_schedule import CTScheduleCallback
from configs.experiments.Digits.common import (
    COMMON,
    SIGMA_TIMES,
    UNET,
    at_most,
    callbacks,
    evaluation,
)
from fastflow.config import lazy
from fastflow.consistency import InverseGap, PseudoHuber, RatioPairing
from fastflow.experiment import Experiment
from fastflow.schedules import RatioStages, SigmoidRatio
from fastflow.times import LogNormal
from fastflow.wrappers import EDMDenoiser
from methods.cm import CM


def experiment() -> Experiment:
    schedule = RatioStages(q=4.0, kimg_per_stage=12.8, limit=0.9961)
    return Experiment(
        name="cm_digits",
        method=CM(
            pairs=RatioPairing(times=LogNormal(mean=-1.1, std=2.0), gap=SigmoidRatio(k=8.0, b=1.0)),
            distance=PseudoHuber(c=0.03),
            weight=InverseGap(),
            boundary=0.0,
        ),
        network=lazy(EDMDenoiser, model=UNET),
        callbacks=callbacks(lazy(CTScheduleCallback, schedule=schedule)),
        evaluation=evaluation(SIGMA_TIMES),
        expected=at_most({1: 5.2}),
        **COMMON,
    )
