"""ECT on CIFAR-10, unconditional, with the hyperparameters of its paper (arXiv 2406.14548).

Eight stages of 50,000 steps, q = 2; config_cm_cifar10.py trains longer in larger batches.
Expected FID: 3.60 in one step, 2.11 in two (ECT's repository, 400k iterations). Cost: 400k steps of
128 images, 51 million images. It starts from EDM's weights (223 MB).

    python train.py --config configs/experiments/EDM/config_ect_cifar10.py
"""

from torch.optim import RAdam

from callbacks.ct_schedule import CTScheduleCallback
from configs.experiments.common import EDM_CIFAR10_WEIGHTS, callbacks
from configs.experiments.EDM.common import CIFAR10, CIFAR10_TIMES, evaluation
from fastflow.config import lazy
from fastflow.consistency import InverseGap, PseudoHuber
from fastflow.ema import ConstantEMA
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment
from fastflow.schedules import RatioStages, SigmoidRatio
from fastflow.times import LogNormal
from methods.ect import ECT
from networks import presets


def experiment() -> Experiment:
    schedule = RatioStages(q=2.0, kimg_per_stage=6400)
    return Experiment(
        name="ect_cifar10",
        method=ECT(
            times=LogNormal(mean=-1.1, std=2.0),
            gap=SigmoidRatio(k=8.0, b=1.0),
            distance=PseudoHuber(c=0.0),
            weight=InverseGap(),
            shift=0.003,
        ),
        network=presets.with_model(presets.DDPMPP_CIFAR10, dropout=0.2),
        data=CIFAR10,
        optimizer=lazy(RAdam, lr=1e-4, betas=(0.9, 0.999), eps=1e-8),
        batch_size=128,
        steps=400_000,
        init_from=EDM_CIFAR10_WEIGHTS,
        callbacks=callbacks(
            lazy(CTScheduleCallback, schedule=schedule), emas=(ConstantEMA(beta=0.9999),)
        ),
        evaluation=evaluation(CIFAR10_TIMES),
        expected=(
            Expected(steps=1, value=3.60, source="ECT"),
            Expected(steps=2, value=2.11, source="ECT"),
        ),
        published={"init_from": EDM_CIFAR10_WEIGHTS},
    )
