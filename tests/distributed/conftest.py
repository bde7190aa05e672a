"""Two and four processes that all tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from processes import Processes


@pytest.fixture(scope="session")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def four() -> Iterator[Processes]:
    processes = Processes(4)
    yield processes
    processes.close()
