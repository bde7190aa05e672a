"""Networks of the literature with their published sizes, beside what ours measure.

fastflow knows no architecture. A package that does offers a sequence of `Preset` under the entry
point group "fastflow.presets" of its pyproject.toml:

    [project.entry-points."fastflow.presets"]
    networks = "networks.presets:PRESETS"
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence

import torch

from fastflow.config import Lazy, build
from fastflow.entry_points import offered
from fastflow.errors import ConfigError
from fastflow.measure import measure
from fastflow.network import Network
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

GROUP = "fastflow.presets"
"""The entry point group of presets."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A network of the literature.

    Attributes:
        name: lower-case words between hyphens, the least specific first.
        network: all of it, in its wrapper.
        parameters: published number of parameters, in millions; None where none is.
        gmacs: published multiply-accumulates of a forward pass, in 1e9; None where none are.
        source: who publishes them.
        note: why ours differ.
    """

    name: str
    network: Lazy
    parameters: float | None = None
    gmacs: float | None = None
    source: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A preset as measured; parameters in millions, multiply-accumulates in 1e9.

    Attributes:
        name, network, shape: of the preset, of its classes, and of one sample.
        parameters, published, difference: measured, published, and measured - published.
        gmacs, published_gmacs: multiply-accumulates of a forward pass of one sample.
        attention: see `fastflow.measure.Cost`.
        units: modules that are sharded, checkpointed and compiled one by one.
        source, note: see `Preset`.
    """

    name: str
    network: str
    shape: str
    parameters: float
    published: float | None
    difference: float | None
    gmacs: float
    published_gmacs: float | None
    attention: str
    units: int
    source: str
    note: str


def presets() -> tuple[Preset, ...]:
    """The presets of all installed packages.

    Raises:
        ConfigError: there are none, or some cannot be imported.
    """
    found = tuple(preset for group in offered(GROUP) for preset in group)
    if not found:
        raise ConfigError(
            f"no installed package offers networks (entry points {GROUP!r}); install fastflow "
            f"again: make setup"
        )
    return found


def chosen(presets: Sequence[Preset], names: Iterable[str]) -> list[Preset]:
    """The presets with these names, or with these words in their names; all for no names.

    Raises:
        ConfigError: a name fits none.
    """
    names = list(names)
    picked: set[str] = set()
    for name in names:
        fitting = {p.name for p in presets if p.name == name}
        fitting = fitting or {p.name for p in presets if f"-{name}-" in f"-{p.name}-"}
        if not fitting:
            words = {w for p in presets for w in p.name.split("-") if len(w) > 2}
            near = difflib.get_close_matches(name, {p.name for p in presets} | words, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"NAME: no network {name!r}; {hint}accepted: a name, or a word of names: "
                f"{', '.join(sorted(words))}"
            )
        picked |= fitting
    return [p for p in presets if p.name in picked or not names]


def table(presets: Iterable[Preset], format: Format = "text") -> str:
    """The presets as built here beside what is published of them.

    Networks are built on the meta device: this takes neither memory nor computation.

    Raises:
        ConfigError: a preset cannot be built.
    """
    return _render([_row(preset) for preset in presets], format)


def _row(preset: Preset) -> Row:
    kernels = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    meta = torch.device("meta")
    with meta:
        network: Network = build(preset.network, at=preset.name)
    cost = measure(network, meta, kernels)
    parameters = cost.parameters / 1e6
    return Row(
        name=preset.name,
        network=_kind(preset.network),
        shape="x".join(map(str, network.sample_shape)),
        parameters=parameters,
        published=preset.parameters,
        difference=None if preset.parameters is None else parameters - preset.parameters,
        gmacs=cost.macs / 1e9,
        published_gmacs=preset.gmacs,
        attention=cost.attention,
        units=len(network.shard_units()),
        source=preset.source,
        note=preset.note,
    )


def _kind(network: Lazy) -> str:
    inner = [a.target.__name__ for a in network.kwargs.values() if isinstance(a, Lazy)]
    return network.target.__name__ + (f"({', '.join(inner)})" if inner else "")


_HEAD = (
    *("name", "sample", "params/M", "paper", "diff"),
    *("GMACs", "paper", "attention", "units"),
)
_LEGEND = (
    "params/M: millions of parameters. GMACs: 1e9 multiply-accumulates of one forward pass of one",
    "sample, in convolutions and matrix products. attention: the kernel for float32 here; after a",
    "slash that in forward-mode differentiation. units: blocks sharded, checkpointed, compiled.",
)


def _render(rows: Sequence[Row], format: Format) -> str:
    records = [dataclasses.asdict(row) for row in rows]
    if format == "json":
        return as_json(records)
    if format == "csv":
        return as_csv([f.name for f in dataclasses.fields(Row)], records)
    if format == "markdown":
        head = (*_HEAD, "network", "source")
        return as_markdown(head, [(*_cells(row, ""), row.network, _remark(row)) for row in rows])
    notes = Footnotes()
    cells = [_cells(row, notes.mark(_remark(row))) for row in rows]
    columns = widths(_HEAD, cells)
    lines: list[str] = []
    kind = ""
    for row, line in zip(rows, cells, strict=True):
        if row.network != kind:
            kind = row.network
            lines += ["", clip(kind), aligned(_HEAD, columns)]
        lines.append(aligned(line, columns))
    return "\n".join([*lines, "", *_LEGEND, *map(clip, notes.lines())]).lstrip("\n")


def _cells(row: Row, mark: str) -> tuple[str, ...]:
    return (
        row.name,
        row.shape,
        f"{row.parameters:.2f}",
        f"{_number(row.published)} {mark}".strip(),
        "-" if row.difference is None else f"{round(row.difference, 2) + 0.0:+.2f}",
        f"{row.gmacs:.2f}",
        _number(row.published_gmacs),
        row.attention,
        str(row.units),
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _remark(row: Row) -> str:
    return "; ".join(filter(None, (row.source, row.note)))
