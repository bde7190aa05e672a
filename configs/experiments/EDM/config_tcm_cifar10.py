"""TCM on CIFAR-10, unconditional: the second stage of config_cm_cifar10.py (arXiv 2410.14895).

Both the student and the frozen model below t = 1 are that run, which `fastflow train` trains first
where it is not finished. The hyperparameters are the paper's, which NVIDIA FastGen takes over.
Expected FID: 2.46 in one step, 2.05 in two (the paper); 2.70 in one (FastGen). Cost: 300k steps of
1,024 images, 307 million images, after the 179 million of the first stage.

    fastflow train --config configs/experiments/EDM/config_tcm_cifar10.py
"""

from torch.optim import RAdam

from callbacks.ct_schedule import CTScheduleCallback
from configs.experiments.common import CONSTANT_EMAS, START, callbacks
from configs.experiments.EDM.common import CIFAR10, evaluation
from fastflow.config import lazy
from fastflow.consistency import InverseGap, PseudoHuber
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment, Prerequisite
from fastflow.method import Frozen
from fastflow.schedules import RatioStages
from fastflow.times import TruncatedLogStudentT
from methods.tcm import TCM
from networks import presets

STAGE1 = Prerequisite(
    config="configs/experiments/EDM/config_cm_cifar10.py", run_dir="runs/cm_cifar10"
)


def experiment() -> Experiment:
    schedule = RatioStages(q=2.0, kimg_per_stage=1000, limit=0.999, offset_images=179_200_000)
    return Experiment(
        name="tcm_cifar10",
        method=TCM(
            stage1=Frozen(weights=STAGE1.run_dir),
            transition=1.0,
            times=TruncatedLogStudentT(df=0.01, loc=0.0, scale=0.2, t_min=1.0, t_max=80.0),
            distance=PseudoHuber(c=1e-8),
            weight=InverseGap(),
            boundary_share=0.25,
            boundary_weight=0.1,
        ),
        network=presets.with_model(presets.DDPMPP_CIFAR10, dropout=0.2),
        data=CIFAR10,
        optimizer=lazy(RAdam, lr=5e-5, betas=(0.9, 0.999), eps=1e-8),
        batch_size=1024,
        steps=300_000,
        init_from=STAGE1.run_dir,
        prerequisites=(STAGE1,),
        callbacks=callbacks(lazy(CTScheduleCallback, schedule=schedule), emas=CONSTANT_EMAS),
        evaluation=evaluation({2: (1.0,)}),
        expected=(
            Expected(steps=1, value=2.46, source="TCM, arXiv 2410.14895"),
            Expected(steps=2, value=2.05, source="TCM, arXiv 2410.14895"),
            Expected(steps=1, value=2.70, source="FastGen"),
        ),
        published={
            "init_from": "the first stage",
            "weights of the first stage": "those of the last step (FastGen), here its first EMA",
            **START,
        },
    )
