"""What each command of the command line does; each imports what it needs when it is called.

A command takes its parsed arguments and returns the exit status.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastflow.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from fastflow.distributed import World
    from fastflow.experiment import Experiment
    from fastflow.trainer import Trainer

RUNS = Path("runs")


def train(arguments: argparse.Namespace) -> int:
    """Train an experiment, after the runs that it needs."""
    import gc

    from fastflow import summary
    from fastflow.build import Parts
    from fastflow.config import load_experiment, override, to_yaml
    from fastflow.distributed import world
    from fastflow.experiment import Experiment
    from fastflow.prerequisites import check_all, refusal, unfinished

    allow = tuple(arguments.allow)
    written = load_experiment(arguments.config, kind=Experiment, allow=allow)
    experiment = override(written, arguments.overrides, allow)
    with world(arguments.device) as here:
        run_dir = arguments.run_dir or RUNS / experiment.name
        first = unfinished(experiment, run_dir, here, allow)
        if first and arguments.no_prerequisites:
            raise ConfigError(refusal(first, arguments.device, allow))
        if first:
            check_all(first, experiment, here)
        if arguments.dry_run:
            if not first:
                Parts.of(experiment, here)
            print("".join(f"# first {stage}\n" for stage in first) + to_yaml(experiment), end="")
            return 0
        for stage in first:
            if here.is_main:
                print(f"first {stage}", flush=True)
            trainer = _fitted(stage.experiment, stage.run_dir, here)
            if trainer.state.stop is not None:
                if here.is_main:
                    print(summary.stopped(trainer))
                return _signalled(trainer.state.stop)
            del trainer
            gc.collect()  # it is part of a cycle, and would keep its networks on the device
        trainer = _fitted(experiment, run_dir, here)
        if here.is_main:
            print(summary.end(trainer))
    return _signalled(trainer.state.stop) if trainer.state.step < experiment.steps else 0


def _fitted(experiment: Experiment, run_dir: Path, here: World) -> Trainer:
    from fastflow import summary
    from fastflow.trainer import Trainer

    trainer = Trainer(experiment, run_dir, here)
    if here.is_main:
        print(summary.start(trainer), flush=True)
    trainer.fit()
    return trainer


def _signalled(stop: str | None) -> int:
    return 128 + signal.Signals[stop] if stop in ("SIGINT", "SIGTERM") else 0


def sample(arguments: argparse.Namespace) -> int:
    """Write samples to a picture or an archive."""
    import numpy
    import torch

    from fastflow.distributed import world
    from fastflow.model import Model
    from fastflow.pictures import class_columns, save_samples

    seeds, steps = arguments.seeds, arguments.steps
    with world(arguments.device) as here:
        allow = tuple(arguments.allow)
        model = Model.load(arguments.model, arguments.weights, here.device, allow)
        times = model.times(steps, arguments.times)
        cond = _class_rows(seeds, model.cond_dim, arguments.label)
        size = model.experiment.evaluation.batch_size
        parts = []
        for rows in (slice(start, start + size) for start in range(0, len(seeds), size)):
            some = None if cond is None else cond[rows]
            parts.append(model.sample(seeds[rows], steps, times[1:], some).cpu())
    samples = torch.cat(parts)
    name = f"{model.weights_name}_step{model.step:08d}_{steps}step.png"
    out = arguments.out or arguments.model / "samples" / name
    if out.suffix == ".npz":
        out.parent.mkdir(parents=True, exist_ok=True)
        numpy.savez(out, samples=samples.numpy(), seeds=list(seeds), times=times)
    else:
        save_samples(samples, out, class_columns(model.cond_dim))
    grid = ", ".join(f"{t:g}" for t in times)
    print(f"{len(seeds)} samples, NFE {model.nfe(steps)}, t = {grid}: {out}")
    return 0


def _class_rows(seeds: range, classes: int, label: int | None) -> Tensor | None:
    """One-hot rows [n, classes] of one class, or of all in turn by seed; None without classes."""
    import torch

    if label is not None and not 0 <= label < classes:
        accepted = f"0 to {classes - 1}" if classes else "none (the model is unconditional)"
        raise ConfigError(f"--label: {label} given, accepted: {accepted}")
    if classes == 0:
        return None
    labels = [seed % classes if label is None else label for seed in seeds]
    return torch.eye(classes)[labels]


def evaluate(arguments: argparse.Namespace) -> int:
    """Measure a trained model and record the results."""
    from fastflow.config import build, override
    from fastflow.distributed import world
    from fastflow.evaluation.compare import table
    from fastflow.evaluation.evaluate import evaluate
    from fastflow.evaluation.results import record
    from fastflow.model import Model

    for text in arguments.overrides:
        if not text.startswith("evaluation."):
            raise ConfigError(f"{text!r} given, accepted: evaluation.KEY=VALUE")
    with world(arguments.device) as here:
        allow = tuple(arguments.allow)
        model = Model.load(arguments.model, arguments.weights, here.device, allow)
        experiment = override(model.experiment, arguments.overrides, allow)
        model = dataclasses.replace(model, experiment=experiment)
        dataset = build(experiment.data, at="data")
        report = _progress if here.is_main else None
        results = evaluate(model, experiment.evaluation, dataset, here, progress=report)
        if here.is_main:
            print(table(results))
            print(f"recorded in {record(arguments.model, results)}")
    return 0


def _progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty() or done == total:
        end = "\n" if done == total else ""
        print(f"\r{what}: {done:,} of {total:,} samples", end=end, file=sys.stderr, flush=True)


def compare(arguments: argparse.Namespace) -> int:
    """Print measured results beside the expected ones."""
    from fastflow.evaluation.compare import compare

    folder = arguments.folder
    if folder != RUNS and not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; accepted: a folder that holds runs")
    print(compare(folder, arguments.format))
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Turn published weights into a file of ours."""
    from fastflow.pretrained import Asked, convert, fetched, save

    source, target = arguments.source, arguments.to
    if target.exists() and not arguments.force:
        raise ConfigError(
            f"--to: {target} is there already; name another file, or replace it with --force"
        )
    origin = fetched(source)
    converted = convert(origin, Asked(arguments.kind, arguments.heads))
    count = save(converted, target, source, origin)
    print(
        f"{converted.kind}: {count:,} parameters, {len(converted.weights)} tensors, written to "
        f"{target}"
    )
    return 0


def networks(arguments: argparse.Namespace) -> int:
    """Print the networks of the literature."""
    from fastflow.presets import chosen, presets, table

    print(table(chosen(presets(), arguments.names), arguments.format))
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Examine the installation and a configuration."""
    from fastflow.doctor import examine

    allow = tuple(arguments.allow)
    report = examine(arguments.config, arguments.overrides, arguments.device, allow)
    print(report.text)
    return 0 if report.healthy else 2
