"""Measured results beside the published ones: every expected row, measured or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastflow.evaluation.results import FILE, Result, count, read
from fastflow.evaluation.spec import Expected
from fastflow.evaluation.table import Line, render
from fastflow.experiment import Experiment
from fastflow.tables import Format

CONFIGS = Path(__file__).parents[2] / "configs" / "experiments"


def compare(folder: Path, format: Format = "text", configs: Path = CONFIGS) -> str:
    """All expected results and all results found, as a table.

    Args:
        folder: searched for `results.json` files; may be missing or empty.
        format: "text" is at most 100 columns wide; the others are for machines and documents.
        configs: folder of `config_*.py` files whose expected results are listed.

    Raises:
        DataError: a results file cannot be read.
        ConfigError: a configuration cannot be read.
    """
    return render(comparison(folder, configs), format)


def table(results: Iterable[Result]) -> str:
    """Result rows as a text table, compared with their baselines."""
    return render([line for row in results for line in _measured(row, "", ())], "text")


def comparison(folder: Path, configs: Path = CONFIGS) -> list[Line]:
    """The lines of `compare`: by experiment, run and weights, of each run its latest step."""
    experiments = _experiments(configs)
    lines: list[Line] = []
    found = _latest(folder)
    known = {e.name: e.expected for e in experiments}
    for experiment in experiments:
        groups = {k: rows for k, rows in found.items() if k[0] == experiment.name}
        for (_, run, _), rows in groups.items():
            lines += lines_of(rows, run, experiment.expected)
        if not groups:
            lines += [
                _unmeasured(
                    expected,
                    experiment=experiment.name,
                    method=type(experiment.method).__name__,
                    dataset=experiment.data.target.__name__,
                )
                for expected in experiment.expected
            ]
    for (name, run, _), rows in found.items():
        if name not in known:
            lines += lines_of(rows, run, ())
    return lines


def experiment_files(configs: Path = CONFIGS) -> list[Path]:
    """The configuration files that come with fastflow."""
    return sorted(configs.rglob("config_*.py"))


def _experiments(configs: Path) -> list[Experiment]:
    from fastflow.config import load_experiment

    return [load_experiment(path, kind=Experiment) for path in experiment_files(configs)]


def _latest(folder: Path) -> dict[tuple[str, str, str], list[Result]]:
    """Rows by (experiment, run, weights), of the latest step of each."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for path in sorted(folder.rglob(FILE)):
        run = str(path.parent.relative_to(folder))
        for row in read(path):
            groups.setdefault((row.experiment, run, row.weights), []).append(row)
    return {
        key: [row for row in rows if row.step == max(r.step for r in rows)]
        for key, rows in groups.items()
    }


def lines_of(rows: Sequence[Result], run: str, expected: Sequence[Expected]) -> list[Line]:
    """The lines of one run: its rows, and what is expected and was not measured."""
    if not rows:
        return []
    lines = [line for row in rows for line in _measured(row, run, expected)]
    first = rows[0]
    measured = {(row.metric, row.steps) for row in rows}
    lines += [
        _unmeasured(
            e,
            experiment=first.experiment,
            method=first.method,
            dataset=first.dataset,
            run=run,
            weights=first.weights,
            images=first.images,
        )
        for e in expected
        if (e.metric, e.steps) not in measured
    ]
    return lines


def _measured(row: Result, run: str, expected: Sequence[Expected]) -> list[Line]:
    """A line for each thing a row is compared with, or one line."""
    line = Line(
        experiment=row.experiment,
        method=row.method,
        dataset=row.dataset,
        run=run,
        weights=row.weights,
        images=row.images,
        metric=row.metric,
        steps=row.steps,
        nfe=row.nfe,
        samples=row.samples,
        measured=row.value,
        minimum=row.min,
        blocks=row.blocks,
    )
    lines = [
        _against(line, e.value, e.source, _obstacle(row, e), e.note)
        for e in expected
        if (e.metric, e.steps) == (row.metric, row.steps)
    ]
    if row.baseline is not None:
        lines.append(_against(line, row.baseline, row.baseline_name.replace("_", " "), "", ""))
    return lines or [line]


def _against(line: Line, value: float, source: str, obstacle: str, note: str) -> Line:
    assert line.measured is not None
    comparable = not obstacle
    return dataclasses.replace(
        line,
        expected=value,
        source=source,
        difference=line.measured - value if comparable else None,
        ratio=line.measured / value if comparable and value > 0 else None,
        note="; ".join(filter(None, (obstacle, note))),
    )


def _obstacle(row: Result, expected: Expected) -> str:
    """Why the two must not be compared; "" if they may."""
    if row.metric.startswith("fid") and row.samples != expected.samples:
        given, wanted = count(row.samples), count(expected.samples)
        return f"not compared: FID-{given} measured, FID-{wanted} expected"
    if row.extractor.startswith("inception-v3 with other weights"):
        return "not compared: measured with other Inception weights"
    return ""


def _unmeasured(
    expected: Expected,
    *,
    experiment: str,
    method: str,
    dataset: str,
    run: str = "",
    weights: str = "",
    images: int | None = None,
) -> Line:
    return Line(
        experiment=experiment,
        method=method,
        dataset=dataset,
        run=run,
        weights=weights,
        images=images,
        metric=expected.metric,
        steps=expected.steps,
        samples=expected.samples,
        expected=expected.value,
        source=expected.source,
        note=expected.note,
    )
