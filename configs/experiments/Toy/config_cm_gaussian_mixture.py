"""CM on a ring of eight Gaussians in the plane, where the true flow map is known.

Shows what consistency training learns against what it should: the mean squared error of the map
from noise to data. As the steps to the target shrink (ratio towards 1) the bias of training on
conditional lines goes to zero (arXiv 2303.01469, theorem 2).

    fastflow train --config configs/experiments/Toy/config_cm_gaussian_mixture.py
    fastflow evaluate runs/cm_gaussian_mixture
"""

from torch.optim import RAdam

from callbacks.checkpoint import CheckpointCallback
from callbacks.ct_schedule import CTScheduleCallback
from callbacks.curves import Curves
from callbacks.ema import EMACallback
from callbacks.jsonl_log import JsonlLog
from callbacks.loss_by_time import LossByTime
from callbacks.nonfinite import NonFiniteGuard
from callbacks.progress_bar import ProgressBar
from callbacks.sample_grid import SampleGrid
from fastflow.config import lazy
from fastflow.consistency import InverseGap, PseudoHuber, RatioPairing
from fastflow.data.toy import GaussianMixture2D
from fastflow.ema import ConstantEMA
from fastflow.evaluation.spec import Evaluation
from fastflow.evaluation.toy_metrics import EnergyDistance, FlowMapError
from fastflow.experiment import Experiment
from fastflow.schedules import RatioStages, SigmoidRatio
from fastflow.times import LogNormal
from fastflow.wrappers import EDMDenoiser
from methods.cm import CM
from networks.mlp import ToyMLP


def experiment() -> Experiment:
    return Experiment(
        name="cm_gaussian_mixture",
        method=CM(
            pairs=RatioPairing(times=LogNormal(mean=-1.1, std=2.0), gap=SigmoidRatio(k=8.0, b=1.0)),
            distance=PseudoHuber(c=0.03),
            weight=InverseGap(),
            boundary=0.0,
        ),
        network=lazy(EDMDenoiser, model=lazy(ToyMLP, data_dim=2, width=128, depth=4)),
        data=lazy(GaussianMixture2D, modes=8, radius=0.7, radial_std=0.1, tangential_std=0.1),
        optimizer=lazy(RAdam, lr=1e-3, betas=(0.9, 0.999)),
        batch_size=1024,
        steps=6000,
        callbacks=(
            lazy(CTScheduleCallback, schedule=RatioStages(q=2.0, kimg_per_stage=768)),
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
            metrics=(FlowMapError(), EnergyDistance()),
            samples=4096,
            steps=(1, 2, 4),
            times={2: (0.821,), 4: (5.3, 0.821, 0.2)},
            batch_size=4096,
            quantisation="none",
        ),
    )
