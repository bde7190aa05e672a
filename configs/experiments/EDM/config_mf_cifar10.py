"""MeanFlow on CIFAR-10, unconditional, from scratch (arXiv 2505.13447).

The hyperparameters are those of NVIDIA FastGen's configuration of the same name, whose result is
better than the paper's.
Expected FID: 2.82 in one step (FastGen), 2.92 (the paper). Cost: 1 million steps of 1,024 images,
1,024 million images.

    python train.py --config configs/experiments/EDM/config_mf_cifar10.py
"""

from torch.optim import Adam

from configs.experiments.common import CONSTANT_EMAS, UNIFORM_TIMES, callbacks
from configs.experiments.EDM.common import CIFAR10, evaluation
from fastflow.config import lazy
from fastflow.data.augment import MEANFLOW_CIFAR10
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment
from fastflow.regression import AdaptiveL2
from fastflow.rows import FirstRows
from fastflow.schedules import LinearWarmup
from fastflow.times import LogitNormal, PairLaw
from methods.mean_flow import MeanFlow
from networks import presets


def experiment() -> Experiment:
    return Experiment(
        name="mf_cifar10",
        method=MeanFlow(
            times=PairLaw(
                times=LogitNormal(mean=-0.6, std=1.6, t_max=0.999),
                ends=LogitNormal(mean=-4.0, std=1.6, t_max=0.999),
                equal=0.25,
                order="sort",
                rows=FirstRows(count="binomial"),
            ),
            regression=AdaptiveL2(power=0.75, c=1e-3),
        ),
        network=presets.MEANFLOW_CIFAR10,
        data=CIFAR10.replace(flip=True),
        augment=MEANFLOW_CIFAR10,
        optimizer=lazy(Adam, lr=6e-4, betas=(0.9, 0.999), eps=1e-8),
        lr=LinearWarmup(images=9_999_360),  # 9,765 steps
        batch_size=1024,
        steps=1_000_000,
        callbacks=callbacks(emas=CONSTANT_EMAS, log_every=1000, every=50_000),
        evaluation=evaluation(UNIFORM_TIMES),
        expected=(
            Expected(steps=1, value=2.82, source="FastGen"),
            Expected(steps=1, value=2.92, source="MeanFlow, arXiv 2505.13447", note="800k steps"),
        ),
        published={
            "start of sampling": "t 0.999 (FastGen), here 1",
        },
    )
