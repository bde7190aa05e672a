"""The comparison as one HTML file: tables, curves and pictures; no script, nothing is fetched."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from fastflow.charts import Point, Rule, Series, axis, chart, key, marked
from fastflow.evaluation.overview import DIFFERS, Overview, cell, overviews
from fastflow.evaluation.report_runs import Shown, article
from fastflow.evaluation.report_style import CSS
from fastflow.evaluation.runs import Key, Run
from fastflow.evaluation.table import Line, number, remark, signed
from fastflow.markup import Markup, element, join
from fastflow.tables import Footnotes

# A browser then loads nothing but what the file itself holds, whatever a name in it tries.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_READING = (
    "Measured is the mean over blocks of seeds, expected a published figure or a stated bound. "
    "Numbers in brackets lead to where a figure comes from and to every condition that was "
    "another one than it was published for."
)


def page(lines: Sequence[Line], runs: Iterable[Run], title: str = "Measured and expected") -> str:
    """The report of some lines, in their order; the same lines and files give the same text.

    Args:
        lines: measured and expected.
        runs: those of the lines; pictures, curves and settings are read from their folders.
        title: of the page.
    """
    measured = [line for line in lines if line.measured is not None]
    unmeasured = [line for line in lines if line.measured is None]
    known = {run.key: run for run in runs}
    keys = [k for k in dict.fromkeys(line.key for line in measured) if k in known]
    shown = {k: Shown(known[k], place) for place, k in enumerate(keys)}
    sections: dict[str, Markup] = {}
    for place, overview in enumerate(overviews(lines)):
        group = [line for line in measured if line.what == overview.title]
        others = [line for line in unmeasured if line.what == overview.title]
        sections[overview.title] = _group(overview, group, others, shown, f"note-{place}")
    if shown:
        articles = (article(shown[k], [x for x in measured if x.key == k]) for k in keys)
        sections["Runs"] = join(*articles)
    if unmeasured:
        sections["Not measured yet"] = _unmeasured(unmeasured)
    return _document(title, sections)


def _document(title: str, sections: Mapping[str, Markup]) -> str:
    anchors = {name: f"section-{place}" for place, name in enumerate(sections)}
    links = (element("li", element("a", name, href=f"#{a}")) for name, a in anchors.items())
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Markup(CSS)),
    )
    header = element(
        "header",
        element("h1", title),
        element("p", _READING, class_="soft"),
        element("nav", element("ul", *links), aria_label="Sections"),
    )
    main = (
        element("section", element("h2", name), content, id=anchors[name])
        for name, content in sections.items()
    )
    body = element("body", header, element("main", *main))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _group(
    overview: Overview,
    group: Sequence[Line],
    others: Sequence[Line],
    shown: Mapping[Key, Shown],
    anchor: str,
) -> Markup:
    """One metric on one dataset: its curves, its best values, and every value with its notes."""
    notes = Footnotes()
    detail = _results(group, shown, notes, anchor)
    pair = join(_curves(group, others, shown), _overview(overview, group, shown))
    return join(element("div", pair, class_="pair"), detail, _notes(notes, anchor))


# Values over network evaluations


def _curves(
    group: Sequence[Line], others: Sequence[Line], shown: Mapping[Key, Shown]
) -> Markup | None:
    series = [
        _curve([line for line in group if line.key == k], [o for o in others if o.key == k], each)
        for k, each in shown.items()
        if any(line.key == k for line in group)
    ]
    elsewhere = [line for line in others if line.key not in shown]
    if elsewhere:
        name = "expected of experiments without results"
        series.append(Series(name, None, hollow=_points(elsewhere, "expected")))
    rules = {
        line.source: Rule(line.source, line.expected)
        for line in group
        if not line.published and line.expected is not None and math.isfinite(line.expected)
    }
    points = [point for each in series for point in (*each.points, *each.hollow)]
    if not points:
        return None
    label = group[0].label
    heights = [y for _, y in points] + [rule.y for rule in rules.values()]
    return element(
        "figure",
        chart(
            f"{label} against network evaluations",
            series,
            marked("network evaluations per sample (NFE)", [x for x, _ in points]),
            axis(label, heights, wide=4.0),
            tuple(rules.values()),
        ),
        element("figcaption", *_legend(series)),
    )


def _legend(series: Sequence[Series]) -> list[Markup | str]:
    """What the marks are, beside the runs' own, which stand in front of their names."""
    words: list[Markup | str] = []
    if any(s.points and s.hollow for s in series):
        words.append("Hollow: expected. ")
    if any(s.kind is None for s in series):
        words += [key(None, hollow=True), "expected, of experiments without results. "]
    return words


def _curve(group: Sequence[Line], others: Sequence[Line], shown: Shown) -> Series:
    compared = [line for line in group if line.published and line.difference is not None]
    figures = [*compared, *others]
    return Series(shown.name, shown.place, _points(group, "measured"), _points(figures, "expected"))


def _points(lines: Iterable[Line], attribute: str) -> tuple[Point, ...]:
    """(NFE, value) of each line that has them, in order; a figure's NFE is its steps."""
    found = {(line.nfe or line.steps, getattr(line, attribute)) for line in lines}
    return tuple(sorted((float(x), float(y)) for x, y in found if x > 0 and math.isfinite(y)))


# Tables


def _overview(overview: Overview, group: Sequence[Line], shown: Mapping[Key, Shown]) -> Markup:
    head = [element("th", "run", scope="col", class_="text")]
    head += [element("th", _steps(n), scope="col") for n in overview.steps]
    best = {n: overview.best(n) for n in overview.steps}
    rows = []
    for k, run in overview.runs.items():
        line = next(iter(run.values()))
        name = _named(line, shown.get(k))
        cells = (element("td", *_value(run.get(n), best[n])) for n in overview.steps)
        rows.append(element("tr", element("th", *name, scope="row", class_="text"), *cells))
    words = f"By number of steps; {group[0].better} is better, the best is bold."
    if any(line.warnings for line in group):
        words += f" {DIFFERS}"
    table = element(
        "table",
        element("caption", words),
        element("thead", element("tr", *head)),
        element("tbody", *rows),
    )
    return element("div", table, class_="scroll")


def _steps(number: int) -> str:
    return "1 step" if number == 1 else f"{number} steps"


def _value(line: Line | None, best: float | None) -> tuple[str | Markup, ...]:
    text = cell(line, best)
    return (element("b", text),) if line is not None and line.measured == best else (text,)


def _named(line: Line, shown: Shown | None) -> tuple[str | Markup, ...]:
    """A run with its mark, linked to all that is known of it."""
    if shown is None:
        return (line.experiment,)
    return key(shown.place), element("a", shown.name, href=f"#{shown.anchor}")


def _results(
    group: Sequence[Line], shown: Mapping[Key, Shown], notes: Footnotes, anchor: str
) -> Markup:
    columns = Columns(
        blocks=any(line.blocks != 1 for line in group),
        expected=any(line.expected is not None for line in group),
        notes=any(line.warnings for line in group),
    )
    titles = [element("th", text, scope="col") for text in columns.titles]
    titles += [element("th", "differs", scope="col", class_="text")] if columns.notes else []
    bodies = []
    for k, same in itertools.groupby(group, lambda line: line.key):
        own = list(same)
        rows = [_heading(own[0], shown.get(k), len(titles))]
        for _, lines in itertools.groupby(own, lambda x: (x.steps, x.nfe, x.measured, x.minimum)):
            rows.append(_row(list(lines), columns, notes, anchor))
        bodies.append(element("tbody", *rows))
    table = element(
        "table",
        element("caption", "Every value, what is expected, and what differs"),
        element("thead", element("tr", *titles)),
        *bodies,
    )
    return element("div", table, class_="scroll detail")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns a table of results has, beside steps, NFE and the measured value."""

    blocks: bool
    expected: bool
    notes: bool

    @property
    def titles(self) -> tuple[str, ...]:
        """Of the columns of numbers."""
        blocks = ("min",) if self.blocks else ()
        expected = ("expected", "difference") if self.expected else ()
        return ("steps", "NFE", "measured", *blocks, *expected)


def _heading(line: Line, shown: Shown | None, columns: int) -> Markup:
    """The row above those of a run."""
    trained = ", ".join(filter(None, (line.network, _images(line), line.cost)))
    words = element("span", f" {line.method}; {trained}", class_="soft")
    name = _named(line, shown)
    group = element("th", *name, words, colspan=columns, scope="rowgroup", class_="group")
    return element("tr", group)


def _images(line: Line) -> str:
    return "" if line.images is None else f"{line.images:,} images"


def _row(lines: Sequence[Line], columns: Columns, notes: Footnotes, anchor: str) -> Markup:
    """One result, with a line in its cells for each thing that it is compared with."""
    first = lines[0]
    spread = element("small", f" ± {first.std:.2g}") if first.std and first.blocks != 1 else None
    warnings = dict.fromkeys(text for line in lines for text in line.warnings)
    cells = [
        element("td", str(first.steps)),
        element("td", "-" if first.nfe is None else str(first.nfe)),
        element("td", number(first.measured), spread, class_="measured"),
    ]
    if columns.blocks:
        cells.append(element("td", number(first.minimum) if first.blocks != 1 else "-"))
    if columns.expected:
        expected = [line for line in lines if line.expected is not None]
        cells.append(element("td", *(_expected(line, notes, anchor) for line in expected)))
        cells.append(element("td", *map(_difference, expected)))
    if columns.notes:
        links = (_link(notes.mark(text), anchor) for text in warnings)
        cells.append(element("td", *links, class_="text"))
    return element("tr", *cells)


def _expected(line: Line, notes: Footnotes, anchor: str) -> Markup:
    link = _link(notes.mark(remark(line)), anchor)
    return element("div", number(line.expected), " " if link else None, link)


def _difference(line: Line) -> Markup:
    judged = line.published and line.reached is not None
    met = ("met" if line.reached else "missed") if judged else None
    return element("div", signed(line).replace("-", "\u2212"), class_=met)


def _link(mark: str, anchor: str) -> Markup | None:
    """A footnote's mark, such as "[2]", as a link to its text."""
    return element("a", mark, href=f"#{anchor}-{mark[1:-1]}") if mark else None


def _notes(notes: Footnotes, anchor: str) -> Markup | None:
    items = [element("li", text, id=f"{anchor}-{place}") for place, text in enumerate(notes, 1)]
    return element("ol", *items, class_="notes") if items else None


def _unmeasured(lines: Sequence[Line]) -> Markup:
    head = ("experiment", "method", "dataset", "network", "metric", "steps", "expected", "source")
    rows = []
    for line in lines:
        names = (line.method, line.dataset, line.network, line.label)
        rows.append(
            element(
                "tr",
                element("th", line.experiment, scope="row", class_="text"),
                *(element("td", text, class_="text") for text in names),
                element("td", str(line.steps)),
                element("td", number(line.expected)),
                element("td", remark(line), class_="text"),
            )
        )
    titles = (element("th", text, scope="col", class_="text") for text in head)
    table = element(
        "table",
        element("caption", "Figures that configurations state and no result was found for"),
        element("thead", element("tr", *titles)),
        element("tbody", *rows),
    )
    count = "1 figure" if len(lines) == 1 else f"{len(lines)} figures"
    scroll = element("div", table, class_="scroll", tabindex="0", role="region", aria_label=count)
    return element("details", element("summary", count), scroll, open=len(lines) <= 12)
