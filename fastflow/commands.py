"""What each command of the command line does; each imports what it needs when it is called.

A command takes its parsed arguments and returns the exit status.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastflow.errors import ConfigError

if TYPE_CHECKING:
    from fastflow.distributed import World
    from fastflow.evaluation.sampling import Plan
    from fastflow.experiment import Experiment
    from fastflow.model import Model
    from fastflow.tables import Format
    from fastflow.trainer import Trainer

RUNS = Path("runs")
FORMATS: Mapping[str, Format | Literal["html"]] = {
    ".txt": "text",
    ".md": "markdown",
    ".csv": "csv",
    ".json": "json",
    ".html": "html",
}
"""What `compare` writes, by the suffix of the file."""
SAMPLES = "samples"


def train(arguments: argparse.Namespace) -> int:
    """Train an experiment, after the runs that it needs."""
    import gc

    from fastflow import summary
    from fastflow.build import Parts
    from fastflow.config import load_experiment, override, to_yaml
    from fastflow.distributed import TIMEOUT, world
    from fastflow.experiment import Experiment
    from fastflow.prerequisites import check_all, refusal, unfinished

    allow = tuple(arguments.allow)
    written = load_experiment(arguments.config, kind=Experiment, allow=allow)
    experiment = override(written, arguments.overrides, allow)
    with world(arguments.device, arguments.timeout or TIMEOUT) as here:
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
    """Write samples to a picture, an archive or plain numbers."""
    from fastflow.distributed import world
    from fastflow.evaluation.progress import ProgressLine
    from fastflow.evaluation.sampling import Kept, about_of, generated, restored
    from fastflow.model import Model
    from fastflow.pictures import class_columns
    from fastflow.sample_files import check_target, write_samples

    with world(arguments.device) as here:
        allow = tuple(arguments.allow)
        model = Model.load(arguments.model, arguments.weights, here.device, allow)
        plan = _plan(arguments, model)
        count, times = len(plan.seeds), model.times(plan.steps, plan.between)
        name = f"{model.weights_name}_step{model.step:08d}_{plan.steps}step.png"
        out = arguments.out or arguments.model / SAMPLES / name
        check_target(out, model.shape, count)
        about = about_of(model, plan)
        kept = Kept(out.with_name(f".{out.name}.partial"), about)
        report, turns = ProgressLine([1]), -(-len(plan.batches()) // here.size)
        for turn, _ in enumerate(generated(model, plan, here, kept), start=1):
            if here.is_main and turns > 1:
                report("samples", min(count, turn * plan.batch_size * here.size), count)
        here.on_all(lambda: None)  # every process has kept all of its batches

        def write() -> None:
            write_samples(
                out,
                restored(plan, model.cond_dim, kept),
                shape=model.shape,
                count=count,
                rule=arguments.quantisation,
                about=about,
                columns=class_columns(model.cond_dim),
            )
            kept.discard()

        here.on_main(write)
        if here.is_main:
            grid = ", ".join(f"{t:g}" for t in times)
            print(f"{count:,} samples, NFE {model.nfe(plan.steps)}, t = {grid}: {out}")
    return 0


def _plan(arguments: argparse.Namespace, model: Model) -> Plan:
    """The samples that a command line asks for."""
    from fastflow.evaluation.sampling import Plan

    evaluation, seeds = model.experiment.evaluation, arguments.seeds
    picture = arguments.out is None or arguments.out.suffix == ".png"
    labels = arguments.labels or ("balanced" if picture else evaluation.labels)
    if arguments.per_class is not None:
        if model.cond_dim == 0:
            raise ConfigError("--per-class: given for a model without classes; leave it out")
        seeds = range(seeds.start, seeds.start + arguments.per_class * model.cond_dim)
        labels = "balanced"
    return Plan(
        seeds=seeds,
        steps=arguments.steps,
        between=arguments.times,
        labels=labels if arguments.label is None else arguments.label,
        batch_size=arguments.batch or evaluation.batch_size,
    )


def bench_sampling(arguments: argparse.Namespace) -> int:
    """Print what samples of a network cost, by few steps and by diffusion samplers."""
    import torch

    from fastflow.config import load_experiment, override
    from fastflow.distributed import world
    from fastflow.experiment import Experiment
    from fastflow.run_dir import find
    from fastflow.sampling_speed import network_of, render, speeds
    from fastflow.timing import Stopwatch

    allow, model, overrides = tuple(arguments.allow), arguments.model, arguments.overrides
    if arguments.config is not None and model is not None and "=" in model.name:
        model, overrides = None, [str(model), *overrides]  # argparse took it for the model
    if (model is None) == (arguments.config is None):
        raise ConfigError("bench-sampling: give either a model or --config FILE")
    if model is not None:
        experiment = find(model, allow).experiment
    else:
        experiment = load_experiment(arguments.config, kind=Experiment, allow=allow)
    experiment = override(experiment, overrides, allow)
    with world(arguments.device) as here:
        if here.size > 1:
            raise ConfigError(f"bench-sampling: {here.size} processes given, 1 accepted")
        default = experiment.evaluation.batch_size if here.device.type == "cuda" else 8
        batch = arguments.batch or default
        precision, compile = arguments.precision, arguments.compile
        network = network_of(experiment, here.device, precision=precision, compile=compile)
        watch = Stopwatch(here.device, arguments.clock, arguments.repeats)
        with torch.no_grad():
            found = speeds(experiment.method, network, batch, watch, arguments.ancestral)
        kind = "compiled, " if compile else ""
        title = (
            f"{experiment.name}: batches of {batch}, {precision}, {kind}random weights; "
            f"{watch.machine()}"
        )
        print(render(title, found, arguments.format))
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Measure a trained model and record the results."""
    from fastflow.config import build, override
    from fastflow.distributed import world
    from fastflow.evaluation.compare import table
    from fastflow.evaluation.evaluate import evaluate
    from fastflow.evaluation.gallery import draw
    from fastflow.evaluation.progress import ProgressLine
    from fastflow.evaluation.results import record
    from fastflow.evaluation.sampling import Kept, has_room, plan_of
    from fastflow.model import Model
    from fastflow.run_dir import find

    if arguments.reference is not None:
        return _reference(arguments)
    if arguments.extractor is not None:
        raise ConfigError("--extractor: given without --reference, which it belongs to")
    for text in arguments.overrides:
        if not text.startswith("evaluation."):
            raise ConfigError(f"{text!r} given, accepted: evaluation.KEY=VALUE")
    with world(arguments.device) as here:
        allow, names = tuple(arguments.allow), [arguments.weights]
        if arguments.weights == "all":
            names = list(find(arguments.model, allow).names)
        results = []
        for name in names:
            model = Model.load(arguments.model, name, here.device, allow)
            experiment = override(model.experiment, arguments.overrides, allow)
            model = dataclasses.replace(model, experiment=experiment)
            dataset, plan = build(experiment.data, at="data"), experiment.evaluation
            stay, folder = arguments.keep_samples, arguments.model / SAMPLES
            room = here.on_main(functools.partial(has_room, folder, model, plan, stay))
            keep = functools.partial(Kept.below, folder, model) if room else None
            line = ProgressLine([steps for steps in plan.steps for _ in range(plan.blocks)])
            report = line.titled(f"{name}, ") if len(names) > 1 else line
            progress = report if here.is_main else None
            rows = evaluate(model, plan, dataset, here, progress=progress, keep=keep)
            results += rows
            if here.is_main:
                written = record(arguments.model, rows)
                draw(model, arguments.model, plan.steps)
            if here.is_main and keep is not None:
                for kept in (keep(plan_of(plan, steps)) for steps in plan.steps):
                    kept.seal() if stay else kept.discard()
        if here.is_main:
            print(table(results))
            print(f"recorded in {written}")
    return 0


def _reference(arguments: argparse.Namespace) -> int:
    """Write reference statistics of the dataset of a configuration or a run."""
    from fastflow.config import build, load_experiment, override
    from fastflow.distributed import world
    from fastflow.evaluation.features import features_of
    from fastflow.evaluation.progress import ProgressLine
    from fastflow.evaluation.reference import dataset_moments, describe
    from fastflow.evaluation.statistics import save_moments
    from fastflow.experiment import Experiment
    from fastflow.run_dir import EXPERIMENT

    source, target, allow = arguments.model, arguments.reference, tuple(arguments.allow)
    if arguments.weights or arguments.keep_samples:
        raise ConfigError("--reference: given with --weights or --keep-samples; it samples nothing")
    if target.exists():
        raise ConfigError(f"--reference: {target} is there already; name another file")
    config = source / EXPERIMENT if source.is_dir() else source
    written = load_experiment(config, kind=Experiment, allow=allow)
    experiment = override(written, arguments.overrides, allow)
    plan = experiment.evaluation
    features = features_of(plan.metrics, arguments.extractor)
    with world(arguments.device) as here:
        dataset = build(experiment.data, at="data")
        line, what = ProgressLine([1.0]), f"features of {dataset.name}"
        moments = dataset_moments(
            features.build(here.device),
            dataset,
            plan.quantisation,
            here,
            progress=lambda n: line(what, n, len(dataset)) if here.is_main else None,
        )
        here.on_main(lambda: save_moments(moments, target))
        if here.is_main:
            print(describe(target, moments))
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Print measured results beside the expected ones, or write them to a file."""
    from fastflow.checkpoint.files import write_text
    from fastflow.evaluation.choose import FILTERS, chosen, ordered
    from fastflow.evaluation.compare import comparison
    from fastflow.evaluation.overview import render_overviews
    from fastflow.evaluation.report import page
    from fastflow.evaluation.table import render

    folders, out = arguments.folders or [RUNS], arguments.out
    for folder in folders:
        if folder != RUNS and not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; accepted: a folder that holds runs")
    format = FORMATS[out.suffix if out is not None else ".txt"]
    format = arguments.format or format
    found = comparison(folders)
    wanted = {name: getattr(arguments, name) for name in FILTERS}
    lines = chosen(found.lines, wanted, measured=arguments.measured)
    if arguments.sort is not None:
        lines = ordered(lines, arguments.sort, reverse=arguments.reverse)
    if arguments.overview:
        text = render_overviews(lines, format)
    elif format == "html":
        text = page(lines, found.runs)
    else:
        text = render(lines, format, grouped=arguments.sort is None)
    if out is None:
        print(text)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text if text.endswith("\n") else f"{text}\n")
        print(f"written to {out}")
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Write the weights in a training checkpoint as a model."""
    from fastflow.export import export_checkpoint

    stored = export_checkpoint(arguments.source, arguments.output, tuple(arguments.allow))
    print(f"step {stored.step:,}: {', '.join(stored.names)} written to {stored.folder}")
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
    """Examine the installation and a configuration, or say what memory it needs."""
    from fastflow.doctor import examine

    allow = tuple(arguments.allow)
    if arguments.gpus is not None:
        return _memory(arguments, allow)
    if arguments.gpu_memory is not None:
        raise ConfigError("--gpu-memory: given without --gpus; say how many, e.g. --gpus 8")
    report = examine(arguments.config, arguments.overrides, arguments.device, allow)
    print(report.text)
    return 0 if report.healthy else 2


def _memory(arguments: argparse.Namespace, allow: tuple[str, ...]) -> int:
    from fastflow.config import load_experiment, override
    from fastflow.experiment import Experiment
    from fastflow.memory import Machine, estimate

    if arguments.config is None:
        raise ConfigError("--gpus: given without --config; name the configuration to be estimated")
    written = load_experiment(arguments.config, kind=Experiment, allow=allow)
    experiment = override(written, arguments.overrides, allow)
    gib = 80.0 if arguments.gpu_memory is None else arguments.gpu_memory
    found = estimate(experiment, Machine(gpus=arguments.gpus, gib=gib))
    print(found.text)
    return 0 if found.fits else 2
