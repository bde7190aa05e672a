"""sCD on CIFAR-10, unconditional: EDM's denoiser distilled in continuous time (arXiv 2410.11081).

The hyperparameters are those of NVIDIA FastGen's configuration of the same name, whose result is
better than the paper's; student and teacher both start from EDM's weights (223 MB).
Expected FID: 3.22 in one step (FastGen); 3.66 and 2.52 in two (the paper, 400k steps). Cost: 500k
steps of 512 images, 256 million images.

    python train.py --config configs/experiments/EDM/config_scd_cifar10.py
"""

from torch.optim import RAdam

from configs.experiments.common import CONSTANT_EMAS, EDM_CIFAR10_WEIGHTS, START, callbacks
from configs.experiments.EDM.common import CIFAR10, evaluation, trigflow
from fastflow.config import lazy
from fastflow.consistency import InverseSigma
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment
from fastflow.method import Frozen
from fastflow.schedules import LinearRamp
from fastflow.teacher import Teacher
from fastflow.times import TruncatedLogNormal
from methods.scm import SCM
from networks import presets


def experiment() -> Experiment:
    denoiser = presets.with_model(presets.DDPMPP_CIFAR10, dropout=0.0)
    return Experiment(
        name="scd_cifar10",
        method=SCM(
            times=TruncatedLogNormal(mean=-1.0, std=1.4, t_min=0.002, t_max=80.0),
            teacher=Teacher(source=Frozen(weights=EDM_CIFAR10_WEIGHTS, network=denoiser)),
            warmup=LinearRamp(steps=10_000),
            limit="rms",
            c=0.1,
            weight=InverseSigma(power=1.0),
            average="mean/d",
        ),
        network=trigflow(denoiser),
        data=CIFAR10,
        optimizer=lazy(RAdam, lr=1e-4, betas=(0.9, 0.99), eps=1e-8),
        batch_size=512,
        steps=500_000,
        init_from=EDM_CIFAR10_WEIGHTS,
        callbacks=callbacks(emas=CONSTANT_EMAS),
        evaluation=evaluation({2: (1.1,)}),
        expected=(
            Expected(steps=1, value=3.22, source="FastGen"),
            Expected(steps=1, value=3.66, source="sCM, arXiv 2410.11081", note="400k steps"),
            Expected(steps=2, value=2.52, source="sCM, arXiv 2410.11081", note="400k steps"),
        ),
        published={
            "init_from": EDM_CIFAR10_WEIGHTS,
            "logvar_head": "linear in the U-Net's noise embedding, here in Fourier features",
            **START,
        },
    )
