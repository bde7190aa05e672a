"""Generates samples once for each number of steps and block of seeds, and measures everything."""

from __future__ import annotations

import dataclasses
import statistics as stats
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from fastflow.data.dataset import Dataset
from fastflow.distributed import World
from fastflow.download import cache_folder
from fastflow.evaluation.features import prepared
from fastflow.evaluation.interface import Gauge, Reading, Sampler, Setting
from fastflow.evaluation.results import Result, commit
from fastflow.evaluation.sampling import Keep, generated, plan_of, require_balance
from fastflow.evaluation.spec import Evaluation

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
    keep: Keep | None = None,
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
        keep: tells where samples are kept, so that a second call goes on where a first one
            stopped; None keeps none.

    Returns:
        A row for each metric and number of steps, in this order of steps.

    Raises:
        ConfigError: a metric or times that do not fit the model, or too few samples for a metric.
        DataError: missing weights of an extractor, reference statistics that are missing or of
            something else, or real images with a NaN.
        DivergenceError: a sample is not finite.
    """
    return Evaluator.of(model, evaluation, dataset, world, cache).measure(progress, keep)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Metrics ready to measure a model, once or time and again while it is trained."""

    setting: Setting
    gauges: Sequence[Gauge]

    @classmethod
    def of(
        cls,
        model: Sampler,
        evaluation: Evaluation,
        dataset: Dataset,
        world: World,
        cache: Path | None = None,
    ) -> Evaluator:
        """Load what the metrics need; arguments and errors are those of `evaluate`."""
        if evaluation.labels == "balanced":
            require_balance(evaluation.samples, model.cond_dim, "evaluation.samples")
        folder = cache or cache_folder() / "statistics"
        setting = Setting(model, evaluation, dataset, world, folder)
        return cls(setting, prepared(evaluation.metrics, setting))

    def measure(self, progress: Report | None = None, keep: Keep | None = None) -> list[Result]:
        """The rows of the model as it is now; arguments and errors are those of `evaluate`."""
        evaluation = self.setting.evaluation
        rows: list[Result] = []
        for steps in evaluation.steps:
            began = time.perf_counter()
            blocks = [
                self._block(steps, block, progress, keep) for block in range(evaluation.blocks)
            ]
            seconds = time.perf_counter() - began
            rows += [
                _row(self.setting, steps, readings, seconds)
                for readings in zip(*blocks, strict=True)
            ]
        return rows

    def _block(
        self, steps: int, block: int, progress: Report | None, keep: Keep | None
    ) -> list[Reading]:
        """The readings of all gauges for one block of seeds."""
        model, evaluation, world = (
            self.setting.model,
            self.setting.evaluation,
            self.setting.world,
        )
        meters = [gauge.start() for gauge in self.gauges]
        plan = plan_of(evaluation, steps, block)
        kept = None if keep is None else keep(plan)
        done = 0
        for samples in generated(model, plan, world, kept):
            if samples is not None:
                for meter in meters:
                    meter.update(samples)
            done = min(evaluation.samples, done + evaluation.batch_size * world.size)
            if progress is not None:
                of = f" (block {block + 1} of {evaluation.blocks})" if evaluation.blocks > 1 else ""
                unit = "step" if steps == 1 else "steps"
                progress(f"{steps} {unit}{of}", done, evaluation.samples)
        return [reading for meter in meters for reading in meter.readings()]


def _row(setting: Setting, steps: int, blocks: tuple[Reading, ...], seconds: float) -> Result:
    model, evaluation = setting.model, setting.evaluation
    values = tuple(reading.value for reading in blocks)
    spreads = [reading.spread for reading in blocks if reading.spread is not None]
    first = blocks[0]
    return Result(
        experiment=model.experiment.name,
        method=model.method.title,
        dataset=setting.dataset.name,
        metric=first.metric,
        value=stats.fmean(values),
        std=stats.stdev(values) if len(values) > 1 else 0.0,
        min=min(values),
        values=values,
        better=first.better,
        spread=stats.fmean(spreads) if spreads else None,
        baseline=first.baseline,
        baseline_name=first.baseline_name,
        steps=steps,
        times=model.times(steps, evaluation.times.get(steps)),
        nfe=model.nfe(steps),
        samples=first.samples,
        first_seed=evaluation.seed,
        blocks=evaluation.blocks,
        generated=evaluation.samples,
        labels=evaluation.labels if model.cond_dim else "none",
        extractor=first.source.extractor,
        extractor_hash=first.source.extractor_hash,
        reference=first.source.reference,
        reference_hash=first.source.reference_hash,
        quantisation=first.source.quantisation,
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
