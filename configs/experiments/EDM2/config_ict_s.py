"""iCT on ImageNet-64 with EDM2-S: the objective of arXiv 2310.14189 on a network of today.

The grid, its law, distance and weight, batch and length are iCT's. The paper trains an ADM from
scratch; optimizer, initial weights and dropout here are those of config_cm_s.py, which suit EDM2.
Expected FID: of the paper's network, 4.02 in one step and 3.20 in two. Cost: 800k steps of 4,096
images, 3,277 million images.

    python train.py --config configs/experiments/EDM2/config_ict_s.py data.path=FILE
"""

from functools import partial

from torch.optim import Adam

from callbacks.ct_schedule import CTScheduleCallback
from configs.experiments.common import EDM2_S_WEIGHTS, callbacks
from configs.experiments.EDM2.common import DATA, evaluation, network
from fastflow.config import lazy
from fastflow.ema import ConstantEMA
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment
from fastflow.schedules import DoublingDiscretization, InverseSqrtLR
from methods.ict import ICT
from networks import presets

PAPER = partial(Expected, source="iCT, arXiv 2310.14189", note="ADM, from scratch")


def experiment() -> Experiment:
    schedule = DoublingDiscretization(s0=10, s1=1280)
    return Experiment(
        name="ict_s",
        method=ICT(huber=0.00054),
        network=network(presets.EDM2_S, dropout=0.4),
        data=DATA,
        optimizer=lazy(Adam, lr=1e-3, betas=(0.9, 0.99), eps=1e-8),
        lr=InverseSqrtLR(ref_batches=2000),
        batch_size=4096,
        steps=800_000,
        init_from=EDM2_S_WEIGHTS,
        callbacks=callbacks(
            lazy(CTScheduleCallback, schedule=schedule), emas=(ConstantEMA(beta=0.99997),)
        ),
        evaluation=evaluation({2: (1.526,)}),
        expected=(PAPER(steps=1, value=4.02), PAPER(steps=2, value=3.20)),
        published={
            "network": "ADM, dropout 0.2 at 16 x 16 and below; here EDM2-S, dropout 0.4",
            "weights": "random, here those of EDM2-S",
            "optimizer": "RAdam at 1e-4, constant",
        },
    )
