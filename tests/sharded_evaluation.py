"""Tasks of several processes: training with metrics on the way."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch.distributed as dist

from callbacks.early_metrics import EarlyMetrics
from callbacks.jsonl_log import JsonlLog
from fastflow.config import lazy
from fastflow.distributed import World
from fastflow.experiment import Experiment, Parallel
from tiny import drivers, toy, train


def experiment(watched: bool, shard: int) -> Experiment:
    """Two steps, measured after each; 70 samples in batches of 20 are no multiple of two turns."""
    early = lazy(EarlyMetrics, every=1, samples=70, steps=(1, 2), keep_best=True)
    observers = (early, lazy(JsonlLog, every=1)) if watched else ()
    found = toy(callbacks=(*drivers(), *observers), steps=2, parallel=Parallel(shard=shard))
    evaluation = dataclasses.replace(found.evaluation, batch_size=20)
    return dataclasses.replace(found, evaluation=evaluation)


@functools.cache
def _side() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo")


def trained(world: World, run_dir: Path, watched: bool, shard: int) -> None:
    """Train in several processes."""
    train(experiment(watched, shard), run_dir, world=dataclasses.replace(world, side=_side()))
