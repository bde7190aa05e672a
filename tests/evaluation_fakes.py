"""What evaluation tests need: a model whose map is known, threads as processes, a result row."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastflow.data.dataset import Table
from fastflow.data.toy import Gaussian2D
from fastflow.distributed import World
from fastflow.errors import DataError
from fastflow.evaluation.evaluate import evaluate
from fastflow.evaluation.extractors import Extracted, Features, InceptionV3
from fastflow.evaluation.metrics import FID, KID, InceptionScore, PrecisionRecall
from fastflow.evaluation.results import Result
from fastflow.evaluation.spec import Evaluation
from fastflow.generate import generate, step_times
from fastflow.method import FlowMapMethod
from fastflow.network import Network
from fastflow.path import VE


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianMap(FlowMapMethod):
    """The exact map of the 2-D Gaussian data, plus `error` in every coordinate."""

    error: float = 0.0

    @property
    def path(self):
        return VE()

    def loss(self, nets, batch, now):
        raise AssertionError("not trained")

    def flow_map(self, net, x, t, s, cond=None):
        exact = DATA.oracle.on(self.path).flow_map(x, t, s)
        return exact.to(x) + self.error


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTimes(GaussianMap):
    two_times = True


DATA = Gaussian2D(size=4000)


@dataclasses.dataclass
class Model:
    """Samples with `generate`; records the seeds asked for."""

    method: FlowMapMethod
    shape: tuple[int, ...] = (2,)
    cond_dim: int = 0
    weights_name: str = "ema_0.99"
    step: int = 100
    images: int = 6400
    seconds: float = 12.5
    hardware: str = "1 x GPU"
    device: torch.device = torch.device("cpu")
    experiment: Any = dataclasses.field(
        default_factory=lambda: SimpleNamespace(name="toy", batch_size=64)
    )
    change: Callable[[Tensor], Tensor] = lambda x: x
    asked: list[int] = dataclasses.field(default_factory=list)

    def times(self, steps: int, between: Sequence[float] | None = None) -> tuple[float, ...]:
        return step_times(self.method, steps, between)

    def nfe(self, steps: int) -> int:
        return steps

    def jump(self, x, t, s, cond=None) -> Tensor:
        start, end = (torch.full((len(x),), v, dtype=torch.float64) for v in (t, s))
        return self.method.flow_map(Network(), x, start, end, cond)

    def sample(self, seeds, steps=1, times=None, cond=None) -> Tensor:
        self.asked += seeds
        x = generate(
            self.method, Network(), seeds, self.shape, self.times(steps, times), cond, self.device
        )
        return self.change(x)


@dataclasses.dataclass
class PictureModel(Model):
    """Sample i is picture number seed of a table, so its statistics are those of the table."""

    pictures: Table | None = None

    def sample(self, seeds, steps=1, times=None, cond=None) -> Tensor:
        self.asked += seeds
        rows = torch.tensor(list(seeds)) % len(self.pictures)
        return self.change(self.pictures.fetch(rows)[0])


def pictures(count: int, side: int = 4, seed: int = 0, name: str = "noise") -> Table:
    """Random RGB pictures of bytes."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (count, 3, side, side), generator=generator)
    return Table(name, levels.to(torch.uint8), None, num_classes=0, flip=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pixels(Features):
    """The pixels themselves as features, the first ones as logits: no network, no rounding."""

    side: int = 4
    classes: int = 5
    weights: str = "none"

    def build(self, device):
        return PixelExtractor(self)


class PixelExtractor:
    """Counts the images that it sees."""

    dtype = torch.float32
    frechet = "fd_pixels"
    quantisation = ""
    seen = 0

    def __init__(self, pixels: Pixels) -> None:
        self.name = f"pixels {pixels.side}"
        self.weights_hash = pixels.weights
        self.dim, self.classes = 3 * pixels.side**2, pixels.classes
        self._side = pixels.side

    def require(self, shape):
        if shape != (3, self._side, self._side):
            raise DataError(f"pixels: images of shape {shape} given")

    def __call__(self, images):
        PixelExtractor.seen += len(images)
        assert images.dtype == torch.uint8
        x = images.flatten(1).float() / 127.5 - 1
        return Extracted(x, 4 * x[:, : self.classes] if self.classes else None)


def measured_by_inception(
    world: World, weights: str, folder: str, scale: float = 1.0
) -> dict[str, Result]:
    """All metrics of six small pictures times `scale` against the pictures, by name."""
    inception = InceptionV3(weights=weights)
    metrics = (
        FID(extractor=inception),
        KID(extractor=inception, subsets=3, subset_size=5),
        InceptionScore(extractor=inception, splits=2),
        PrecisionRecall(extractor=inception),
    )
    data = pictures(6, side=32, name="pictures")
    model = PictureModel(GaussianMap(), shape=data.shape, pictures=data, change=lambda x: x * scale)
    plan = Evaluation(metrics=metrics, samples=6, steps=(1,), batch_size=2)
    return {row.metric: row for row in evaluate(model, plan, data, world, cache=Path(folder))}


def measured_by_pixels(world: World, folder: str) -> dict[str, Result]:
    """All metrics on pixels of 70 brighter pictures against 100, by name."""
    metrics = (
        FID(extractor=Pixels()),
        KID(extractor=Pixels(), subset_size=40),
        InceptionScore(extractor=Pixels()),
        PrecisionRecall(extractor=Pixels(), real=60),
    )
    data = pictures(100)
    model = PictureModel(GaussianMap(), shape=data.shape, pictures=data, change=lambda x: x * 1.1)
    plan = Evaluation(metrics=metrics, samples=70, steps=(1,), batch_size=20)
    return {row.metric: row for row in evaluate(model, plan, data, world, cache=Path(folder))}


class _Meeting:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=30)
        self.values: list[Any] = [None] * size


@dataclasses.dataclass(frozen=True)
class ThreadWorld(World):
    """One of several processes, as a thread; what they exchange is real."""

    meeting: Any = None

    def sum(self, value: Tensor) -> Tensor:
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        total = torch.stack(list(self.meeting.values)).sum(0)
        self.meeting.barrier.wait()
        return total

    def on_main(self, action: Callable[[], Any]) -> Any:
        if self.is_main:
            self.meeting.values[0] = action()
        self.meeting.barrier.wait()
        outcome = self.meeting.values[0]
        self.meeting.barrier.wait()
        return outcome


def together(size: int, work: Callable[[World], Any]) -> list[Any]:
    """Run `work` in `size` processes that are threads; their results by rank."""
    meeting = _Meeting(size)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadWorld(rank=rank, size=size, meeting=meeting))
        except BaseException as error:
            meeting.barrier.abort()
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


ROW = Result(
    experiment="cm_cifar10",
    method="CM",
    dataset="cifar10",
    metric="fid",
    value=3.0,
    std=0.05,
    min=2.95,
    values=(2.95, 3.0, 3.05),
    baseline=None,
    baseline_name="",
    steps=2,
    times=(80.0, 0.821),
    nfe=2,
    samples=50_000,
    first_seed=0,
    blocks=3,
    generated=50_000,
    extractor="inception-v3 2015-12-05, 2048",
    extractor_hash="6726825d",
    reference="cifar10-32x32.npz",
    reference_hash="abc",
    quantisation="truncate",
    weights="ema_0.9999",
    step=350_000,
    images=179_200_000,
    batch_size=512,
    commit="",
    train_seconds=3600.0,
    trained_on="8 x GPU",
    hardware="1 x GPU",
    torch="2.13.0",
    seconds=12.5,
)
