"""CM on CIFAR-10, unconditional: consistency tuning with a continuous ratio r(t).

Sources: consistency models (arXiv 2303.01469), the pairing of ECT (arXiv 2406.14548), the
hyperparameters of NVIDIA FastGen's configuration of the same name.
Expected FID: 2.92 in one step (FastGen), 3.60 (ECT, 400k iterations at batch 128); two steps 2.11
(ECT, t = 0.821 between). Cost: 350k steps of 512 images, 179 million images.
It starts from the weights of EDM's DDPM++ on CIFAR-10, which are downloaded once (223 MB);
`init_from=null` starts from random ones.

    python train.py --config configs/experiments/EDM/config_cm_cifar10.py
"""

from torch.optim import RAdam

from callbacks.ct_schedule import CTScheduleCallback
from configs.experiments.common import CONSTANT_EMAS, EDM_CIFAR10_WEIGHTS, START, callbacks
from configs.experiments.EDM.common import CIFAR10, CIFAR10_TIMES, evaluation
from fastflow.config import lazy
from fastflow.consistency import InverseGap, PseudoHuber, RatioPairing
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment
from fastflow.schedules import RatioStages, SigmoidRatio
from fastflow.times import TruncatedLogNormal
from methods.cm import CM
from networks import presets


def experiment() -> Experiment:
    schedule = RatioStages(q=2.0, kimg_per_stage=6400, limit=0.999)
    return Experiment(
        name="cm_cifar10",
        method=CM(
            pairs=RatioPairing(
                times=TruncatedLogNormal(mean=-1.1, std=2.0, t_min=0.002, t_max=80.0),
                gap=SigmoidRatio(k=8.0, b=1.0, r_min=0.002),
                min_gap=1e-6,
            ),
            distance=PseudoHuber(c=1e-8),
            weight=InverseGap(),
            boundary=0.0,
        ),
        network=presets.with_model(presets.DDPMPP_CIFAR10, dropout=0.2),
        data=CIFAR10,
        optimizer=lazy(RAdam, lr=1e-4, betas=(0.9, 0.999), eps=1e-8),
        batch_size=512,
        steps=350_000,
        init_from=EDM_CIFAR10_WEIGHTS,
        callbacks=callbacks(lazy(CTScheduleCallback, schedule=schedule), emas=CONSTANT_EMAS),
        evaluation=evaluation(CIFAR10_TIMES),
        expected=(
            Expected(steps=1, value=2.92, source="FastGen"),
            Expected(steps=1, value=3.60, source="ECT", note="400k iterations at batch 128"),
            Expected(steps=2, value=2.11, source="ECT", note="400k iterations at batch 128"),
        ),
        published={
            "init_from": EDM_CIFAR10_WEIGHTS,  # told where an override takes it away
            **START,
        },
    )
