"""A FID of few samples while training, and the weights with the best one."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastflow.callback import Observer
from fastflow.config import build
from fastflow.errors import ConfigError, DivergenceError, one_of, warn
from fastflow.evaluation.evaluate import Evaluator
from fastflow.evaluation.results import Result, improves
from fastflow.evaluation.spec import Metric
from fastflow.export import export
from fastflow.logging import JsonLines
from fastflow.model import Model
from fastflow.run_dir import STUDENT
from fastflow.state import TrainState

BEST = "weights_best"
RESULTS = "early_results.jsonl"


class EarlyMetrics(Observer):
    """Measures an EMA every so many steps, and after the last one, on a small budget.

    A FID of few samples is larger than that of 50,000, so it goes by its own name, "FID-1k/1step"
    for 1,000 samples in one step: in the records of loggers placed after this, hence in curves.
    The rows with all that produced them go to `early_results.jsonl`, never to `results.json`. The
    network samples as it trains: in its precision, and sharded.

    Args:
        every: steps between measurements.
        samples: generated samples of each, always of the same seeds.
        steps: numbers of sampler steps; times are those of the experiment's evaluation.
        metrics: what is measured; None takes what the experiment's evaluation measures.
        weights: the EMA that is measured; None takes the first, or the student without EMAs.
        keep_best: keep the weights with the best value, of the first metric in the first number of
            steps, in `weights_best/`, which can be sampled and evaluated like a run.

    Raises:
        ConfigError: `every` or `samples` or `steps` too small; (when a run is set up) no EMA of
            that name, nothing to measure, or what cannot be measured.
        DataError: (when a run is set up) weights of an extractor or reference statistics are
            missing.
    """

    def __init__(
        self,
        every: int,
        samples: int = 1000,
        steps: tuple[int, ...] = (1,),
        metrics: tuple[Metric, ...] | None = None,
        weights: str | None = None,
        keep_best: bool = False,
    ) -> None:
        for name, value, least in (("every", every, 1), ("samples", samples, 2)):
            if value < least:
                raise ConfigError(f"EarlyMetrics.{name}: {value} given, {least} or more accepted")
        if not steps or min(steps) < 1:
            raise ConfigError(f"EarlyMetrics.steps: {steps} given, numbers of 1 or more accepted")
        self._every = every
        self._samples = samples
        self._steps = steps
        self._metrics = metrics
        self._weights = weights
        self._keep_best = keep_best
        self._best: float | None = None
        self._evaluator: Evaluator | None = None

    def setup(self, state: TrainState) -> None:
        if self._weights not in (None, *state.emas):
            raise ConfigError(
                f"EarlyMetrics.weights: {self._weights!r} given, "
                f"{one_of(self._weights, state.emas)}"
            )
        self._weights = self._weights or next(iter(state.emas), STUDENT)
        usual = state.experiment.evaluation
        evaluation = dataclasses.replace(
            usual,
            metrics=usual.metrics if self._metrics is None else self._metrics,
            samples=self._samples,
            steps=self._steps,
            blocks=1,
        )
        if not evaluation.metrics:
            raise ConfigError(
                "EarlyMetrics.metrics: none given, and the experiment's evaluation has none; name "
                "what is to be measured, e.g. (FID(),)"
            )
        model = Model(
            experiment=state.experiment,
            network=state.method.for_sampling(state.networks),
            weights_name=self._weights,
            step=0,
            images=0,
            seconds=0.0,
            hardware=state.world.hardware,
            device=state.world.device,
        )
        dataset = build(state.experiment.data, at="data")
        self._evaluator = Evaluator.of(model, evaluation, dataset, state.world)

    def on_start(self, state: TrainState) -> None:
        if state.world.is_main:
            _file(state).rewind(state.step)

    def after_step(self, state: TrainState) -> None:
        if state.step % self._every and state.step != state.experiment.steps:
            return
        try:
            rows = self._measured(state)
        except DivergenceError as error:  # on every process; training itself goes on
            if state.world.is_main:
                warn(f"EarlyMetrics at step {state.step:,}: {error}")
            return
        for row in rows:
            name = row.label.replace(" ", "_")
            state.metrics[f"{name}/{row.steps}step"] = row.value
            if state.world.is_main:
                _file(state).write(dataclasses.asdict(row))
        first = rows[0]
        if self._best is None or improves(first.value, self._best, first.better):
            self._best = first.value
            if self._keep_best:
                self._export(state)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best = state["best"]

    def _measured(self, state: TrainState) -> Sequence[Result]:
        """Every process measures, for a sharded network needs all of them."""
        assert self._evaluator is not None
        ema = state.emas.get(self._weights or "")
        student = state.networks.student
        with ema.swapped_into(student) if ema is not None else contextlib.nullcontext():
            rows = self._evaluator.measure()
        return [
            dataclasses.replace(
                row, step=state.step, images=state.images, train_seconds=state.seconds
            )
            for row in rows
        ]

    def _export(self, state: TrainState) -> None:
        """Replace the best weights: at no moment are some of them of another step."""
        folder = state.run_dir / BEST
        partial, old = (folder.with_name(f".{BEST}.{kind}") for kind in ("partial", "old"))
        state.world.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
        export(state, partial, self._weights)
        state.world.on_main(lambda: _swap(partial, folder, old))


def _swap(partial: Path, folder: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _file(state: TrainState) -> JsonLines:
    return JsonLines(state.run_dir / RESULTS)
