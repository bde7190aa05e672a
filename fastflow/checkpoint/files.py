"""Checkpoints on disk: complete or not there at all, sealed, found again, removed when old.

checkpoints/
    step_00001000/          what torch.distributed.checkpoint wrote, and meta.json: progress,
                            callbacks, sizes and SHA-256 of the files, and of itself
    latest                  the name of the newest
    .partial_step_.../      one that is being written, or was when the process died
    damaged_step_.../       one that a run found damaged when it went on from another
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastflow.distributed import World
from fastflow.errors import CheckpointError

FOLDER = "checkpoints"
META = "meta.json"
LATEST = "latest"
_STEP = re.compile(r"step_\d{8,}")
_PARTIAL = ".partial_"
_DAMAGED = "damaged_"

Digests = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay when one has been written.

    Attributes:
        newest: so many of the newest.
        every: those of steps divisible by this, for ever; None keeps no others.
    """

    newest: int
    every: int | None = None


@dataclasses.dataclass(frozen=True)
class Good:
    """The checkpoint to continue from.

    Attributes:
        folder: where it is.
        meta: what it says of itself.
        damaged: those that would have come before it, but are damaged.
        remarks: what is wrong with them, and with `latest`.
    """

    folder: Path
    meta: dict[str, Any]
    damaged: tuple[Path, ...] = ()
    remarks: tuple[str, ...] = ()


def name_of(step: int) -> str:
    """The folder of the checkpoint at a step."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step whose checkpoint a folder is by its name."""
    return int(folder.name.removeprefix("step_"))


def latest(run_dir: Path) -> Path | None:
    """The checkpoint that a run would continue from, not verified, or None if there is none.

    Raises:
        CheckpointError: there is none, but there was.
    """
    return next(iter(_candidates(run_dir)[0]), None)


def find_good(run_dir: Path, world: World | None = None) -> Good | None:
    """The checkpoint that `latest` names or, where that is damaged or gone, the newest good one.

    Args:
        run_dir: the run.
        world: processes that divide the reading among them; every one must call it.

    Returns:
        None where nothing was saved yet.

    Raises:
        CheckpointError: there are checkpoints and none is good; or there were some.
    """
    world = world or World()
    candidates, remark = world.on_main(lambda: _candidates(run_dir))
    damage: dict[Path, str] = {}
    for folder in candidates:
        found = world.on_all(functools.partial(damage_of, folder, world.rank, world.size))
        first = next((text for text in found if text is not None), None)
        if first is None:
            meta = world.on_main(functools.partial(read_meta, folder))
            remarks = (*damage.values(), *([remark] if remark else []))
            return Good(folder, meta, tuple(damage), remarks)
        damage[folder] = first
    if damage:
        raise CheckpointError(
            f"no checkpoint of {run_dir} is good: {'; '.join(damage.values())}; put back what "
            f"was there, or remove {run_dir / FOLDER} to start again"
        )
    return None


def damage_of(folder: Path, rank: int = 0, size: int = 1) -> str | None:
    """What is wrong with this process's share of a checkpoint's files; None if nothing."""
    try:
        meta = read_meta(folder)
    except CheckpointError as error:
        return str(error)
    if folder.name != name_of(meta["step"]):
        return f"{folder} holds the checkpoint of step {meta['step']}"
    for name in sorted(meta["files"])[rank::size]:
        path = folder / name
        try:
            intact = digest_of(path) == meta["files"][name]
        except OSError as error:
            return f"{path} is missing or unreadable ({error.strerror})"
        if not intact:
            return _altered(path)
    return None


def read_meta(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, images, callbacks, files.

    Raises:
        CheckpointError: missing, unreadable, or altered since it was written.
    """
    path = folder / META
    try:
        text = path.read_text()
        meta: dict[str, Any] = json.loads(text)["meta"]
        intact = text == _sealed(meta)
    except OSError as error:
        raise CheckpointError(f"{path} is missing or unreadable ({error.strerror})") from error
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CheckpointError(_altered(path))
    return meta


def digest_of(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def begin(root: Path, step: int) -> Path:
    """Make room for a checkpoint; returns the folder to write it into.

    Raises:
        OSError: the disk has not the room that the last one takes.
    """
    if not root.exists():
        root.mkdir(parents=True)
        _sync(root.parent)
    abandon(root)
    for last in _complete(root)[-1:]:
        needed = sum(file.stat().st_size for file in last.iterdir())
        free = shutil.disk_usage(root).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: {last.name} takes {needed / 1e6:,.1f} MB, and "
                f"{free / 1e6:,.1f} MB are free",
            )
    partial = root / f"{_PARTIAL}{name_of(step)}"
    partial.mkdir()
    return partial


def finish(partial: Path, meta: Mapping[str, Any], digests: Digests) -> Path:
    """Turn what `begin` began into a checkpoint, and then into the latest one.

    Args:
        partial: what `begin` returned, with all other files complete and on the disk.
        meta: JSON values, as JSON gives them back.
        digests: of the files, by name.

    Raises:
        OSError: the disk refused.
    """
    root, final = partial.parent, partial.with_name(name_of(meta["step"]))
    write_text(partial / META, _sealed({**meta, "files": digests}))
    if final.exists():  # of a run that went back to an earlier one, and comes here again
        _remove(final)
    partial.rename(final)
    _sync(root)
    write_text(root / LATEST, final.name)
    return final


def abandon(root: Path) -> None:
    """Remove what was begun and not finished, as far as the disk lets us."""
    for leftover in root.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def prune(last: Path, keep: Keep) -> None:
    """Remove old checkpoints up to the last one; later ones are of someone who went back."""
    upto = [folder for folder in _complete(last.parent) if step_of(folder) <= step_of(last)]
    for folder in upto[: -keep.newest]:
        if keep.every is None or step_of(folder) % keep.every:
            _remove(folder)


def set_aside(good: Good) -> list[Path]:
    """Move damaged checkpoints out of the way of new ones, and make the good one the latest.

    Returns:
        Where the damaged ones are now.

    Raises:
        OSError: the disk refused.
    """
    moved = [_free_name(folder.with_name(f"{_DAMAGED}{folder.name}")) for folder in good.damaged]
    for folder, target in zip(good.damaged, moved, strict=True):
        folder.rename(target)
    write_text(good.folder.with_name(LATEST), good.folder.name)
    return moved


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all, also after a power failure."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync(path.parent)


def _candidates(run_dir: Path) -> tuple[Sequence[Path], str | None]:
    """Checkpoints in the order in which a run tries them, and what is odd about `latest`."""
    root = run_dir / FOLDER
    pointer = root / LATEST
    newest_first = sorted(_all(root), key=step_of, reverse=True)
    if not newest_first:
        if pointer.exists():
            raise CheckpointError(
                f"{pointer} names a checkpoint, but there is none; put back what was there, or "
                f"remove {root} to start again"
            )
        return [], None
    named = root / _read_pointer(pointer)
    if named not in newest_first:
        return newest_first, f"{pointer} names no checkpoint that is there"
    others = [folder for folder in newest_first if folder != named]
    newer = [folder.name for folder in others if step_of(folder) > step_of(named)]
    remark = f"{pointer} names {named.name}, though there is {newer[0]}" if newer else None
    return [named, *others], remark


def _all(root: Path) -> list[Path]:
    return [folder for folder in root.glob("step_*") if _STEP.fullmatch(folder.name)]


def _complete(root: Path) -> list[Path]:
    """All but those that have lost their meta data, oldest first."""
    return sorted((folder for folder in _all(root) if (folder / META).exists()), key=step_of)


def _free_name(path: Path) -> Path:
    more = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], more) if not name.exists())


def _read_pointer(pointer: Path) -> str:
    """What `latest` says; nothing where it is missing or not even text."""
    try:
        return pointer.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _remove(folder: Path) -> None:
    """Remove a checkpoint: first as a checkpoint, so that none is ever there in part."""
    doomed = folder.with_name(f"{_PARTIAL}old_{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # what is in use now goes another time


def _sync(folder: Path) -> None:
    """Have a folder's entries on the disk, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _sealed(meta: Mapping[str, Any]) -> str:
    """The text of meta.json, which holds its own SHA-256."""
    digest = hashlib.sha256(json.dumps(meta).encode()).hexdigest()
    return json.dumps({"sha256": digest, "meta": meta}, indent=1)


def _altered(path: Path) -> str:
    return f"{path} was truncated or altered since it was written"
