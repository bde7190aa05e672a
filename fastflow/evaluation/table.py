"""Comparisons as text, Markdown, CSV or JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fastflow.evaluation.results import label
from fastflow.tables import (
    Footnotes,
    Format,
    aligned,
    as_csv,
    as_json,
    as_markdown,
    clip,
    widths,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One comparison; None where nothing was measured, or nothing is known to compare with.

    Attributes:
        experiment, method, dataset: what.
        run: run directory, relative to the folder compared; "" without results.
        weights, images: which weights, and training images behind them.
        metric, steps, nfe, samples: what was measured.
        measured, minimum, blocks: mean and minimum over the seed blocks, and their number.
        expected, source: what it is compared with, and who says so.
        difference, ratio: measured - expected and measured / expected; None where the two must
            not be compared.
        note: why not, or how they differ.
    """

    experiment: str
    method: str
    dataset: str
    run: str = ""
    weights: str = ""
    images: int | None = None
    metric: str
    steps: int
    nfe: int | None = None
    samples: int
    measured: float | None = None
    minimum: float | None = None
    blocks: int | None = None
    expected: float | None = None
    source: str = ""
    difference: float | None = None
    ratio: float | None = None
    note: str = ""


def render(lines: Sequence[Line], format: Format) -> str:
    """The lines in a format, without a final newline."""
    if format == "json":
        return as_json([dataclasses.asdict(line) for line in lines])
    if format == "csv":
        names = [f.name for f in dataclasses.fields(Line)]
        return as_csv(names, [dataclasses.asdict(line) for line in lines])
    if format == "markdown":
        return _markdown(lines)
    return _text(lines)


_HEAD = ("metric", "steps", "NFE", "measured", "min", "expected", "difference", "ratio", "images")


def _cells(line: Line, mark: str) -> tuple[str, ...]:
    expected = _number(line.expected)
    return (
        label(line.metric, line.samples),
        str(line.steps),
        "-" if line.nfe is None else str(line.nfe),
        _number(line.measured),
        _number(line.minimum) if line.blocks != 1 else "-",
        f"{expected} {mark}".strip(),
        "-" if line.difference is None else f"{line.difference:+.3g}",
        "-" if line.ratio is None else f"{line.ratio:.3g}",
        "-" if line.images is None or line.measured is None else _images(line.images),
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if 0.1 <= abs(value) < 1e6 else f"{value:.3g}"


def _images(number: int) -> str:
    for unit, size in (("M", 1_000_000), ("k", 1000)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return str(number)


def _text(lines: Sequence[Line]) -> str:
    if not lines:
        return "no results and no expected results found"
    notes = Footnotes()
    rows = [_cells(line, notes.mark(_remark(line))) for line in lines]
    columns = widths(_HEAD, rows)
    out: list[str] = []
    title = ""
    for line, row in zip(lines, rows, strict=True):
        if _title(line) != title:
            title = _title(line)
            out += ["", clip(title), aligned(_HEAD, columns)]
        out.append(aligned(row, columns))
    out += ["", *map(clip, notes.lines())]
    return "\n".join(out).strip("\n")


def _remark(line: Line) -> str:
    """What a line is compared with."""
    return "; ".join(filter(None, (line.source, line.note)))


def _title(line: Line) -> str:
    title = f"{line.experiment}: {line.method} on {line.dataset}"
    if not line.weights:
        return f"{title} (no results yet)"
    return f"{title}, {line.weights}" + (f", run {line.run}" if line.run else "")


def _markdown(lines: Sequence[Line]) -> str:
    head = ("experiment", "method", "dataset", *_HEAD, "source", "run")
    rows = []
    for line in lines:
        run = " ".join(filter(None, (line.run, line.weights)))
        names = (line.experiment, line.method, line.dataset)
        rows.append((*names, *_cells(line, ""), _remark(line), run))
    return as_markdown(head, rows)
