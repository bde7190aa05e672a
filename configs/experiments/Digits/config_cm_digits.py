"""CM on scikit-learn's 8x8 digits with class labels: from scratch, in minutes on a CPU.

The pairing, the gap r(t), the distance and the weight are those of ECT (arXiv 2406.14548). The
schedule is shortened: 100 steps for each of four stages, then the last ratio, 0.9961, to the end.
What to expect is measured, not published: the FID in the features of a small digit classifier,
beside the FID between two halves of the real digits.

    fastflow train --config configs/experiments/Digits/config_cm_digits.py
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
from fastflow.data.digits import Digits
from fastflow.ema import PowerEMA
from fastflow.evaluation.extractors import DigitFeatures
from fastflow.evaluation.metrics import FID, RealHalves
from fastflow.evaluation.spec import Evaluation
from fastflow.experiment import Experiment
from fastflow.schedules import CosineLR, RatioStages, SigmoidRatio
from fastflow.times import LogNormal
from fastflow.wrappers import EDMDenoiser
from methods.cm import CM
from networks.song_unet import SongUNet


def experiment() -> Experiment:
    return Experiment(
        name="cm_digits",
        method=CM(
            pairs=RatioPairing(times=LogNormal(mean=-1.1, std=2.0), gap=SigmoidRatio(k=8.0, b=1.0)),
            distance=PseudoHuber(c=0.03),
            weight=InverseGap(),
            boundary=0.0,
        ),
        network=lazy(
            EDMDenoiser,
            model=lazy(
                SongUNet,
                resolution=8,
                in_channels=1,
                out_channels=1,
                cond_dim=10,
                channels=32,
                channel_mult=(1, 1),
                num_blocks=1,
                attn_resolutions=(),
                dropout=0.0,
            ),
        ),
        data=lazy(Digits),
        optimizer=lazy(RAdam, lr=5e-3, betas=(0.9, 0.999)),
        lr=CosineLR(),
        batch_size=128,
        steps=1400,
        callbacks=(
            lazy(
                CTScheduleCallback,
                schedule=RatioStages(q=4.0, kimg_per_stage=12.8, limit=0.9961),
            ),
            lazy(NonFiniteGuard),
            lazy(EMACallback, law=PowerEMA(std=0.07)),
            lazy(LossByTime),
            lazy(ProgressBar),
            lazy(JsonlLog, every=20),
            lazy(SampleGrid, every=700),
            lazy(CheckpointCallback, every=700),
            lazy(Curves),
        ),
        evaluation=Evaluation(
            metrics=(FID(extractor=DigitFeatures(), baseline=RealHalves()),),
            samples=5000,
            steps=(1, 2, 4),
            times={2: (0.821,), 4: (5.3, 0.821, 0.2)},
            batch_size=500,
            quantisation="none",
        ),
    )
