"""CM on ImageNet-64 with EDM2-S, class-conditional: consistency tuning (arXiv 2406.14548).

The hyperparameters are those of NVIDIA FastGen's configuration of the same name; c, weight and
stages are ECT's. It starts from EDM2's weights.
Expected FID: 4.05 in one step (FastGen, and ECT), 2.79 in two (ECT). Cost: 150k steps of 1,024
images, 154 million images.

    python train.py --config configs/experiments/EDM2/config_cm_s.py data.path=FILE
"""

from torch.optim import Adam

from callbacks.ct_schedule import CTScheduleCallback
from configs.experiments.common import EDM2_S_WEIGHTS, POWER_EMAS, START, callbacks
from configs.experiments.EDM2.common import DATA, STAGES, consistency_model, evaluation, network
from fastflow.config import lazy
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment
from fastflow.schedules import InverseSqrtLR
from networks import presets


def experiment() -> Experiment:
    return Experiment(
        name="cm_s",
        method=consistency_model(),
        network=network(presets.EDM2_S, dropout=0.4),
        data=DATA,
        optimizer=lazy(Adam, lr=1e-3, betas=(0.9, 0.99), eps=1e-8),
        lr=InverseSqrtLR(ref_batches=2000),
        batch_size=1024,
        steps=150_000,
        init_from=EDM2_S_WEIGHTS,
        callbacks=callbacks(lazy(CTScheduleCallback, schedule=STAGES), emas=POWER_EMAS),
        evaluation=evaluation({2: (1.526,)}),
        expected=(
            Expected(steps=1, value=4.05, source="FastGen"),
            Expected(steps=1, value=4.05, source="ECT", note="the longer of its runs"),
            Expected(steps=2, value=2.79, source="ECT", note="the longer of its runs"),
        ),
        published={"init_from": EDM2_S_WEIGHTS, **START},
    )
