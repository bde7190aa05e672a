"""Another process that died or hangs: an error that names it, not a wait for ever."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch.distributed as dist

from fastflow.errors import LostProcessError

if TYPE_CHECKING:
    from fastflow.distributed import World

# Those that still answer give up within moments of each other.
_ROLL_CALL = 10.0


@contextmanager
def answered(world: World, doing: Callable[[], str]) -> Iterator[None]:
    """Turn torch's errors of waiting for another process into one of ours.

    Args:
        world: the processes. Nothing else may use its side group when an error leaves the block.
        doing: says what is going on when that happens.

    Raises:
        LostProcessError: says what this process waited for, for how long, and for whom.
    """
    try:
        yield
    except RuntimeError as error:
        if not of_peers(error):
            raise
        raise LostProcessError(f"{doing()}: {_account(world, error)}") from error


def of_peers(error: BaseException) -> bool:
    """Whether torch raised this because another process died or did not answer.

    Gloo has no error class of its own, but its errors begin with its source file.
    """
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def _account(world: World, error: RuntimeError) -> str:
    this = f"process {world.rank} of {world.size}"
    if re.search(r"timed? ?out", str(error), re.IGNORECASE):
        told = re.search(r"(\d+) ?ms", str(error))
        seconds = float(told[1]) / 1000 if told else world.timeout
        return (
            f"{this} waited {seconds:g} s for {_missing(world)} and gave up; --timeout SECONDS "
            f"waits longer"
        )
    return f"{this} lost another one, which ended; what that one said last tells why"


def _missing(world: World) -> str:
    """Who does not answer to a roll call; process 0 alone can tell, unless it is the one."""
    if world.side is None:
        return "another one"
    limit = datetime.timedelta(seconds=min(_ROLL_CALL, world.timeout))
    try:
        dist.monitored_barrier(world.side, limit, wait_all_ranks=True)
    except RuntimeError as error:
        silent = re.search(r"Ranks? ([\d, ]+) failed", str(error))
        if silent:
            return f"process {silent[1]}, which does not answer,"
        return "another one (process 0 knows which, or is the one)"
    return "another one, which answers again"
