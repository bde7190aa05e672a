"""Generates samples once for each number of steps and block of seeds, and measures everything."""

from __future__ import annotations

import statistics as stats
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fastflow.data.dataset import Dataset
from fastflow.distributed import World
from fastflow.download import cache_folder
from fastflow.errors import DivergenceError
from fastflow.evaluation.interface import Gauge, Reading, Sampler, Samples, Setting, Source
from fastflow.evaluation.results import Result, commit
from fastflow.evaluation.spec import Evaluation
from fastflow.rng import fold_in

Report: TypeAlias = Callable[[str, int, int], None]
"""Called with what is going on, how many samples of it are done, and how many there are."""


def evaluate(
    model: Sampler,
    evaluation: Evaluation,
    dataset: Dataset,
    world: World,
    *,
    cache: Path | None = None,
    progress: Report | None = None,
) -> list[Result]:
    """Measure a model; every process must call it and gets the same rows.

    Samples are divided among the processes in whole batches, so a sample is computed in the same
    batch, bit for bit, for any number of processes, and only the order of float64 sums differs
    (a FID changes by less than 1e-6 of its value).

    Args:
        model: weights and method.
        evaluation: metrics, steps, seeds.
        dataset: the real data.
        world: the processes.
        cache: folder for statistics of real data; None takes `statistics` in the data cache.
        progress: told after each batch, on every process.

    Returns:
        A row for each metric and number of steps, in this order of steps.

    Raises:
        ConfigError: a metric or times that do not fit the model.
        DataError: missing weights of an extractor, or missing reference statistics.
        DivergenceError: a sample is not finite.
    """
    setting = Setting(model, evaluation, dataset, world, cache or cache_folder() / "statistics")
    gauges = [metric.prepare(setting) for metric in evaluation.metrics]
    rows: list[Result] = []
    for steps in evaluation.steps:
        began = time.perf_counter()
        blocks = [_measure(setting, gauges, steps, b, progress) for b in range(evaluation.blocks)]
        seconds = time.perf_counter() - began
        for gauge, readings in zip(gauges, zip(*blocks, strict=True), strict=True):
            for values in zip(*readings, strict=True):
                rows.append(_row(setting, gauge.source, steps, values, seconds))
    return rows


def _measure(
    setting: Setting, gauges: list[Gauge], steps: int, block: int, progress: Report | None
) -> list[list[Reading]]:
    """The readings of each gauge for one block."""
    meters = [gauge.start() for gauge in gauges]
    evaluation = setting.evaluation
    done = 0
    for samples in _generated(setting, steps, block):
        for meter in meters:
            meter.update(samples)
        done = min(evaluation.samples, done + evaluation.batch_size * setting.world.size)
        if progress is not None:
            of = f" (block {block + 1} of {evaluation.blocks})" if evaluation.blocks > 1 else ""
            unit = "step" if steps == 1 else "steps"
            progress(f"{steps} {unit}{of}", done, evaluation.samples)
    return [meter.readings() for meter in meters]


def _generated(setting: Setting, steps: int, block: int) -> Iterator[Samples]:
    """This process's batches of a block: every size-th one."""
    model, evaluation, world = setting.model, setting.evaluation, setting.world
    between = evaluation.times.get(steps)
    times = model.times(steps, between)
    everything = range(evaluation.samples)
    batches = [
        everything[start : start + evaluation.batch_size]
        for start in range(0, evaluation.samples, evaluation.batch_size)
    ]
    for turn in range(0, len(batches), world.size):
        # A sharded network computes together: who has no batch left repeats the last one.
        mine = turn + world.rank
        indices = batches[min(mine, len(batches) - 1)]
        first = evaluation.seed + block * evaluation.samples
        seeds = range(first + indices.start, first + indices.stop)
        labels = class_labels(seeds, model.cond_dim)
        cond = None if labels is None else one_hot(labels, model.cond_dim).float()
        x = model.sample(seeds, steps, between, None if cond is None else cond.to(model.device))
        _check_finite(x, seeds, steps, model)
        if mine < len(batches):
            yield Samples(x, indices, seeds, labels, times)


def class_labels(seeds: range, classes: int) -> Tensor | None:
    """Uniform class labels [n] for a conditional model; each depends on its seed alone."""
    if classes == 0:
        return None
    return torch.tensor([fold_in(seed, "label") % classes for seed in seeds])


def _check_finite(x: Tensor, seeds: range, steps: int, model: Sampler) -> None:
    finite = x.isfinite().flatten(1).all(1)
    if not finite.all():
        seed = seeds[int((~finite).nonzero()[0])]
        raise DivergenceError(
            f"evaluation: the {steps}-step sample of seed {seed} has a NaN or infinite value; the "
            f"weights {model.weights_name!r} of step {model.step} are unusable"
        )


def _row(
    setting: Setting, source: Source, steps: int, blocks: tuple[Reading, ...], seconds: float
) -> Result:
    model, evaluation = setting.model, setting.evaluation
    values = tuple(reading.value for reading in blocks)
    first = blocks[0]
    return Result(
        experiment=model.experiment.name,
        method=type(model.method).__name__,
        dataset=setting.dataset.name,
        metric=first.metric,
        value=stats.fmean(values),
        std=stats.stdev(values) if len(values) > 1 else 0.0,
        min=min(values),
        values=values,
        baseline=first.baseline,
        baseline_name=first.baseline_name,
        steps=steps,
        times=model.times(steps, evaluation.times.get(steps)),
        nfe=model.nfe(steps),
        samples=first.samples,
        first_seed=evaluation.seed,
        blocks=evaluation.blocks,
        generated=evaluation.samples,
        extractor=source.extractor,
        extractor_hash=source.extractor_hash,
        reference=source.reference,
        reference_hash=source.reference_hash,
        quantisation=source.quantisation,
        weights=model.weights_name,
        step=model.step,
        images=model.images,
        batch_size=model.experiment.batch_size,
        train_seconds=model.seconds,
        trained_on=model.hardware,
        commit=commit(),
        hardware=setting.world.hardware,
        torch=torch.__version__,
        seconds=seconds,
    )
