"""TCM on ImageNet-64 with EDM2-XL: the second stage of config_cm_xl.py (arXiv 2410.14895).

Both the student and the frozen model below t = 1 are that run, which `fastflow train` trains first
where it is not finished. The hyperparameters are the paper's; what it leaves open is from NVIDIA
FastGen's configuration of the same name.
Expected FID: 2.20 in one step, 1.62 in two (the paper); 2.23 in one (FastGen). Cost: 400k steps of
1,024 images, 410 million images, after the 154 million of the first stage.

    fastflow train --config configs/experiments/EDM2/config_tcm_xl.py
"""

from torch.optim import Adam

from callbacks.ct_schedule import CTScheduleCallback
from configs.experiments.common import SCALER, START, callbacks
from configs.experiments.EDM2.common import DATA, TCM_EMAS, evaluation, network
from fastflow.config import lazy
from fastflow.consistency import InverseCout, PseudoHuber
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment, Prerequisite
from fastflow.method import Frozen
from fastflow.schedules import InverseSqrtLR, RatioStages
from fastflow.times import TruncatedLogStudentT
from methods.tcm import TCM
from networks import presets

STAGE1 = Prerequisite(config="configs/experiments/EDM2/config_cm_xl.py", run_dir="runs/cm_xl")


def experiment() -> Experiment:
    schedule = RatioStages(q=4.0, kimg_per_stage=1000, limit=0.9961, offset_images=153_600_000)
    return Experiment(
        name="tcm_xl",
        method=TCM(
            stage1=Frozen(weights=STAGE1.run_dir),
            transition=1.0,
            times=TruncatedLogStudentT(df=0.01, loc=0.0, scale=0.2, t_min=1.0, t_max=80.0),
            distance=PseudoHuber(c=0.06),
            weight=InverseCout(),
            boundary_share=0.25,
            boundary_weight=0.1,
        ),
        network=network(presets.EDM2_XL, dropout=0.5),
        data=DATA,
        optimizer=lazy(Adam, lr=1e-4, betas=(0.9, 0.99), eps=1e-8),
        lr=InverseSqrtLR(ref_batches=8000),
        batch_size=1024,
        steps=400_000,
        precision="fp16",
        init_from=STAGE1.run_dir,
        prerequisites=(STAGE1,),
        callbacks=callbacks(lazy(CTScheduleCallback, schedule=schedule), emas=TCM_EMAS),
        evaluation=evaluation({2: (1.526,)}),
        expected=(
            Expected(steps=1, value=2.20, source="TCM, arXiv 2410.14895"),
            Expected(steps=2, value=1.62, source="TCM, arXiv 2410.14895"),
            Expected(steps=1, value=2.23, source="FastGen"),
        ),
        published={
            "init_from": "the first stage",
            "first stage": "batch 2048 (the paper), here config_cm_xl.py's 1024",
            "weights of the first stage": "those of the last step (FastGen), here its first EMA",
            **SCALER,
            **START,
        },
    )
