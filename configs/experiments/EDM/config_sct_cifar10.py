"""sCT on CIFAR-10, unconditional: consistency training in continuous time (arXiv 2410.11081).

The hyperparameters are the paper's, whose result is the better one; NVIDIA FastGen trains 350k
steps, draws sigma up to 800, and bounds and weighs the tangent otherwise (see methods/scm.py).
Expected FID: 2.85 in one step, 2.06 in two (the paper); 3.23 in one (FastGen). Cost: 400k steps of
512 images, 205 million images. It starts from EDM's weights (223 MB).

    python train.py --config configs/experiments/EDM/config_sct_cifar10.py
"""

from torch.optim import RAdam

from configs.experiments.common import EDM_CIFAR10_WEIGHTS, callbacks
from configs.experiments.EDM.common import CIFAR10, evaluation, trigflow
from fastflow.config import lazy
from fastflow.ema import HalfLifeEMA
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment
from fastflow.schedules import LinearRamp
from fastflow.times import LogNormal
from methods.scm import SCM
from networks import presets


def experiment() -> Experiment:
    return Experiment(
        name="sct_cifar10",
        method=SCM(times=LogNormal(mean=-1.0, std=1.4), warmup=LinearRamp(steps=10_000), c=0.1),
        network=trigflow(presets.with_model(presets.DDPMPP_CIFAR10, dropout=0.2)),
        data=CIFAR10,
        optimizer=lazy(RAdam, lr=1e-4, betas=(0.9, 0.99), eps=1e-8),
        batch_size=512,
        steps=400_000,
        init_from=EDM_CIFAR10_WEIGHTS,
        callbacks=callbacks(emas=(HalfLifeEMA(half_life_images=500_000),)),
        evaluation=evaluation({2: (1.1,)}),
        expected=(
            Expected(steps=1, value=2.85, source="sCM, arXiv 2410.11081"),
            Expected(steps=2, value=2.06, source="sCM, arXiv 2410.11081"),
            Expected(steps=1, value=3.23, source="FastGen", note="350k steps, sigma up to 800"),
        ),
        published={
            "init_from": "a TrigFlow diffusion model of the paper's own, here EDM's weights",
            "network": "reads t, adaptive double normalisation; here EDM's, which reads ln(sigma)",
        },
    )
