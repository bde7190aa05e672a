"""EDM on a ring of eight Gaussians in the plane, where the true flow map is known.

Trains the teacher of config_scd_gaussian_mixture.py.

    fastflow train --config configs/experiments/Toy/config_edm_gaussian_mixture.py
    fastflow evaluate runs/edm_gaussian_mixture
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
from fastflow.experiment import Experiment
from fastflow.schedules import CosineLR
from fastflow.times import LogNormal
from fastflow.wrappers import EDMDenoiser
from methods.edm import EDM
from networks.mlp import ToyMLP


def experiment() -> Experiment:
    return Experiment(
        name="edm_gaussian_mixture",
        method=EDM(times=LogNormal(mean=-1.2, std=1.6)),
        network=lazy(EDMDenoiser, model=lazy(ToyMLP, data_dim=2, width=128, depth=4)),
        data=lazy(GaussianMixture2D, modes=8, radius=0.7, radial_std=0.1, tangential_std=0.1),
        optimizer=lazy(RAdam, lr=2e-3, betas=(0.9, 0.999)),
        lr=CosineLR(),
        batch_size=512,
        steps=6000,
        callbacks=(
            lazy(NonFiniteGuard),
            lazy(EMACallback, law=ConstantEMA(beta=0.999)),
            lazy(LossByTime),
            lazy(ProgressBar),
            lazy(JsonlLog, every=50),
            lazy(SampleGrid, every=2000),
            lazy(CheckpointCallback, every=2000),
            lazy(Curves),
        ),
        evaluation=Evaluation(
            metrics=(FlowMapError(samples=128), EnergyDistance()),
            samples=4096,
            steps=(8, 32),
            batch_size=4096,
            quantisation="none",
        ),
    )
