"""Measured results beside the published ones: every expected row, measured or not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastflow.config import Lazy, load_experiment, to_plain
from fastflow.evaluation import conditions
from fastflow.evaluation.results import Result
from fastflow.evaluation.runs import Run, find_runs, network_name
from fastflow.evaluation.spec import Expected
from fastflow.evaluation.table import Line, render
from fastflow.experiment import Experiment

CONFIGS = Path(__file__).parents[2] / "configs" / "experiments"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is expected and what was found.

    Attributes:
        lines: by experiment; of each its runs, or what is expected where there are none.
        runs: those that the lines are of.
    """

    lines: tuple[Line, ...]
    runs: tuple[Run, ...]


def comparison(folders: Sequence[Path], configs: Path = CONFIGS) -> Comparison:
    """Join the expected rows of all configurations with all results found.

    Args:
        folders: searched for `results.json` files: run directories, folders of exported weights,
            folders that hold such; each may be missing or empty.
        configs: folder of `config_*.py` files whose expected results are listed.

    Raises:
        DataError: a results file cannot be read.
        ConfigError: a configuration, or the description beside results, cannot be read.
    """
    runs = find_runs(folders)
    shipped = _experiments(configs)
    known = {experiment.name for experiment in shipped}
    lines: list[Line] = []
    for experiment in shipped:
        own = [run for run in runs if run.experiment == experiment.name]
        lines += [line for run in own for line in lines_of(run, experiment)]
        if not own:
            lines += [_unmeasured(expected, experiment) for expected in experiment.expected]
    lines += [line for run in runs if run.experiment not in known for line in lines_of(run, None)]
    return Comparison(tuple(lines), tuple(runs))


def table(results: Iterable[Result]) -> str:
    """Result rows as a text table, compared with their baselines."""
    lines = [line for row in results for line in _against_all(_measured(row), row, ())]
    return render(lines, "text")


def experiment_files(configs: Path = CONFIGS) -> list[Path]:
    """The configuration files that come with fastflow."""
    return sorted(configs.rglob("config_*.py"))


def _experiments(configs: Path) -> list[Experiment]:
    return [load_experiment(path, kind=Experiment) for path in experiment_files(configs)]


def lines_of(run: Run, shipped: Experiment | None) -> list[Line]:
    """The lines of a run: its results, and what is expected and was not measured.

    Args:
        run: the run.
        shipped: the configuration of its experiment; None where there is none.
    """
    if shipped is None:
        found = [(row, _measured(row, run)) for row in run.rows]
        return [each for row, line in found for each in _against_all(line, row, ())]
    trained = conditions.of_training(run, shipped)
    lines = []
    for row in run.rows:
        words = (*trained, *conditions.of_measurement(row, run, shipped))
        line = dataclasses.replace(_measured(row, run), warnings=words)
        lines += _against_all(line, row, shipped.expected)
    measured = {(row.metric, row.steps) for row in run.rows}
    lines += [
        dataclasses.replace(
            _unmeasured(expected, shipped),
            dataset=run.rows[0].dataset,
            network=run.network,
            run=run.name,
            weights=run.weights,
            images=run.rows[0].images,
            train_seconds=run.rows[0].train_seconds,
            trained_on=run.rows[0].trained_on,
        )
        for expected in shipped.expected
        if (expected.metric, expected.steps) not in measured
    ]
    return lines


def _measured(row: Result, run: Run | None = None) -> Line:
    """A result, compared with nothing yet."""
    return Line(
        experiment=row.experiment,
        method=row.method,
        dataset=row.dataset,
        network=run.network if run else "",
        run=run.name if run else "",
        weights=row.weights,
        step=row.step,
        images=row.images,
        batch_size=row.batch_size,
        metric=row.metric,
        steps=row.steps,
        nfe=row.nfe,
        samples=row.samples,
        better=row.better,
        measured=row.value,
        std=row.std,
        minimum=row.min,
        blocks=row.blocks,
        train_seconds=row.train_seconds,
        trained_on=row.trained_on,
        commit=row.commit,
        torch=row.torch,
        hardware=row.hardware,
        extractor=row.extractor,
        extractor_hash=row.extractor_hash,
        reference=row.reference,
        reference_hash=row.reference_hash,
        quantisation=row.quantisation,
    )


def _against_all(line: Line, row: Result, expected: Sequence[Expected]) -> list[Line]:
    """A line for each thing that a result is compared with, or one line."""
    lines = [
        _against(
            dataclasses.replace(line, warnings=(*line.warnings, *conditions.of_figure(row, e))),
            e.value,
            e.source,
            note=e.note,
            published=True,
            comparable=not conditions.obstacle(row, e),
        )
        for e in expected
        if (e.metric, e.steps) == (row.metric, row.steps)
    ]
    if row.baseline is not None:
        lines.append(_against(line, row.baseline, row.baseline_name.replace("_", " ")))
    return lines or [line]


def _against(
    line: Line,
    value: float,
    source: str,
    *,
    note: str = "",
    published: bool = False,
    comparable: bool = True,
) -> Line:
    assert line.measured is not None
    return dataclasses.replace(
        line,
        expected=value,
        source=source,
        note=note,
        published=published,
        difference=line.measured - value if comparable else None,
        ratio=line.measured / value if comparable and value > 0 else None,
    )


def _unmeasured(expected: Expected, shipped: Experiment) -> Line:
    return Line(
        experiment=shipped.name,
        method=shipped.method.title,
        dataset=_dataset(shipped.data),
        network=network_name(to_plain(shipped.network)),
        metric=expected.metric,
        steps=expected.steps,
        samples=expected.samples,
        expected=expected.value,
        source=expected.source,
        note=expected.note,
        published=True,
    )


def _dataset(data: Lazy) -> str:
    """The name that a dataset will have, as far as that can be told without reading it."""
    path = data.kwargs.get("path")
    if path is not None:
        return Path(path).stem
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", data.target.__name__).lower()
