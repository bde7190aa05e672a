"""Tables: text of a limited width, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

Format: TypeAlias = Literal["text", "markdown", "csv", "json"]
WIDTH = 100


def as_json(records: Sequence[Mapping[str, object]]) -> str:
    """The records as a JSON list."""
    return json.dumps(records, indent=1)


def as_csv(names: Sequence[str], records: Sequence[Mapping[str, object]]) -> str:
    """The records under a line of names, without a final newline."""
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue().rstrip("\n")


def as_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar within a cell is escaped."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def widths(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """The width of each column."""
    return [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]


def aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line of a text table: the first cell to the left, the others to the right."""
    first, *rest = (
        cell.ljust(w) if n == 0 else cell.rjust(w)
        for n, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )
    return clip("  ".join((f"  {first}", *rest)).rstrip())


def clip(text: str) -> str:
    """The text, or as much of it as fits into `WIDTH` columns."""
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


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

    def lines(self) -> list[str]:
        """The texts behind their numbers."""
        return [f"[{number}] {text}" for number, text in enumerate(self._texts, 1)]
