"""sCD on ImageNet-64 with EDM's ADM network, class-conditional (arXiv 2410.11081).

The hyperparameters are those of NVIDIA FastGen's configuration of the same name, without a
published result; the paper distils EDM2 instead. Student and teacher start from EDM's weights.
Expected FID: of the paper with EDM2-XL, 2.44 in one step and 1.66 in two. Cost: 600k steps of 1,024
images, 614 million images.

    python train.py --config configs/experiments/EDM/config_scd_in64.py data.path=FILE
"""

from functools import partial

from torch.optim import Adam

from configs.experiments.common import CONSTANT_EMAS, EDM_IMAGENET64_WEIGHTS, START, callbacks
from configs.experiments.EDM.common import IMAGENET64, evaluation, trigflow
from fastflow.config import lazy
from fastflow.consistency import InverseSigma
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment
from fastflow.method import Frozen
from fastflow.schedules import InverseSqrtLR, LinearRamp
from fastflow.teacher import Teacher
from fastflow.times import TruncatedLogNormal
from methods.scm import SCM
from networks import presets

PAPER = partial(Expected, source="sCM, arXiv 2410.11081", note="EDM2-XL, batch 2048, 400k steps")


def experiment() -> Experiment:
    denoiser = presets.with_model(presets.ADM_IMAGENET64, dropout=0.0)
    return Experiment(
        name="scd_in64",
        method=SCM(
            times=TruncatedLogNormal(mean=-1.0, std=1.6, t_min=0.002, t_max=80.0),
            teacher=Teacher(source=Frozen(weights=EDM_IMAGENET64_WEIGHTS, network=denoiser)),
            warmup=LinearRamp(steps=10_000),
            limit="rms",
            c=0.1,
            weight=InverseSigma(power=1.0),
            average="mean/d",
        ),
        network=trigflow(denoiser),
        data=IMAGENET64,
        optimizer=lazy(Adam, lr=7e-5, betas=(0.9, 0.99), eps=1e-11),
        lr=InverseSqrtLR(ref_batches=35_000),
        batch_size=1024,
        steps=600_000,
        precision="bf16",
        init_from=EDM_IMAGENET64_WEIGHTS,
        callbacks=callbacks(emas=CONSTANT_EMAS, max_norm=10.0),
        evaluation=evaluation({2: (1.1,)}),
        expected=(PAPER(steps=1, value=2.44), PAPER(steps=2, value=1.66)),
        published={
            "init_from": EDM_IMAGENET64_WEIGHTS,
            "derivative": "float32 beside bf16 autocast; here bf16 as well, unless precision=fp32",
            "logvar_head": "linear in the U-Net's noise embedding, here in Fourier features",
            **START,
        },
    )
