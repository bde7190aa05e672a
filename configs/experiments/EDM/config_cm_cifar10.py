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

from callbacks.checkpoint import CheckpointCallback
from callbacks.ct_schedule import CTScheduleCallback
from callbacks.ema import EMACallback
from callbacks.grad_clip import GradClipCallback
from callbacks.jsonl_log import JsonlLog
from callbacks.model_summary import ModelSummary
from callbacks.nonfinite import NonFiniteGuard
from callbacks.progress_bar import ProgressBar
from callbacks.sample_grid import SampleGrid
from fastflow.config import lazy
from fastflow.consistency import InverseGap, PseudoHuber, RatioPairing
from fastflow.data.cifar10 import Cifar10
from fastflow.ema import ConstantEMA
from fastflow.evaluation.metrics import FID
from fastflow.evaluation.spec import Evaluation, Expected
from fastflow.experiment import Experiment
from fastflow.schedules import RatioStages, SigmoidRatio
from fastflow.times import TruncatedLogNormal
from fastflow.wrappers import EDMDenoiser
from methods.cm import CM
from networks.song_unet import SongUNet

EDM_WEIGHTS = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl"


def experiment() -> Experiment:
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
        network=lazy(
            EDMDenoiser,
            model=lazy(
                SongUNet,
                resolution=32,
                in_channels=3,
                out_channels=3,
                augment_dim=9,  # unused in training; the initial weights have them
                channels=128,
                channel_mult=(2, 2, 2),
                num_blocks=4,
                attn_resolutions=(16,),
                dropout=0.2,
            ),
        ),
        data=lazy(Cifar10, flip=False),
        optimizer=lazy(RAdam, lr=1e-4, betas=(0.9, 0.999), eps=1e-8),
        batch_size=512,
        steps=350_000,
        init_from=EDM_WEIGHTS,
        callbacks=(
            lazy(CTScheduleCallback, schedule=RatioStages(q=2.0, kimg_per_stage=6400, limit=0.999)),
            lazy(NonFiniteGuard),
            lazy(GradClipCallback, max_norm=1e6),
            lazy(EMACallback, law=ConstantEMA(beta=0.9999)),
            lazy(EMACallback, law=ConstantEMA(beta=0.99995)),
            lazy(EMACallback, law=ConstantEMA(beta=0.9996)),
            lazy(ModelSummary),
            lazy(ProgressBar),
            lazy(JsonlLog, every=100),
            lazy(SampleGrid, every=5000),
            lazy(CheckpointCallback, every=5000),
        ),
        evaluation=Evaluation(
            metrics=(FID(),), samples=50_000, steps=(1, 2, 4, 8), times={2: (0.821,)}, blocks=3
        ),
        expected=(
            Expected(steps=1, value=2.92, source="FastGen"),
            Expected(steps=1, value=3.60, source="ECT", note="400k iterations at batch 128"),
            Expected(steps=2, value=2.11, source="ECT", note="400k iterations at batch 128"),
        ),
        published={
            "init_from": EDM_WEIGHTS,  # told where an override takes it away
            "start of sampling": "sigma 79.56 (FastGen), here 80",
        },
    )
