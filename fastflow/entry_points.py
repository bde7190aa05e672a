"""What installed packages offer under a group of entry points."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from fastflow.errors import ConfigError


def offered(group: str) -> list[Any]:
    """The objects that entry points of a group name, in the order of their names.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    # Of every distribution: `entry_points()` sees one of each name, which can be the old
    # fastflow.egg-info of a checkout in the working directory.
    found = {
        entry.value: entry
        for distribution in importlib.metadata.distributions()
        for entry in distribution.entry_points
        if entry.group == group
    }
    loaded = []
    for name, entry in sorted(found.items()):
        try:
            loaded.append(entry.load())
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{name} of the entry points {group!r} cannot be imported: {error}"
            ) from error
    return loaded
