"""What the experiments with the EDM networks share: data, networks, evaluation."""

from __future__ import annotations

from collections.abc import Mapping

from fastflow.config import Lazy, lazy
from fastflow.data.cifar10 import Cifar10
from fastflow.data.edm_zip import ImageZip
from fastflow.evaluation.metrics import FID
from fastflow.evaluation.spec import Evaluation
from fastflow.wrappers import TrigFlowNetwork
from networks.edm2 import LogVariance

CIFAR10 = lazy(Cifar10, flip=False)
"""Without mirrored images, as all consistency training that starts from EDM's weights."""

IMAGENET64 = lazy(ImageZip, path="data/imagenet-64x64.zip")
"""Written by EDM's dataset tool: --resolution=64x64 --transform=center-crop."""

CIFAR10_TIMES = {2: (0.821,)}
IMAGENET64_TIMES = {2: (1.526,)}
"""The intermediate times of two steps."""


def trigflow(denoiser: Lazy) -> Lazy:
    """The model of a denoiser as a TrigFlow network that reads ln(sigma), with learned weights."""
    return lazy(
        TrigFlowNetwork,
        model=denoiser.model,
        time="log_sigma",
        logvar_head=lazy(LogVariance),
    )


def evaluation(
    times: Mapping[int, tuple[float, ...]], steps: tuple[int, ...] = (1, 2, 4, 8)
) -> Evaluation:
    """FID of 50,000 samples over three blocks of seeds, at these numbers of steps."""
    return Evaluation(metrics=(FID(),), samples=50_000, steps=steps, times=dict(times), blocks=3)
