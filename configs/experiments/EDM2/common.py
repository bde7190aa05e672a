"""What the experiments with the EDM2 networks on ImageNet-64 share."""

from __future__ import annotations

from collections.abc import Mapping

from fastflow.config import Lazy, lazy
from fastflow.consistency import InverseCout, PseudoHuber, RatioPairing
from fastflow.data.edm_zip import ImageZip
from fastflow.ema import PowerEMA
from fastflow.evaluation.metrics import FID
from fastflow.evaluation.spec import Evaluation
from fastflow.schedules import RatioStages, SigmoidRatio
from fastflow.times import TruncatedLogNormal
from methods.cm import CM
from networks import presets

DATA = lazy(ImageZip, path="data/img64.zip")
"""Written by EDM2's dataset tool: convert --resolution=64x64 --transform=center-crop-dhariwal."""

STAGES = RatioStages(q=4.0, kimg_per_stage=3200, limit=0.9961)
"""The ratio of CM."""


TCM_EMAS = tuple(PowerEMA(gamma=gamma) for gamma in (16.97, 96.99, 6.94))
"""Of FastGen's set the paper's own first, with a width of 5 % of training, which is evaluated."""


def network(preset: Lazy, dropout: float) -> Lazy:
    """A preset with dropout where consistency training has it, without log-variance head."""
    changed = presets.with_model(preset, dropout=dropout, dropout_resolutions=(16, 8))
    return changed.replace(logvar_head=None)


def consistency_model() -> CM:
    """FastGen's CM on ImageNet-64: ECT's pairing and weight (arXiv 2406.14548)."""
    return CM(
        pairs=RatioPairing(
            times=TruncatedLogNormal(mean=-0.8, std=1.6, t_min=0.002, t_max=80.0),
            gap=SigmoidRatio(k=8.0, b=1.0, r_min=0.002),
            min_gap=1e-6,
        ),
        distance=PseudoHuber(c=0.06),
        weight=InverseCout(),
        boundary=0.0,
    )


def evaluation(times: Mapping[int, tuple[float, ...]]) -> Evaluation:
    """FID of 50,000 samples over three blocks of seeds."""
    return Evaluation(
        metrics=(FID(),), samples=50_000, steps=(1, 2, 4, 8), times=dict(times), blocks=3
    )
