"""What a run tells a person when it starts and when it ends."""

from __future__ import annotations

import shlex
import textwrap
from typing import TYPE_CHECKING

import torch

import fastflow
from fastflow.config import Lazy, own_packages_of
from fastflow.evaluation.results import label
from fastflow.experiment import Experiment
from fastflow.method import Networks
from fastflow.run_dir import WEIGHTS

if TYPE_CHECKING:
    from fastflow.trainer import Trainer

WIDTH = 100


def start(trainer: Trainer) -> str:
    """A table of what is about to be trained, on what, and where files go."""
    experiment, state = trainer.experiment, trainer.state
    world = trainer.world
    share = experiment.batch_size // world.size
    micro = min(experiment.parallel.micro_batch or share, share)
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    divided = f"{processes} x {share}" + (f" in micro-batches of {micro}" if micro < share else "")
    where = str(world.device)
    if world.device.type == "cuda":
        where += f" ({torch.cuda.get_device_name(world.device)})"
    rows = {
        "method": _method(experiment),
        "network": _networks(experiment, state.networks),
        "start from": experiment.init_from or "random weights",
        "data": trainer.loader.dataset.summary(),
        "batch": f"{experiment.batch_size} samples = {divided}",
        "steps": f"{experiment.steps:,} ({experiment.steps * experiment.batch_size:,} samples)",
        "precision": f"{experiment.precision} on {where}",
        "expected": expectations(experiment),
        "run": f"{state.run_dir}, {_position(trainer)}",
    }
    for key, value in experiment.departures.items():
        rows[f"! {key}"] = f"the published recipe has: {value}"
    width = max(map(len, rows))
    lines = [f"fastflow {fastflow.__version__}: {experiment.name}"]
    for key, value in rows.items():
        first = f"  {key:<{width}}  "
        lines += textwrap.wrap(
            value,
            WIDTH,
            initial_indent=first,
            subsequent_indent=" " * len(first),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def end(trainer: Trainer) -> str:
    """Where things lie now, and what to do next."""
    state = trainer.state
    if state.step < trainer.experiment.steps:
        return stopped(trainer)
    run_dir = state.run_dir
    own = "".join(f" --allow {package}" for package in own_packages_of(trainer.experiment))
    return (
        f"trained {state.step:,} steps; weights are in {run_dir / WEIGHTS}. Next:\n"
        f"  fastflow evaluate {shlex.quote(str(run_dir))}{own}\n"
        f"  fastflow sample {shlex.quote(str(run_dir))}{own}\n"
        f"  fastflow compare {shlex.quote(str(run_dir.parent))}"
    )


def stopped(trainer: Trainer) -> str:
    """What a run that was asked to stop says last."""
    state = trainer.state
    done = f"stopped by {state.stop} after step {state.step:,} of {trainer.experiment.steps:,}"
    return f"{done}, which is saved; the same command goes on from there"


def expectations(experiment: Experiment) -> str:
    """The published figures of an experiment in one line."""
    rows = [
        f"{label(e.metric, e.samples)} {e.value:g} in {e.steps} step{'s' if e.steps > 1 else ''} "
        f"({e.source})"
        for e in experiment.expected
    ]
    return "; ".join(rows) if rows else "nothing published"


def _method(experiment: Experiment) -> str:
    method = experiment.method
    needs = ", ".join(sorted(method.needs))
    return method.title + (f", curriculum: {needs}" if needs else "")


def _networks(experiment: Experiment, networks: Networks) -> str:
    count = sum(p.numel() for p in networks.student.parameters())
    parts = experiment.network.kwargs.values()
    inner = [part.target.__name__ for part in parts if isinstance(part, Lazy)]
    name = experiment.network.target.__name__ + (f"({', '.join(inner)})" if inner else "")
    extra = f"; companions: {', '.join(networks.companions)}" if networks.companions else ""
    size = f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"
    return f"{name}, {size} parameters{extra}"


def _position(trainer: Trainer) -> str:
    state = trainer.state
    if trainer.resumed_from is None:
        return "new"
    if state.step >= trainer.experiment.steps:
        return f"already finished at step {state.step:,}"
    return f"resumed at step {state.step:,}"
