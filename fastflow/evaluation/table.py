"""Comparisons as text, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Literal, TypeAlias

from fastflow.evaluation.results import label

Format: TypeAlias = Literal["text", "markdown", "csv", "json"]
WIDTH = 100


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
        return json.dumps([dataclasses.asdict(line) for line in lines], indent=1)
    if format == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(
            out, [f.name for f in dataclasses.fields(Line)], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(dataclasses.asdict(line) for line in lines)
        return out.getvalue().rstrip("\n")
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
    notes: list[str] = []
    rows = [_cells(line, _mark(line, notes)) for line in lines]
    widths = [max(len(cell) for cell in column) for column in zip(_HEAD, *rows, strict=True)]
    out: list[str] = []
    title = ""
    for line, row in zip(lines, rows, strict=True):
        if _title(line) != title:
            title = _title(line)
            out += ["", _clip(title), _aligned(_HEAD, widths)]
        out.append(_aligned(row, widths))
    out += ["", *(_clip(f"[{n}] {note}") for n, note in enumerate(notes, 1))] if notes else []
    return "\n".join(out).strip("\n")


def _mark(line: Line, notes: list[str]) -> str:
    """The number of the footnote that tells what a line is compared with."""
    text = "; ".join(filter(None, (line.source, line.note)))
    if not text:
        return ""
    if text not in notes:
        notes.append(text)
    return f"[{notes.index(text) + 1}]"


def _title(line: Line) -> str:
    title = f"{line.experiment}: {line.method} on {line.dataset}"
    if not line.weights:
        return f"{title} (no results yet)"
    return f"{title}, {line.weights}" + (f", run {line.run}" if line.run else "")


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.ljust(w) if n == 0 else cell.rjust(w)
        for n, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )
    return _clip("  ".join((f"  {first}", *rest)).rstrip())


def _clip(text: str) -> str:
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def _markdown(lines: Sequence[Line]) -> str:
    head = ("experiment", "method", "dataset", *_HEAD, "source", "run")
    out = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for line in lines:
        source = "; ".join(filter(None, (line.source, line.note)))
        run = " ".join(filter(None, (line.run, line.weights)))
        row = (line.experiment, line.method, line.dataset, *_cells(line, ""), source, run)
        out.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
    return "\n".join(out)
