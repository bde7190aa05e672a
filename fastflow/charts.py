"""Line charts as SVG within a page: no script, colours from the page's style sheet.

Series k is drawn in the colour of the class `series-k` (`SERIES` of them), with its own marker.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from fastflow.markup import Markup, element, join
from fastflow.tables import compact

SERIES = 10
WIDTH, HEIGHT = 440, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 40
_MOST = 240  # points of a curve that are drawn

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve of a chart.

    Attributes:
        name: what it is.
        kind: which colour and marker it has, see `SERIES`; None for grey ones.
        points: (x, y), joined by a line.
        hollow: (x, y) of hollow markers that nothing joins.
        markers: whether each point has a marker.
        faint: drawn in the background.
    """

    name: str
    kind: int | None
    points: tuple[Point, ...] = ()
    hollow: tuple[Point, ...] = ()
    markers: bool = True
    faint: bool = False


@dataclasses.dataclass(frozen=True)
class Rule:
    """A horizontal line across a chart, with its name above it."""

    name: str
    y: float


@dataclasses.dataclass(frozen=True)
class Axis:
    """One direction of a chart.

    Attributes:
        name: what is shown along it.
        low, high: its ends.
        log: whether it is logarithmic.
        ticks: (value, text) of its marks.
    """

    name: str
    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def place(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high / self.low))
        return (value - self.low) / (self.high - self.low)


def axis(name: str, values: Sequence[float], *, wide: float = math.inf) -> Axis:
    """An axis that holds some values, with about five round marks.

    Args:
        name: what is shown along it.
        values: finite.
        wide: a ratio of the largest to the smallest value from which it is logarithmic, if all
            are positive.
    """
    low, high = min(values), max(values)
    if low > 0 and high / low >= wide:
        ticks = _log_ticks(low, high)
        low, high = min(low / 1.1, ticks[0]), max(high * 1.1, ticks[-1])
        return Axis(name, low, high, True, tuple((t, _text(t)) for t in ticks))
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = (0.0 if 0 <= low < (high - low) else low - margin), high + margin
    return Axis(name, low, high, False, tuple((t, _text(t)) for t in _even_ticks(low, high)))


def marked(name: str, values: Sequence[float]) -> Axis:
    """A logarithmic axis with a mark at each of some positive values."""
    distinct = sorted(set(values))
    low, high = distinct[0] / 1.25, distinct[-1] * 1.25
    return Axis(name, low, high, True, tuple((v, _text(v)) for v in distinct))


def chart(
    title: str, series: Sequence[Series], x: Axis, y: Axis, rules: Sequence[Rule] = ()
) -> Markup:
    """A line chart; its text alternative is the title and some values of each series."""
    frame = _Frame(x, y)
    return element(
        "svg",
        element("title", "; ".join([title, *map(_spoken, series)])),
        frame.grid(),
        *map(frame.rule, rules),
        *map(frame.series, sorted(series, key=lambda s: not s.faint)),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        class_="chart",
    )


def _spoken(series: Series) -> str:
    values = ", ".join(f"{y:.4g}" for _, y in _thin(series.points or series.hollow, 8))
    return f"{series.name}: {values}"


def key(kind: int | None, *, hollow: bool = False) -> Markup:
    """The marker of a series, for a legend."""
    return element(
        "svg",
        _marker(8, 8, kind, hollow=hollow),
        viewBox="0 0 16 16",
        class_="key",
        aria_hidden="true",
    )


@dataclasses.dataclass(frozen=True)
class _Frame:
    """The plotting area of a chart."""

    x: Axis
    y: Axis

    def at(self, point: Point) -> Point:
        across = _LEFT + self.x.place(point[0]) * (WIDTH - _LEFT - _RIGHT)
        down = HEIGHT - _BOTTOM - self.y.place(point[1]) * (HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(down, 1)

    def grid(self) -> Markup:
        parts = []
        for value, text in self.y.ticks:
            _, down = self.at((self.x.low, value))
            parts.append(element("path", d=f"M{_LEFT} {down}H{WIDTH - _RIGHT}", class_="grid"))
            parts.append(element("text", text, x=_LEFT - 6, y=down + 4, text_anchor="end"))
        foot = HEIGHT - _BOTTOM
        for value, text in self.x.ticks:
            across, _ = self.at((value, self.y.low))
            parts.append(element("path", d=f"M{across} {foot}v4", class_="axis"))
            parts.append(element("text", text, x=across, y=foot + 17, text_anchor="middle"))
        parts.append(element("path", d=f"M{_LEFT} {foot}H{WIDTH - _RIGHT}", class_="axis"))
        middle = _LEFT + (WIDTH - _LEFT - _RIGHT) / 2
        parts.append(element("text", self.x.name, x=middle, y=HEIGHT - 6, text_anchor="middle"))
        return element("g", *parts)

    def rule(self, rule: Rule) -> Markup:
        _, down = self.at((self.x.low, rule.y))
        right = WIDTH - _RIGHT
        return join(
            element("path", d=f"M{_LEFT} {down}H{right}", class_="rule"),
            element("text", rule.name, x=right, y=down - 4, text_anchor="end"),
        )

    def series(self, series: Series) -> Markup:
        kind = "other" if series.kind is None else series.kind % SERIES
        places = [self.at(p) for p in _thin(series.points, _MOST)]
        line = " ".join(f"{across:g},{down:g}" for across, down in places)
        return element(
            "g",
            element("polyline", points=line) if len(places) > 1 else None,
            *(_marker(*place, series.kind) for place in places if series.markers),
            *(_marker(*self.at(p), series.kind, hollow=True) for p in series.hollow),
            class_=f"series-{kind}" + (" faint" if series.faint else ""),
        )


def _marker(across: float, down: float, kind: int | None, *, hollow: bool = False) -> Markup:
    """A mark of about 8 pixels; its shape tells neighbouring kinds apart without colours."""
    place = kind or 0
    colour = "other" if kind is None else place % SERIES
    paths = (
        "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
        "m-3.6-3.6h7.2v7.2h-7.2z",
        "m0-5l4.8 8.4h-9.6z",
        "m0-5l5 5l-5 5l-5-5z",
        "m0 5l4.8-8.4h-9.6z",
    )
    return element(
        "path",
        d=f"M{across:g} {down:g}{paths[(place + place // SERIES) % len(paths)]}",
        class_=f"mark series-{colour}" + (" hollow" if hollow else ""),
    )


def _thin(points: Sequence[Point], most: int) -> Sequence[Point]:
    """Every n-th point and the last one, at most so many and one."""
    if len(points) <= most:
        return points
    stride = math.ceil(len(points) / most)
    return [*points[:-1:stride], points[-1]]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from below `low` to above `high`; over far, powers alone."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [m * 10.0**e for e in range(first, last + 1) for m in steps]
    inside = [t for t in ticks if low / 1.1 <= t <= high * 1.1]
    every = math.ceil(len(inside) / 7)
    return (inside if len(inside) > 1 else [low, high])[::every]


def _even_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [n * step for n in range(first, last + 1)]


def _text(value: float) -> str:
    return compact(value) if abs(value) >= 1000 else f"{value:.3g}"
