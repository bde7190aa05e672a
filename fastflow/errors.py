"""Errors a user can cause. The command line prints them without a traceback and exits with 2."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


class FastflowError(Exception):
    """Base of every error that a user's input can cause; the text says how to fix it."""


class ConfigError(FastflowError, ValueError):
    """A configuration key, type or value is not accepted."""


class DataError(FastflowError):
    """A dataset is missing, unreadable or not what the configuration says."""


class CheckpointError(FastflowError):
    """A checkpoint or weights file is missing, unreadable or does not fit."""


class DivergenceError(FastflowError, RuntimeError):
    """The loss or a gradient became non-finite."""


class LostProcessError(FastflowError):
    """Another process of a run died, or did not answer in time."""


class MissingPackageError(FastflowError, ImportError):
    """An optional package is needed for what was asked."""

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed: "
            f"pip install 'fastflow[{extra}]'"
        )


def one_of(given: object, accepted: Iterable[str]) -> str:
    """Say which names are accepted, the nearest to `given` first: the tail of an error message."""
    names = sorted(map(str, accepted))
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}accepted: {', '.join(names) if names else 'none'}"


def warn(text: str) -> None:
    """Say on stderr, in one line, what went another way than asked."""
    print(f"fastflow: {' '.join(text.split())}", file=sys.stderr, flush=True)
