"""A run in the report: pictures from the same noise, curves of training, all that made it."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastflow.charts import Axis, Point, Series, axis, chart
from fastflow.evaluation.gallery import drawn
from fastflow.evaluation.runs import Run
from fastflow.evaluation.table import Line, duration, number
from fastflow.logging import JsonLines
from fastflow.markup import Markup, element, join

_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST = 8_000_000  # bytes of a picture that is taken in
_SHOWN = 4  # pictures


@dataclasses.dataclass(frozen=True)
class Shown:
    """A run that has a place in the report, from which its colour follows."""

    run: Run
    place: int

    @property
    def anchor(self) -> str:
        """Where it is in the page."""
        return f"run-{self.place}"

    @property
    def name(self) -> str:
        """What it is called: its experiment, and its folder where that has another name."""
        run = self.run
        return (
            run.experiment if run.name in ("", run.experiment) else f"{run.experiment} ({run.name})"
        )


def article(shown: Shown, lines: Sequence[Line]) -> Markup:
    """All that is known of a run.

    Args:
        shown: the run.
        lines: its results.
    """
    run, first = shown.run, lines[0]
    warnings = dict.fromkeys(text for line in lines for text in line.warnings)
    items = [element("li", text) for text in warnings]
    pictures = list(_pictures(run, lines))
    curves = [loss_curve(run, shown.place), loss_by_time(run, shown.place)]
    return element(
        "article",
        element("h3", f"{shown.name}: {first.method} on {first.dataset}"),
        element("ul", *items, class_="warnings", aria_label="Conditions") if items else None,
        element("div", *pictures, class_="figures") if pictures else None,
        element("div", *curves, class_="figures") if any(curves) else None,
        element(
            "details",
            element("summary", "What made these numbers"),
            element("dl", *_facts(run, first)),
        ),
        _settings(run),
        id=shown.anchor,
    )


def _facts(run: Run, line: Line) -> Iterator[Markup]:
    row = run.rows[0]
    stored = run.described or {}
    devices = "" if line.device_hours is None else f", {line.device_hours:.3g} device-hours"
    seeds = f"{row.first_seed:,} to {row.first_seed + row.blocks * row.generated - 1:,}"
    times = {each.steps: ", ".join(f"{t:.4g}" for t in each.times) for each in run.rows}
    facts = {
        "network": line.network,
        "weights": f"{row.weights} after {row.step:,} steps",
        "trained on": f"{row.images:,} images in batches of {row.batch_size:,}",
        "started from": stored.get("init_from"),
        "precision": stored.get("precision"),
        "training took": f"{duration(row.train_seconds)} on {row.trained_on}{devices}",
        "seeds": f"{seeds}, {row.blocks} block{'s' if row.blocks > 1 else ''}",
        "times": "; ".join(f"{n}: {text}" for n, text in sorted(times.items())),
        "extractor": f"{row.extractor} {row.extractor_hash}",
        "reference": f"{row.reference} {row.reference_hash}",
        "quantisation": row.quantisation,
        "measured on": row.hardware,
        "commit": row.commit,
        "torch": row.torch,
        "folder": run.name,
    }
    for name, value in facts.items():
        if value and str(value).strip():
            yield element("dt", name)
            yield element("dd", str(value))


def _settings(run: Run) -> Markup | None:
    if run.described is None:
        return None
    text = yaml.safe_dump(dict(run.described), sort_keys=False, allow_unicode=True)
    code = join(*(join(line, Markup("\n")) for line in text.splitlines()))
    return element("details", element("summary", "Settings"), element("pre", code))


# Pictures


def _pictures(run: Run, lines: Sequence[Line]) -> Iterator[Markup]:
    found = drawn(run.folder, run.weights, run.rows[0].step)
    for steps in list(found)[:_SHOWN]:
        picture = _picture(found[steps])
        if picture is not None:
            (across, down), uri = picture
            what = "1 step" if steps == 1 else f"{steps} steps"
            value = next((x for x in lines if x.steps == steps), None)
            caption = f"{what}, {value.label} {number(value.measured)}" if value else what
            alt = f"Samples of {run.experiment} in {what}"
            image = element("img", src=uri, alt=alt, width=across, height=down)
            yield element("figure", image, element("figcaption", caption))


def _picture(path: Path) -> tuple[tuple[int, int], str] | None:
    """Size and data URI of a PNG; None for what is none or too large."""
    if path.stat().st_size > _LARGEST:
        return None
    data = path.read_bytes()
    if not data.startswith(_PNG) or len(data) < 24:
        return None
    size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return size, f"data:image/png;base64,{base64.b64encode(data).decode()}"


# Curves


def loss_curve(run: Run, kind: int) -> Markup | None:
    """The loss over the steps, from log.jsonl."""
    records = _records(run.folder / "log.jsonl")
    points = tuple(p for r in records for p in _point(r.get("step"), r.get("loss")))
    if len(points) < 2:
        return None
    x, y = zip(*points, strict=True)
    picture = chart(
        f"Training loss of {run.experiment}",
        [Series("loss", kind, points, markers=False)],
        axis("step", x),
        axis("loss", y, wide=4.0),
    )
    return element("figure", picture, element("figcaption", "training loss"))


def loss_by_time(run: Run, kind: int) -> Markup | None:
    """The loss of each bucket of times, from loss_by_time.jsonl: the first and the last record."""
    records = [r for r in _records(run.folder / "loss_by_time.jsonl") if _is_bucketed(r)]
    series = [
        Series(
            f"step {record['step']}",
            kind,
            tuple(p for place, y in enumerate(record["loss"]) for p in _point(place + 0.5, y)),
            faint=len(records) > 1 and number == 0,
        )
        for number, record in enumerate([*records[:1], *records[1:][-1:]])
    ]
    heights = [y for each in series for _, y in each.points]
    if not heights:
        return None
    edges = records[-1]["edges"]
    ticks = tuple((place, f"{edge:.2g}") for place, edge in enumerate(edges, 1))
    picture = chart(
        f"Training loss of {run.experiment} by time",
        series,
        Axis("time t", 0.0, len(edges) + 1.0, False, ticks),
        axis("loss", heights, wide=4.0),
    )
    steps = " (faint) and ".join(each.name for each in series)
    return element("figure", picture, element("figcaption", f"loss by time, at {steps}"))


def _records(path: Path) -> list[Mapping[str, Any]]:
    return [record for record in JsonLines(path).read() if isinstance(record, dict)]


def _is_bucketed(record: Mapping[str, Any]) -> bool:
    edges, loss = record.get("edges"), record.get("loss")
    return (
        isinstance(edges, list)
        and isinstance(loss, list)
        and len(loss) == len(edges) + 1
        and all(isinstance(edge, int | float) and math.isfinite(edge) for edge in edges)
    )


def _point(x: object, y: object) -> Iterable[Point]:
    """A point, or none where a value is no finite number."""
    if isinstance(x, int | float) and isinstance(y, int | float) and math.isfinite(x + y):
        yield float(x), float(y)
