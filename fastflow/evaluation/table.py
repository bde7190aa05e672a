"""Comparisons as text, Markdown, CSV or JSON."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence

from fastflow.evaluation.interface import Better
from fastflow.evaluation.results import improves, label
from fastflow.evaluation.runs import Key
from fastflow.tables import (
    WIDTH,
    Footnotes,
    Format,
    aligned,
    as_csv,
    as_json,
    as_markdown,
    clip,
    compact,
    widths,
    wrapped,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One comparison; None or "" where nothing was measured, or nothing is known.

    Attributes:
        experiment, method, dataset, network: what.
        run, weights: which run, by its folder, and which of its weights.
        step, images, batch_size: optimizer steps and training images behind the weights.
        metric, steps, nfe, samples: what was measured.
        better: whether lower or higher values of it are better.
        measured, std, minimum, blocks: mean, standard deviation and minimum over the seed blocks,
            and their number.
        expected, source, note: what it is compared with, who says so, and under which conditions.
        published: whether `expected` is a figure of the configuration's; otherwise it is the same
            distance where no model is involved.
        difference, ratio: measured - expected and measured / expected; None where the two must
            not be compared.
        warnings: how the conditions differ from those of the configuration and its figure.
        train_seconds, trained_on: wall time of training, and the processes and devices.
        commit, torch, hardware, extractor, extractor_hash, reference, reference_hash,
            quantisation: see `fastflow.evaluation.results.Result`.
    """

    experiment: str
    method: str
    dataset: str
    network: str = ""
    run: str = ""
    weights: str = ""
    step: int | None = None
    images: int | None = None
    batch_size: int | None = None
    metric: str
    steps: int
    nfe: int | None = None
    samples: int
    better: Better = "lower"
    measured: float | None = None
    std: float | None = None
    minimum: float | None = None
    blocks: int | None = None
    expected: float | None = None
    source: str = ""
    note: str = ""
    published: bool = False
    difference: float | None = None
    ratio: float | None = None
    warnings: tuple[str, ...] = ()
    train_seconds: float | None = None
    trained_on: str = ""
    commit: str = ""
    torch: str = ""
    hardware: str = ""
    extractor: str = ""
    extractor_hash: str = ""
    reference: str = ""
    reference_hash: str = ""
    quantisation: str = ""

    @property
    def key(self) -> Key:
        """Which run it is of."""
        return self.run, self.experiment, self.weights

    @property
    def label(self) -> str:
        """The metric for people, with its number of samples where it depends on them."""
        return label(self.metric, self.samples)

    @property
    def what(self) -> str:
        """The metric and the dataset."""
        return f"{self.label} on {self.dataset}"

    @property
    def reached(self) -> bool | None:
        """Whether the measured value is as good as the expected one; None where not compared."""
        if self.difference is None:
            return None
        return not improves(0.0, self.difference, self.better)

    @property
    def device_hours(self) -> float | None:
        """Wall time of training, in hours, times the processes."""
        if self.train_seconds is None:
            return None
        processes = re.match(r"\d+", self.trained_on)
        return self.train_seconds / 3600 * (int(processes[0]) if processes else 1)

    @property
    def cost(self) -> str:
        """What training took: "3.2 min on 1 x AMD EPYC", "47 h on 8 x H100 (376 GPU-hours)"."""
        if self.train_seconds is None or self.device_hours is None:
            return ""
        devices, _, threads = self.trained_on.partition(",")
        hours = "" if threads else f" ({self.device_hours:.3g} GPU-hours)"
        return f"{duration(self.train_seconds)} on {devices}{hours}"

    @property
    def provenance(self) -> str:
        """What the measurement was made with."""
        parts = (
            f"commit {self.commit[:9]}{'+' * self.commit.endswith('+')}" * bool(self.commit),
            f"torch {self.torch}" * bool(self.torch),
            f"extractor {self.extractor} {self.extractor_hash[:9]}" * bool(self.extractor),
            f"reference {self.reference} {self.reference_hash[:9]}" * bool(self.reference),
            f"quantisation {self.quantisation}" * bool(self.quantisation),
        )
        return "; ".join(part.strip() for part in parts if part)


def render(lines: Sequence[Line], format: Format, *, grouped: bool = True) -> str:
    """The lines in a format, without a final newline.

    Args:
        lines: in the order to be shown.
        format: "text" is at most `WIDTH` columns wide; the others are for machines and documents.
        grouped: as text, neighbouring lines of one run stand under a heading with what they share,
            and what has no results comes last; otherwise each line names its run.
    """
    if format == "json":
        return as_json([record(line) for line in lines])
    if format == "csv":
        return as_csv(_COLUMNS, [{**record(x), "warnings": "; ".join(x.warnings)} for x in lines])
    if format == "markdown":
        return _markdown(lines)
    if not lines:
        return "no results and no expected results found"
    return _grouped(lines) if grouped else _flat(lines)


_COLUMNS = (*(f.name for f in dataclasses.fields(Line)), "device_hours")


def record(line: Line) -> dict[str, object]:
    """All that is known of a line, for machines."""
    return {**dataclasses.asdict(line), "device_hours": line.device_hours}


def number(value: float | None) -> str:
    """A measured value for people, "-" for none."""
    if value is None:
        return "-"
    return f"{value:.2f}" if 0.1 <= abs(value) < 1e6 else f"{value:.3g}"


def signed(line: Line) -> str:
    """The difference of a line, to as many digits as its measured value."""
    if line.difference is None or line.measured is None:
        return "-"
    return f"{line.difference:+.2f}" if abs(line.measured) >= 0.1 else f"{line.difference:+.3g}"


def duration(seconds: float) -> str:
    """A wall time for people: 192 -> 3.2 min."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def remark(line: Line) -> str:
    """What a line is compared with; what it differs in is among its warnings."""
    note = "" if line.measured is not None else line.note
    return "; ".join(filter(None, (line.source, note)))


_HEAD = ("metric", "steps", "NFE", "measured", "min", "expected", "difference")


def _cells(line: Line, mark: str) -> tuple[str, ...]:
    return (
        line.label,
        str(line.steps),
        "-" if line.nfe is None else str(line.nfe),
        number(line.measured),
        number(line.minimum) if line.blocks != 1 else "-",
        f"{number(line.expected)} {mark}".strip(),
        signed(line),
    )


def _ratio(line: Line) -> str:
    return "-" if line.ratio is None else f"{line.ratio:.2f}"


def _images(line: Line) -> str:
    return "-" if line.images is None or line.measured is None else compact(line.images)


def _grouped(lines: Sequence[Line]) -> str:
    notes = Footnotes()
    head = (*_HEAD, "ratio", "notes")
    parts = []
    for _, same in itertools.groupby((x for x in lines if x.weights), lambda line: line.key):
        group = list(same)
        shared = next((line.provenance for line in group if line.provenance), "")
        title = _title(group[0], notes.mark(shared))
        rows = []
        for line in group:
            cells = _cells(line, notes.mark(remark(line)))
            own = line.provenance if line.provenance != shared else ""
            rows.append((*cells, _ratio(line), notes.marks((*line.warnings, own))))
        parts.append((title, rows))
    columns = widths(head, [row for _, rows in parts for row in rows])
    out: list[str] = []
    for title, rows in parts:
        out += ["", *title, *(aligned(row, columns) for row in (head, *rows))]
    out += _without_runs([line for line in lines if not line.weights], notes)
    return "\n".join([*out, "", *_legend(notes)]).strip("\n")


def _without_runs(lines: Sequence[Line], notes: Footnotes) -> list[str]:
    if not lines:
        return []
    head = ("experiment", "method", "dataset", "metric", "steps", "expected")
    rows = []
    for line in lines:
        names = (line.experiment, line.method, line.dataset, line.label)
        rows.append((*names, *_cells(line, notes.mark(remark(line)))[1:6:4]))
    columns = widths(head, rows)
    return ["", "no results yet", *(aligned(row, columns, left=4) for row in (head, *rows))]


def _title(line: Line, mark: str) -> list[str]:
    """What the lines of a run share: what it is, and what its training took."""
    title = f"{line.experiment}: {line.method} on {line.dataset}"
    title += f", {line.network}" if line.network else ""
    title += f", {line.weights}"
    title += f", run {line.run}" if line.run not in ("", line.experiment) else ""
    images = "" if line.images is None else f"{compact(line.images)} images"
    trained = ", ".join(filter(None, (images, line.cost)))
    return [clip(title), clip(f"  {trained} {mark}")]


def _flat(lines: Sequence[Line]) -> str:
    """Each line with its run; what else a run is, the other formats tell."""
    notes = Footnotes()
    head = ("run", *_HEAD, "images", "training", "notes")
    rows = []
    for line in lines:
        took = "-" if line.train_seconds is None else duration(line.train_seconds)
        cells = _cells(line, notes.mark(remark(line)))
        run, marks = line.run or line.experiment, notes.marks(line.warnings)
        rows.append((run, *cells, _images(line), took, marks))
    columns = widths(head, rows)
    columns[0] = max(min(columns[0], WIDTH - 2 * len(head) - sum(columns[1:])), 8)
    fitting = ((clip(row[0], columns[0]), *row[1:]) for row in (head, *rows))
    out = [aligned(row, columns, left=2) for row in fitting]
    return "\n".join([*out, "", *_legend(notes)]).strip("\n")


def _legend(notes: Footnotes) -> list[str]:
    out = []
    for text in notes.lines():
        mark, _, _ = text.partition(" ")
        out += wrapped(text, rest=" " * (len(mark) + 1))
    return out


def _markdown(lines: Sequence[Line]) -> str:
    what = ("experiment", "method", "dataset", "network")
    head = (*what, *_HEAD, "ratio", "images", "training", "source", "run", "differs", "made with")
    rows = []
    for line in lines:
        run = " ".join(filter(None, (line.run, line.weights)))
        names = (line.experiment, line.method, line.dataset, line.network)
        rest = (_ratio(line), _images(line), line.cost, remark(line), run)
        texts = ("; ".join(line.warnings), line.provenance)
        rows.append((*names, *_cells(line, ""), *rest, *texts))
    return as_markdown(head, rows)
