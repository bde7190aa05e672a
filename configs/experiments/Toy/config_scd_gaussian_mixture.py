"""sCD on a ring of eight Gaussians in the plane, where the true flow map is known.

Distils the denoiser of config_edm_gaussian_mixture.py, from whose weights the student starts
(arXiv 2410.11081, section 5): as a TrigFlow network it reads ln(sigma)/4 as before. The error of
the one-step map, squared per coordinate, was 0.014 after 110 s on one core; above 0.03 something is
wrong.

    fastflow train --config configs/experiments/Toy/config_scd_gaussian_mixture.py
    fastflow evaluate runs/scd_gaussian_mixture
"""

from torch.optim import RAdam

from callbacks.checkpoint import CheckpointCallback
from callbacks.curves import Curves
from callbacks.ema import EMACallback
from callbacks.jsonl_log import JsonlLog
from callbacks.loss_by_time import LossByTime
from callbacks.nonfinite import NonFiniteGuard
from callbacks.progress_bar import ProgressBar
from callbacks.sample_grid import SampleGrid
from fastflow.config import lazy
from fastflow.data.toy import GaussianMixture2D
from fastflow.ema import ConstantEMA
from fastflow.evaluation.spec import Evaluation
from fastflow.evaluation.toy_metrics import EnergyDistance, FlowMapError
from fastflow.experiment import Experiment, Prerequisite
from fastflow.method import Frozen
from fastflow.schedules import CosineLR, LinearRamp
from fastflow.teacher import Teacher
from fastflow.times import LogNormal
from fastflow.wrappers import EDMDenoiser, TrigFlowNetwork
from methods.scm import SCM
from networks.edm2 import LogVariance
from networks.mlp import ToyMLP

TEACHER = "runs/edm_gaussian_mixture"


def experiment() -> Experiment:
    model = lazy(ToyMLP, data_dim=2, width=128, depth=4)
    return Experiment(
        name="scd_gaussian_mixture",
        method=SCM(
            times=LogNormal(mean=-1.0, std=1.4),
            teacher=Teacher(source=Frozen(weights=TEACHER, network=lazy(EDMDenoiser, model=model))),
            warmup=LinearRamp(steps=600),
        ),
        network=lazy(
            TrigFlowNetwork,
            model=model,
            time="log_sigma",
            logvar_head=lazy(LogVariance, channels=32),
        ),
        data=lazy(GaussianMixture2D, modes=8, radius=0.7, radial_std=0.1, tangential_std=0.1),
        optimizer=lazy(RAdam, lr=1e-3, betas=(0.9, 0.99)),
        lr=CosineLR(),
        batch_size=256,
        steps=3000,
        init_from=TEACHER,
        prerequisites=(
            Prerequisite(
                config="configs/experiments/Toy/config_edm_gaussian_mixture.py", run_dir=TEACHER
            ),
        ),
        callbacks=(
            lazy(NonFiniteGuard),
            lazy(EMACallback, law=ConstantEMA(beta=0.997)),
            lazy(LossByTime),
            lazy(ProgressBar),
            lazy(JsonlLog, every=50),
            lazy(SampleGrid, every=2000),
            lazy(CheckpointCallback, every=2000),
            lazy(Curves),
        ),
        evaluation=Evaluation(
            metrics=(FlowMapError(), EnergyDistance()),
            samples=4096,
            steps=(1, 2, 4),
            times={2: (1.1,), 4: (1.48, 1.1, 0.4)},
            batch_size=4096,
            quantisation="none",
        ),
    )
