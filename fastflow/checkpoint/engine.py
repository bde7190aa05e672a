"""torch.distributed.checkpoint, with errors that say what happened."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fastflow.distributed import World
from fastflow.errors import CheckpointError
from fastflow.peers import of_peers

# What torch.distributed.checkpoint raises for files and tensors it cannot handle.
FAILURES = (OSError, RuntimeError, ValueError, KeyError)


def write(tensors: dict[str, Any], folder: Path, world: World) -> list[Path]:
    """Write tensors into a folder, each process its own; every process must call it.

    Returns:
        The files that this process wrote; they are on the disk.

    Raises:
        One of `FAILURES`, on every process.
    """
    with _plain_errors():
        dcp.save(
            tensors,
            storage_writer=_Writer(folder),
            process_group=world.group,
            no_dist=world.size == 1,
        )
    own = list(folder.glob(f"__{world.rank}_*"))
    return [*own, folder / ".metadata"] if world.is_main else own


def read(tensors: dict[str, Any], folder: Path, world: World) -> None:
    """Fill tensors, sharded in whatever way, from a folder; every process must call it.

    Raises:
        CheckpointError: it holds other tensors.
    """
    try:
        with _plain_errors():
            dcp.load(tensors, checkpoint_id=folder, no_dist=world.size == 1)
    except FAILURES as error:
        if of_peers(error):
            raise
        raise CheckpointError(f"{folder} does not fit the network: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class _Writer(dcp.FileSystemWriter):
    """Tells of a full disk as such, where torch tells of a position in its archive."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Without torch's wrapper of errors, and without its warning for one process."""
    # For good: `warnings.catch_warnings` is not for threads.
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    try:
        yield
    except dcp.api.CheckpointException as error:
        raise next(cause for cause, _ in error.failures.values()) from error
