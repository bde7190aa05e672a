"""CM on ImageNet-64 with EDM's ADM network, class-conditional: consistency tuning.

The pairing of ECT (arXiv 2406.14548) with the hyperparameters of NVIDIA FastGen's configuration of
the same name, without a published result. It leaves batch and length open; here they are those of
EDM2/config_cm_s.py. It starts from EDM's weights.
Expected FID: of iCT, which trains an ADM from scratch, 4.02 in one step and 3.20 in two. Cost: 150k
steps of 1,024 images, 154 million images.

    python train.py --config configs/experiments/EDM/config_cm_in64.py data.path=FILE
"""

from functools import partial

from torch.optim import Adam

from callbacks.ct_schedule import CTScheduleCallback
from configs.experiments.common import EDM_IMAGENET64_WEIGHTS, POWER_EMAS, SCALER, START, callbacks
from configs.experiments.EDM.common import IMAGENET64, IMAGENET64_TIMES, evaluation
from fastflow.config import lazy
from fastflow.consistency import InverseCout, PseudoHuber, RatioPairing
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment
from fastflow.schedules import InverseSqrtLR, RatioStages, SigmoidRatio
from fastflow.times import TruncatedLogNormal
from methods.cm import CM
from networks import presets

ICT = partial(Expected, source="iCT, arXiv 2310.14189", note="from scratch, batch 4096, 800k steps")


def experiment() -> Experiment:
    schedule = RatioStages(q=4.0, kimg_per_stage=3200, limit=0.9961)
    return Experiment(
        name="cm_in64",
        method=CM(
            pairs=RatioPairing(
                times=TruncatedLogNormal(mean=-0.8, std=1.6, t_min=0.002, t_max=80.0),
                gap=SigmoidRatio(k=8.0, b=1.0, r_min=0.002),
                min_gap=1e-6,
            ),
            distance=PseudoHuber(c=0.06),
            weight=InverseCout(),
            boundary=0.0,
        ),
        network=presets.with_model(presets.ADM_IMAGENET64, dropout=0.2),
        data=IMAGENET64,
        optimizer=lazy(Adam, lr=1e-3, betas=(0.9, 0.99), eps=1e-8),
        lr=InverseSqrtLR(ref_batches=2000),
        batch_size=1024,
        steps=150_000,
        precision="fp16",
        init_from=EDM_IMAGENET64_WEIGHTS,
        callbacks=callbacks(lazy(CTScheduleCallback, schedule=schedule), emas=POWER_EMAS),
        evaluation=evaluation(IMAGENET64_TIMES),
        expected=(ICT(steps=1, value=4.02), ICT(steps=2, value=3.20)),
        published={
            "init_from": EDM_IMAGENET64_WEIGHTS,
            "batch_size": "32 per GPU of an unknown number",
            "steps": "1,000,000, where nothing is set",
            **SCALER,
            **START,
        },
    )
