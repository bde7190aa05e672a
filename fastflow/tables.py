"""Tables: text of a limited width, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import itertools
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

Format: TypeAlias = Literal["text", "markdown", "csv", "json"]
WIDTH = 100


def as_json(records: Sequence[Mapping[str, object]]) -> str:
    """The records as a JSON list."""
    return json.dumps(records, indent=1)


def as_csv(names: Sequence[str], records: Sequence[Mapping[str, object]]) -> str:
    """The records under a line of names, without a final newline; texts stay on one line."""
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({n: printable(v) if isinstance(v, str) else v for n, v in record.items()})
    return out.getvalue().rstrip("\n")


def as_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar within a cell is escaped."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [printable(cell).replace("|", chr(92) + "|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def printable(text: str) -> str:
    """The text with "\ufffd" for whatever is no visible character: line ends, terminal codes."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def compact(number: float) -> str:
    """A large number for people: 179200 -> 179.2k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:g}"


def widths(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """The width of each column."""
    return [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]


def aligned(cells: Sequence[str], widths: Sequence[int], left: int = 1) -> str:
    """One line of a text table: the first `left` cells to the left, the others to the right."""
    placed = (
        cell.ljust(width) if number < left else cell.rjust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return clip(f"  {'  '.join(placed)}".rstrip())


def clip(text: str, width: int = WIDTH) -> str:
    """The text on one line, or as much of it as fits into so many columns."""
    text = printable(text)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    """The text in lines of at most `WIDTH` columns, which start with `first`, then `rest`."""
    lines = textwrap.wrap(
        printable(text),
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
    )
    return lines or [first]


class Footnotes:
    """Texts that rows of a table refer to by number; equal ones share a number."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def mark(self, text: str) -> str:
        """What refers to a text, such as "[1]"; "" for none."""
        if not text:
            return ""
        if text not in self._texts:
            self._texts.append(text)
        return f"[{self._texts.index(text) + 1}]"

    def marks(self, texts: Iterable[str]) -> str:
        """What refers to several texts, such as "[2,4-6]"; "" for none."""
        numbers = sorted({int(self.mark(text)[1:-1]) for text in texts if text})
        parts = []
        for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
            first, *rest = [number for _, number in run]
            parts.append(f"{first}-{rest[-1]}" if rest else str(first))
        return f"[{','.join(parts)}]" if parts else ""

    def lines(self) -> list[str]:
        """The texts behind their numbers."""
        return [f"[{number}] {text}" for number, text in enumerate(self._texts, 1)]

    def __iter__(self) -> Iterator[str]:
        """The texts in the order of their numbers."""
        return iter(self._texts)
