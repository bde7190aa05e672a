"""Experiments small enough to be trained in a test, and comparisons to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from callbacks.checkpoint import CheckpointCallback
from callbacks.ct_schedule import CTScheduleCallback
from callbacks.ema import EMACallback
from callbacks.grad_clip import GradClipCallback
from callbacks.jsonl_log import JsonlLog
from callbacks.nonfinite import NonFiniteGuard
from fastflow.config import Lazy, lazy
from fastflow.consistency import GridPairing, InverseGap, PseudoHuber, RatioPairing
from fastflow.data.digits import Digits
from fastflow.data.toy import GaussianMixture2D
from fastflow.distributed import World
from fastflow.ema import ConstantEMA, PowerEMA
from fastflow.evaluation.spec import Evaluation
from fastflow.evaluation.toy_metrics import EnergyDistance
from fastflow.experiment import Experiment
from fastflow.method import Frozen
from fastflow.schedules import DoublingDiscretization, FixedDecay, RatioStages, SigmoidRatio
from fastflow.state import TrainState
from fastflow.teacher import Teacher
from fastflow.times import LogNormal
from fastflow.trainer import Trainer
from fastflow.wrappers import EDMDenoiser
from methods.cm import CM
from networks.mlp import ToyMLP
from networks.song_unet import SongUNet

RATIO = RatioPairing(times=LogNormal(mean=-1.1, std=2.0), gap=SigmoidRatio(k=8.0, b=1.0))
RATIO_CURRICULUM = lazy(CTScheduleCallback, schedule=RatioStages(q=2.0, kimg_per_stage=0.032))
GRID_CURRICULUM = lazy(CTScheduleCallback, schedule=DoublingDiscretization(s0=4, s1=16))
MLP = lazy(EDMDenoiser, model=lazy(ToyMLP, data_dim=2, width=16, depth=2))


def drivers(curriculum: Lazy = RATIO_CURRICULUM) -> tuple[Lazy, ...]:
    return (
        curriculum,
        lazy(NonFiniteGuard, every=2),
        lazy(GradClipCallback, max_norm=1.0),
        lazy(EMACallback, law=ConstantEMA(beta=0.9)),
        lazy(EMACallback, law=PowerEMA(std=0.1)),
    )


OBSERVERS = (lazy(JsonlLog, every=2), lazy(CheckpointCallback, every=4))


def toy(**changes) -> Experiment:
    """CM with a ratio curriculum on points in the plane; two stages within 6 steps of 16."""
    experiment = Experiment(
        name="tiny_toy",
        method=CM(pairs=RATIO, distance=PseudoHuber(c=0.03), weight=InverseGap(), boundary=0.0),
        network=MLP,
        data=lazy(GaussianMixture2D, modes=4, size=200),
        optimizer=lazy(torch.optim.RAdam, lr=1e-3),
        batch_size=16,
        steps=6,
        callbacks=(*drivers(), *OBSERVERS),
        evaluation=Evaluation(
            metrics=(EnergyDistance(),), samples=64, steps=(1, 2), quantisation="none"
        ),
    )
    return dataclasses.replace(experiment, **changes)


def toy_with_target(**changes) -> Experiment:
    """CT on a grid with an EMA target network."""
    method = CM(pairs=GridPairing(), target=FixedDecay(mu=0.9))
    changes = {"callbacks": (*drivers(GRID_CURRICULUM), *OBSERVERS), **changes}
    return toy(name="tiny_target", method=method, **changes)


def toy_with_teacher(weights: Path, **changes) -> Experiment:
    """CD on a grid from the weights of a network of the same kind."""
    method = CM(pairs=GridPairing(), teacher=Teacher(source=Frozen(weights=str(weights))))
    changes = {"callbacks": (*drivers(GRID_CURRICULUM), *OBSERVERS), **changes}
    return toy(name="tiny_teacher", method=method, **changes)


def digits(*, dropout: float = 0.3, cond_dim: int = 10, **changes) -> Experiment:
    """CM on the digits with classes, flips and dropout in a small DDPM++."""
    network = lazy(
        EDMDenoiser,
        model=lazy(
            SongUNet,
            resolution=8,
            in_channels=1,
            out_channels=1,
            cond_dim=cond_dim,
            augment_dim=3,
            channels=8,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(4,),
            dropout=dropout,
        ),
    )
    changes = {"network": network, "data": lazy(Digits, flip=True), "batch_size": 8, **changes}
    return toy(
        name="tiny_digits",
        optimizer=lazy(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
        evaluation=Evaluation(metrics=(), samples=16, steps=(1, 2), quantisation="none"),
        **changes,
    )


def without_observers(experiment: Experiment) -> Experiment:
    return dataclasses.replace(experiment, callbacks=experiment.callbacks[: -len(OBSERVERS)])


def train(
    experiment: Experiment, run_dir: Path, stop_at: int | None = None, world: World | None = None
) -> TrainState:
    """Train, as far as `stop_at` when it is given, as if a signal had come in that step."""
    trainer = Trainer(experiment, run_dir, world)
    if stop_at is not None:
        step = trainer._step

        def until(batch) -> None:
            step(batch)
            if trainer.state.step == stop_at:
                trainer.state.stop = "the test"

        trainer._step = until
    return trainer.fit()


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """All tensors that make up a run: weights, targets, EMAs, optimizer state."""
    found = {f"student.{n}": v for n, v in state.networks.student.state_dict().items()}
    for name, network in state.networks.companions.items():
        found |= {f"{name}.{n}": v for n, v in network.state_dict().items()}
    for name, ema in state.emas.items():
        found |= {f"{name}.{n}": v for n, v in ema.state_dict().items()}
    names = {p: n for n, p in state.networks.student.named_parameters()}
    for parameter, entries in state.optimizer.state.items():
        found |= {f"optimizer.{names[parameter]}.{n}": v for n, v in entries.items()}
    return {name: value.detach().clone() for name, value in found.items()}


def assert_same(a: TrainState, b: TrainState) -> None:
    """The two runs hold the same bits."""
    ours, theirs = everything(a), everything(b)
    assert a.step == b.step
    assert a.curriculum == b.curriculum
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []
