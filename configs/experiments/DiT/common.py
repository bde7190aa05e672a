"""What the experiments with transformers on ImageNet-256 share.

Samples are latents: 4 x 32 x 32 numbers of Stable Diffusion's autoencoder times 0.18215. fastflow
has no autoencoder, so samples are decoded and FID is measured elsewhere, and no pictures are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Adam

from configs.experiments.common import CONSTANT_EMAS, UNIFORM_TIMES, callbacks
from fastflow.config import lazy
from fastflow.data.latents import LatentZip
from fastflow.evaluation.spec import Evaluation
from fastflow.guidance import MixedGuidance
from fastflow.regression import AdaptiveL2
from fastflow.rows import FirstRows
from fastflow.times import LogitNormal, PairLaw
from methods.mean_flow import MeanFlow

COMMON: Mapping[str, Any] = {
    "data": lazy(LatentZip, path="data/img256-sd.zip", scale=0.18215),
    "optimizer": lazy(Adam, lr=1e-4, betas=(0.9, 0.95), eps=1e-8),
    "batch_size": 1024,
    "steps": 1_200_000,
    "precision": "bf16",
    "callbacks": callbacks(emas=CONSTANT_EMAS, log_every=1000, every=50_000, pictures=()),
    "evaluation": Evaluation(metrics=(), steps=(1, 2, 4, 8), times=UNIFORM_TIMES, blocks=3),
    "published": {
        "start of sampling": "t 0.999 (FastGen), here 1",
        "derivative": "float32 beside bf16 autocast; here bf16 as well, unless precision=fp32",
        "data": "a new sample of each latent's distribution at every visit, here always the same",
    },
}
"""All of an `Experiment` but name, method, network and expected results."""


def mean_flow(guidance: MixedGuidance) -> MeanFlow:
    """MeanFlow with FastGen's hyperparameters on ImageNet-256."""
    return MeanFlow(
        times=PairLaw(
            times=LogitNormal(mean=-0.4, std=1.0, t_max=0.999),
            equal=0.75,
            rows=FirstRows(count="binomial"),
        ),
        regression=AdaptiveL2(power=1.0, c=1.0),
        guidance=guidance,
    )
