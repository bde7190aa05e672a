"""Which lines of a comparison are shown, and in which order."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastflow.errors import ConfigError, one_of

if TYPE_CHECKING:
    from fastflow.evaluation.table import Line

FILTERS = {
    "name": "experiment",
    "method": "method",
    "dataset": "dataset",
    "network": "network",
    "metric": "metric",
    "steps": "steps",
}
"""What lines are chosen by, and the attribute of a `Line` behind it."""

ORDERS = {
    **FILTERS,
    "nfe": "nfe",
    "measured": "measured",
    "expected": "expected",
    "difference": "difference",
    "ratio": "ratio",
    "images": "images",
    "cost": "device_hours",
}
"""What lines are sorted by."""


def chosen(
    lines: Sequence[Line], wanted: Mapping[str, Sequence[str]], *, measured: bool = False
) -> list[Line]:
    """The lines that fit one of the patterns of every filter.

    Args:
        lines: all lines.
        wanted: patterns by filter, each a value or a shell pattern (`cm_*`), in either case of
            letters; no patterns let everything through.
        measured: leave out what was not measured.

    Raises:
        ConfigError: a pattern fits no line.
    """
    kept = [line for line in lines if line.measured is not None or not measured]
    for name, patterns in wanted.items():
        values = {_value(line, name) for line in lines}
        for pattern in patterns:
            if not any(_fits(value, pattern) for value in values):
                raise ConfigError(f"--{name}: nothing has {pattern!r}; {one_of(pattern, values)}")
        if patterns:
            kept = [x for x in kept if any(_fits(_value(x, name), p) for p in patterns)]
    return kept


def ordered(lines: Sequence[Line], by: str, *, reverse: bool = False) -> list[Line]:
    """The lines by one of `ORDERS`, equal ones as they were; those without a value come last."""
    attribute = ORDERS[by]
    missing = [line for line in lines if getattr(line, attribute) in (None, "")]
    present = [line for line in lines if getattr(line, attribute) not in (None, "")]
    return sorted(present, key=lambda x: _folded(getattr(x, attribute)), reverse=reverse) + missing


def _folded(value: str | float) -> str | float:
    return value.casefold() if isinstance(value, str) else value


def _value(line: Line, name: str) -> str:
    return str(getattr(line, FILTERS[name]))


def _fits(value: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(value.casefold(), pattern.casefold())
