"""EDM on CIFAR-10, unconditional: the denoiser that the other experiments start from.

Source: arXiv 2206.00364, DDPM++ with variance-preserving hyperparameters; its weights are
published, so this is for a teacher of one's own.
Expected FID: 1.97 with Heun's method, 35 calls of the network (the paper). Cost: 390,625 steps of
512 images, 200 million images.

    python train.py --config configs/experiments/EDM/config_edm_cifar10.py
"""

from torch.optim import Adam

from configs.experiments.common import callbacks
from configs.experiments.EDM.common import CIFAR10, evaluation
from fastflow.config import lazy
from fastflow.data.augment import EDM_CIFAR10
from fastflow.ema import HalfLifeEMA
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment
from fastflow.schedules import LinearWarmup
from fastflow.times import LogNormal
from methods.edm import EDM
from networks import presets


def experiment() -> Experiment:
    return Experiment(
        name="edm_cifar10",
        method=EDM(times=LogNormal(mean=-1.2, std=1.2)),
        network=presets.DDPMPP_CIFAR10,
        data=CIFAR10,
        augment=EDM_CIFAR10,  # mirrors every other image
        optimizer=lazy(Adam, lr=1e-3, betas=(0.9, 0.999), eps=1e-8),
        lr=LinearWarmup(images=10_000_000),
        batch_size=512,
        steps=390_625,
        callbacks=callbacks(emas=(HalfLifeEMA(half_life_images=500_000, rampup=0.05),)),
        evaluation=evaluation({}, steps=(35,)),
        expected=(
            Expected(steps=35, value=1.97, source="EDM, arXiv 2206.00364", note="Heun, 18 steps"),
        ),
        published={"sampler": "Heun's method, 18 steps, 35 calls; here Euler's, 35 steps"},
    )
