"""sCT on ImageNet-64 with EDM2-XL: consistency training in continuous time (arXiv 2410.11081).

The hyperparameters are the paper's; NVIDIA FastGen's configuration of the same name has no
published result and says of itself that starting from EDM2's weights is unstable: the paper trains
a TrigFlow diffusion model first.
Expected FID: 2.04 in one step, 1.48 in two (the paper). Cost: 400k steps of 2,048 images, 819
million images.

    python train.py --config configs/experiments/EDM2/config_scm_xl.py data.path=FILE
"""

from torch.optim import Adam

from configs.experiments.common import EDM2_XL_WEIGHTS, POWER_EMAS, SCALER, callbacks
from configs.experiments.EDM2.common import DATA, evaluation, network
from fastflow.config import lazy
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment
from fastflow.schedules import InverseSqrtLR, LinearRamp
from fastflow.times import LogNormal
from fastflow.wrappers import TrigFlowNetwork
from methods.scm import SCM
from networks import presets
from networks.edm2 import LogVariance


def experiment() -> Experiment:
    return Experiment(
        name="scm_xl",
        method=SCM(times=LogNormal(mean=-1.0, std=1.6), warmup=LinearRamp(steps=10_000), c=0.1),
        network=lazy(
            TrigFlowNetwork,
            model=network(presets.EDM2_XL, dropout=0.45).model,
            time="log_sigma",
            logvar_head=lazy(LogVariance),
        ),
        data=DATA,
        optimizer=lazy(Adam, lr=7e-5, betas=(0.9, 0.99), eps=1e-11),
        lr=InverseSqrtLR(ref_batches=35_000),
        batch_size=2048,
        steps=400_000,
        precision="fp16",
        init_from=EDM2_XL_WEIGHTS,
        callbacks=callbacks(emas=POWER_EMAS),
        evaluation=evaluation({2: (1.1,)}),
        expected=(
            Expected(steps=1, value=2.04, source="sCM, arXiv 2410.11081"),
            Expected(steps=2, value=1.48, source="sCM, arXiv 2410.11081"),
        ),
        published={
            "init_from": "a TrigFlow diffusion model of the paper's own, here EDM2's weights",
            "network": "reads t, positional embedding, adaptive double normalisation; here EDM2's",
            "callbacks": "EMAs not told; here the widths of FastGen",
            **SCALER,
        },
    )
