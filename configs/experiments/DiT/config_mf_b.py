"""MeanFlow on ImageNet-256 latents with a DiT-B/2, from scratch (arXiv 2505.13447).

The hyperparameters are those of NVIDIA FastGen's configuration of the same name, without a
published result; guidance of scale 2 is built into training (omega 1, kappa 0.5).
Expected FID: 6.17 in one step (the paper). Cost: 1.2 million steps of 1,024 images, 1,229 million
images.

    python train.py --config configs/experiments/DiT/config_mf_b.py data.path=FILE
"""

from functools import partial

from configs.experiments.DiT.common import COMMON, mean_flow
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment
from fastflow.guidance import MixedGuidance
from fastflow.rows import FirstRows
from networks import presets

PAPER = partial(Expected, source="MeanFlow, arXiv 2505.13447", note="batch 256, 240 epochs")


def experiment() -> Experiment:
    return Experiment(
        name="mf_b",
        method=mean_flow(
            MixedGuidance(
                omega=1.0,
                kappa=0.5,
                t_max=1.0,
                label_dropout=0.1,
                dropped=FirstRows(count="binomial"),
            )
        ),
        network=presets.MEANFLOW_B_2,
        expected=(PAPER(steps=1, value=6.17),),
        **COMMON,
    )
