"""Flow matching on CIFAR-10, unconditional: a teacher on the linear path (arXiv 2210.02747).

DDPM++ without preconditioning as in config_mf_cifar10.py, with the optimizer, augmentation and
length of config_edm_cifar10.py, since no published recipe is for this network.
Expected FID: 2.58 (rectified flow, arXiv 2209.03003, 127 calls of an adaptive solver). Cost:
390,625 steps of 512 images, 200 million images.

    python train.py --config configs/experiments/EDM/config_fm_cifar10.py
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
from fastflow.times import Uniform
from fastflow.wrappers import VelocityNetwork
from methods.flow_matching import FlowMatching
from networks import presets


def experiment() -> Experiment:
    return Experiment(
        name="fm_cifar10",
        method=FlowMatching(times=Uniform()),
        network=lazy(VelocityNetwork, model=presets.DDPMPP_CIFAR10.model),
        data=CIFAR10,
        augment=EDM_CIFAR10,
        optimizer=lazy(Adam, lr=1e-3, betas=(0.9, 0.999), eps=1e-8),
        lr=LinearWarmup(images=10_000_000),
        batch_size=512,
        steps=390_625,
        callbacks=callbacks(emas=(HalfLifeEMA(half_life_images=500_000, rampup=0.05),)),
        evaluation=evaluation({}, steps=(127,)),
        expected=(
            Expected(steps=127, value=2.58, source="rectified flow, arXiv 2209.03003", note="RK45"),
        ),
        published={
            "network, optimizer, augmentation": "rectified flow's own, here those of EDM",
            "sampler": "RK45, 127 calls on average; here Euler's method, 127 steps",
        },
    )
