"""One line for each run, one column for each number of steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from fastflow.errors import ConfigError
from fastflow.evaluation.results import improves
from fastflow.evaluation.runs import Key
from fastflow.evaluation.table import Line, number
from fastflow.tables import aligned, as_markdown, clip, compact, widths

DIFFERS = "* under other conditions than the published ones"


@dataclasses.dataclass(frozen=True)
class Overview:
    """What was measured of one metric on one dataset.

    Attributes:
        title: the metric and the dataset.
        steps: numbers of steps that anything was measured in.
        runs: of each run the line of each number of steps, the first where there are several.
    """

    title: str
    steps: tuple[int, ...]
    runs: Mapping[Key, Mapping[int, Line]]

    def best(self, steps: int) -> float | None:
        """The best value in a number of steps; None where fewer than two were measured."""
        lines = [run[steps] for run in self.runs.values() if steps in run]
        best: float | None = None
        for line in lines:
            if line.measured is not None and (
                best is None or improves(line.measured, best, line.better)
            ):
                best = line.measured
        return best if len(lines) > 1 else None


def overviews(lines: Iterable[Line]) -> list[Overview]:
    """One for each metric, number of samples and dataset that anything was measured of."""
    groups: dict[str, dict[Key, dict[int, Line]]] = {}
    for line in lines:
        if line.measured is not None:
            runs = groups.setdefault(line.what, {})
            runs.setdefault(line.key, {}).setdefault(line.steps, line)
    return [
        Overview(title, tuple(sorted({n for run in runs.values() for n in run})), runs)
        for title, runs in groups.items()
    ]


def render_overviews(lines: Iterable[Line], format: str) -> str:
    """All overviews as text or Markdown, without a final newline.

    Raises:
        ConfigError: another format.
    """
    if format not in ("text", "markdown"):
        raise ConfigError(f"--overview: format {format} given, accepted: text, markdown")
    parts: list[str] = []
    for each in overviews(lines):
        bold = "**" if format == "markdown" else ""
        head, rows = _cells(each, bold)
        parts.append(f"**{each.title}**\n" if bold else clip(each.title))
        if bold:
            parts.append(as_markdown(head, rows))
        else:
            columns = widths(head, rows)
            parts += [aligned(row, columns, left=2) for row in (head, *rows)]
        starred = any(line.warnings for run in each.runs.values() for line in run.values())
        parts += [f"\n{DIFFERS}"] if starred else []
        parts.append("")
    return "\n".join(parts).rstrip("\n") or "no results found"


def _cells(overview: Overview, bold: str) -> tuple[Sequence[str], list[Sequence[str]]]:
    steps = [f"{n} step{'s' if n > 1 else ''}" for n in overview.steps]
    head = ("run", "method", *steps, "images", "training")
    rows: list[Sequence[str]] = []
    best = {n: overview.best(n) for n in overview.steps}
    for (name, experiment, _), run in overview.runs.items():
        first = next(iter(run.values()))
        values = [cell(run.get(n), best[n], bold) for n in overview.steps]
        images = "-" if first.images is None else compact(first.images)
        rows.append((name or experiment, first.method, *values, images, first.cost or "-"))
    return head, rows


def cell(line: Line | None, best: float | None, bold: str = "") -> str:
    """A measured value, between `bold` if it is the best, with a star if conditions differ."""
    if line is None:
        return "-"
    mark = bold if line.measured == best else ""
    return f"{mark}{number(line.measured)}{mark}{'*' if line.warnings else ''}"
