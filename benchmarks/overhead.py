"""What the trainer and its standard callbacks add to a bare loss-backward-update loop.

The bare loop takes its turn inside an observer, so that both see the same machine. Scalars read
from tensors (each waits for the device) are counted in further steps; shown is the most that a
step of the trainer reads beyond a bare one, in which torch's optimizer on a CPU reads its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import Subject, chosen, machine, network_parser, parsed, print_table
from fastflow.build import build_network
from fastflow.callback import Observer
from fastflow.config import Lazy, build, lazy
from fastflow.data.dataset import Table
from fastflow.data.loader import Loader
from fastflow.distributed import world
from fastflow.method import Networks
from fastflow.progress import Progress
from fastflow.state import TrainState
from fastflow.trainer import Trainer

WARM_UP = 3
COUNTED = 10
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)


class Noise(Table):
    """Random images and labels, so that nothing has to be downloaded."""

    def __init__(self, shape: tuple[int, ...], classes: int, size: int = 1024) -> None:
        pixels = torch.randint(0, 256, (size, *shape), dtype=torch.uint8)
        labels = torch.arange(size) % classes if classes else None
        super().__init__("noise", pixels, labels, num_classes=classes, flip=False)


class Reads(TorchDispatchMode):
    """Counts scalars read from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READS
        return func(*args, **(kwargs or {}))


class Stopwatch(Observer):
    """Times the trainer's steps, and a bare step after each; must be the last callback."""

    def __init__(self, timed: int, clock: Literal["wall", "cpu"]) -> None:
        self._timed = timed
        self._clock = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
        self.trainer: list[float] = []
        self.bare: list[float] = []
        self.trainer_reads: list[int] = []
        self.bare_reads: list[int] = []
        self._mode: Reads | None = None
        self._began = 0.0

    def on_start(self, state: TrainState) -> None:
        experiment = state.experiment
        network = build_network(experiment, "network", experiment.network)
        network.to(state.world.device).train()
        self._networks = Networks(network)
        self._optimizer = build(experiment.optimizer, params=list(network.parameters()))
        dataset = build(experiment.data)
        loader = Loader(
            dataset, experiment.batch_size, experiment.seed, state.world, network.cond_dim
        )
        self._batches = loader.batches()
        self._began = self._now(state)

    def after_step(self, state: TrainState) -> None:
        spent = self._now(state) - self._began
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self.trainer_reads.append(self._mode.count)
            self._mode = None
            with Reads() as reads:
                self._step(state.method, state.now)
            self.bare_reads.append(reads.count)
        else:
            began = self._now(state)
            self._step(state.method, state.now)
            if state.step > WARM_UP:
                self.trainer.append(spent)
                self.bare.append(self._now(state) - began)
        if WARM_UP + self._timed <= state.step < state.experiment.steps:
            self._mode = Reads()
            self._mode.__enter__()
        self._began = self._now(state)

    def _now(self, state: TrainState) -> float:
        if state.world.device.type == "cuda":
            torch.cuda.synchronize(state.world.device)
        return self._clock()

    def _step(self, method: Any, now: Progress) -> None:
        batch = next(self._batches)
        self._optimizer.zero_grad(set_to_none=True)
        method.loss(self._networks, batch, now).per_sample.mean().backward()
        self._optimizer.step()


def callbacks(subject: Subject, options: argparse.Namespace) -> tuple[Lazy, ...]:
    """Those of the experiment that act in every step; pictures and checkpoints are left out."""
    rare = ("SampleGrid", "CheckpointCallback", "Curves", "ModelSummary", "ProgressBar")
    kept = [node for node in subject.experiment.callbacks if node.target.__name__ not in rare]
    return (*kept, lazy(Stopwatch, timed=options.repeats, clock=options.clock))


def main(argv: Sequence[str] | None = None) -> None:
    options = parsed(network_parser(__doc__ or ""), argv)
    rows = [
        ("network", "batch", "trainer ms", "bare ms", "overhead ms", "ratio", "reads of its own")
    ]
    for subject in chosen(options):
        network = subject.network(torch.device("cpu"))
        experiment = dataclasses.replace(
            subject.experiment,
            data=lazy(Noise, shape=network.sample_shape, classes=network.cond_dim),
            batch_size=subject.batch,
            steps=WARM_UP + options.repeats + COUNTED,
            callbacks=callbacks(subject, options),
            precision=options.precision,
        )
        with tempfile.TemporaryDirectory() as folder, world(options.device) as here:
            run = Trainer(experiment, Path(folder) / "run", here)
            stop = run.fit().stop
        if stop is not None:
            raise SystemExit(f"stopped by {stop}")
        watch = run.callbacks[-1]
        assert isinstance(watch, Stopwatch)
        pairs = list(zip(watch.trainer, watch.bare, strict=True))
        rows.append(
            (
                subject.name,
                str(subject.batch),
                f"{1000 * statistics.median(watch.trainer):.1f}",
                f"{1000 * statistics.median(watch.bare):.1f}",
                f"{1000 * statistics.median(a - b for a, b in pairs):.1f}",
                f"{statistics.median(a / b for a, b in pairs):.2f}",
                str(max(a - b for a, b in zip(watch.trainer_reads, watch.bare_reads, strict=True))),
            )
        )
    print_table(f"trainer, {options.precision}, {machine(options)}", rows)


if __name__ == "__main__":
    main()
