"""iCT on CIFAR-10, unconditional, from scratch (arXiv 2310.14189).

The number of grid points doubles from 11 to 1,281, every 50,000 steps.
Expected FID: 2.83 in one step, 2.46 in two (the paper). Cost: 400k steps of 1,024 images, 410
million images.

    python train.py --config configs/experiments/EDM/config_ict_cifar10.py
"""

from torch.optim import RAdam

from callbacks.ct_schedule import CTScheduleCallback
from configs.experiments.common import callbacks
from configs.experiments.EDM.common import CIFAR10, CIFAR10_TIMES, evaluation
from fastflow.config import lazy
from fastflow.ema import ConstantEMA
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment
from fastflow.schedules import DoublingDiscretization
from methods.ict import ICT
from networks import presets


def experiment() -> Experiment:
    schedule = DoublingDiscretization(s0=10, s1=1280)
    network = presets.with_model(
        presets.NCSNPP_CIFAR10, augment_dim=0, dropout=0.3, fourier_scale=0.02
    )
    return Experiment(
        name="ict_cifar10",
        method=ICT(huber=0.00054),
        network=network,
        data=CIFAR10.replace(flip=True),
        optimizer=lazy(RAdam, lr=1e-4, betas=(0.9, 0.999), eps=1e-8),
        batch_size=1024,
        steps=400_000,
        callbacks=callbacks(
            lazy(CTScheduleCallback, schedule=schedule), emas=(ConstantEMA(beta=0.99993),)
        ),
        evaluation=evaluation(CIFAR10_TIMES),
        expected=(
            Expected(steps=1, value=2.83, source="iCT, arXiv 2310.14189"),
            Expected(steps=2, value=2.46, source="iCT, arXiv 2310.14189"),
        ),
        published={
            "code": "none was released; the paper leaves open the EMA's decay and mirrored images"
        },
    )
