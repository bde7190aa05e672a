"""How far sampling has come, for people: a line on stderr."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta

_WINDOW = 60.0  # seconds over which speed is measured


class ProgressLine:
    """Samples done, their rate and the time left; called after each batch.

    On a terminal one line is written over and over; elsewhere a line every half minute. When a
    part is done, its line stays.

    Args:
        costs: what each part costs, relative to the others, in their order: a part begins where
            the text changes. From them follows the time left of all.
        seconds: between lines; None takes those above.
        clock: tells seconds.
    """

    def __init__(
        self,
        costs: Sequence[float],
        seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._costs = tuple(costs)
        self._terminal = sys.stderr.isatty()
        self._seconds = (0.2 if self._terminal else 30.0) if seconds is None else seconds
        self._clock = clock
        self._part, self._what = -1, ""
        self._began = self._shown = clock()
        # Moments, and the cost of all that was done by then.
        self._past = deque([(self._began, 0.0)])
        self._width = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Take note, and show it when it is time.

        Args:
            what: what is sampled.
            done, total: samples of it.
        """
        now = self._clock()
        if what != self._what:
            self._part, self._what = self._part + 1, what
            self._began = self._past[-1][0]
        work = sum(self._costs[: self._part]) + self._costs[self._part] * done / total
        self._past.append((now, work))
        while len(self._past) > 2 and self._past[1][0] <= now - _WINDOW:
            self._past.popleft()
        if done == total or now - self._shown >= self._seconds:
            self._shown = now
            self._show(self._text(what, done, total, work), last=done == total)

    def titled(self, title: str) -> Callable[[str, int, int], None]:
        """The same, with words before what is sampled."""
        return lambda what, done, total: self(title + what, done, total)

    def _text(self, what: str, done: int, total: int, work: float) -> str:
        (first, before), (now, _) = self._past[0], self._past[-1]
        parts = [f"{what}: {done:,} of {total:,} samples"]
        if now > self._began:
            parts.append(f"{done / (now - self._began):,.4g}/s")
        left = sum(self._costs) - work
        if left > 0 and now > first and work > before:
            seconds = round(left * (now - first) / (work - before))
            parts.append(f"{timedelta(seconds=seconds)} left")
        return ", ".join(parts)

    def _show(self, text: str, last: bool) -> None:
        if self._terminal:
            print(f"\r{text:<{self._width}}", end="\n" if last else "", file=sys.stderr, flush=True)
            self._width = 0 if last else len(text)
        else:
            print(text, file=sys.stderr, flush=True)
