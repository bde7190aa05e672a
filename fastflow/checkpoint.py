"""Training checkpoints, complete or not there at all.

A checkpoint is a folder `checkpoints/step_00001000` written by torch.distributed.checkpoint under
a temporary name and renamed when everything is on disk, with `meta.json` (progress, callbacks,
sizes and SHA-256 of the files, and its own). The file `checkpoints/latest` names the newest one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fastflow.callback import Callback
from fastflow.errors import CheckpointError
from fastflow.method import Target
from fastflow.state import TrainState
from fastflow.weights import require_names

FOLDER = "checkpoints"
META = "meta.json"
LATEST = "latest"

# What torch.distributed.checkpoint raises for files and tensors it cannot handle.
_DCP_ERRORS = (OSError, RuntimeError, ValueError, KeyError)


def save(state: TrainState, callbacks: Sequence[Callback], scaler: torch.amp.GradScaler) -> Path:
    """Write a checkpoint of this moment and make it the latest; returns its folder.

    Every process must call it, after at least one step.

    Raises:
        CheckpointError: the disk refused; earlier checkpoints are left as they were.
    """
    assert state.step > 0, "before the first step there is nothing to save"
    world, root = state.world, state.run_dir / FOLDER
    final = root / f"step_{state.step:08d}"
    before = world.on_main(lambda: latest(state.run_dir))
    if before == final:
        return final
    partial = root / f".partial_{final.name}"
    tensors = _tensors(state)
    try:
        world.on_main(lambda: _make_room(root))
        with _dcp():
            dcp.save(tensors, checkpoint_id=partial, no_dist=world.size == 1)
        meta = _meta(state, tensors, callbacks, scaler)
        world.on_main(lambda: _finish(partial, final, meta))
    except _DCP_ERRORS as error:
        world.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise CheckpointError(
            f"the checkpoint at step {state.step} was not written to {root}: {_reason(error)}; "
            f"the last good one is {before or 'none'}"
        ) from error
    return final


def restore(
    folder: Path,
    state: TrainState,
    callbacks: Sequence[Callback],
    scaler: torch.amp.GradScaler,
) -> None:
    """Continue from a checkpoint; every process must call it.

    Raises:
        CheckpointError: it is incomplete, altered, or of another model.
    """
    meta = state.world.on_main(lambda: _verified(folder))
    tensors = _tensors(state)
    require_names(folder, meta["student"], tensors["student"])
    # A parameter that never had a gradient has no state, which a fresh optimizer would give it.
    optimizer = tensors["optimizer"]
    optimizer["state"] = {n: s for n, s in optimizer["state"].items() if n in meta["optimized"]}
    _load(tensors, folder, one_process=state.world.size == 1)
    student = state.networks.student
    set_model_state_dict(student, tensors["student"])
    set_optimizer_state_dict(
        student, state.optimizer, optimizer, options=StateDictOptions(strict=False)
    )
    for name, weights in tensors["targets"].items():
        set_model_state_dict(state.networks[name], weights)
    for name, weights in tensors["emas"].items():
        state.emas[name].load_state_dict(weights)
    state.step = meta["step"]
    state.seconds = meta["seconds"]
    scaler.load_state_dict(meta["scaler"])
    for key, callback in _named(callbacks):
        if key in meta["callbacks"]:
            callback.load_state_dict(meta["callbacks"][key])


def read_checkpoint_weights(
    folder: Path, name: str, like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Read one set of weights ("student" or an EMA's name) out of a training checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged or of another network.
    """
    require_names(folder, _verified(folder)["student"], like)
    empty = {key: torch.empty_like(value, device="cpu") for key, value in like.items()}
    wanted = {"student": empty} if name == "student" else {"emas": {name: empty}}
    _load(wanted, folder, one_process=True)
    return empty


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None when there is none.

    Raises:
        CheckpointError: `latest` names a checkpoint that is not there.
    """
    root = run_dir / FOLDER
    pointer = root / LATEST
    complete = sorted(folder for folder in root.glob("step_*") if (folder / META).exists())
    if not pointer.exists():
        # A run that was killed between its first checkpoint and the pointer to it.
        return complete[-1] if complete else None
    name = _read_text(pointer).strip()
    if root / name not in complete:
        others = ", ".join(folder.name for folder in complete) or "none"
        raise CheckpointError(
            f"{pointer} names {name!r}, which is missing or incomplete; write the name of another "
            f"checkpoint into it (there: {others}), or remove {root} to start again"
        )
    return root / name


def prune(run_dir: Path, keep: int) -> None:
    """Remove checkpoints older than the newest `keep` up to the latest; one process calls it."""
    last = latest(run_dir)
    if last is not None:
        # Someone who went back to an earlier checkpoint still has the later ones.
        older = [folder for folder in last.parent.glob("step_*") if folder.name <= last.name]
        for folder in sorted(older)[:-keep]:
            shutil.rmtree(folder)


def read_meta(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, images, callbacks, files.

    Raises:
        CheckpointError: unreadable, or altered since it was written.
    """
    path = folder / META
    try:
        sealed = json.loads(_read_text(path))
        meta: dict[str, Any] = sealed["meta"]
        intact = sealed["sha256"] == _digest(meta)
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise _altered(path)
    return meta


def _tensors(state: TrainState) -> dict[str, Any]:
    student = state.networks.student
    companions = state.method.companions()
    targets = [name for name, spec in companions.items() if isinstance(spec, Target)]
    return {
        "student": get_model_state_dict(student),
        "optimizer": get_optimizer_state_dict(student, state.optimizer),
        "targets": {name: get_model_state_dict(state.networks[name]) for name in targets},
        "emas": {name: ema.state_dict() for name, ema in state.emas.items()},
    }


def _meta(
    state: TrainState,
    tensors: Mapping[str, Any],
    callbacks: Sequence[Callback],
    scaler: torch.amp.GradScaler,
) -> dict[str, Any]:
    return {
        "step": state.step,
        "images": state.images,
        "seconds": state.seconds,
        "hardware": state.world.hardware,
        "student": sorted(tensors["student"]),
        "optimized": sorted(tensors["optimizer"]["state"]),
        "emas": list(state.emas),
        "world_size": state.world.size,
        "torch": torch.__version__,
        "scaler": scaler.state_dict(),
        "callbacks": {key: callback.state_dict() for key, callback in _named(callbacks)},
    }


def _named(callbacks: Sequence[Callback]) -> list[tuple[str, Callback]]:
    """Callbacks by class name, numbered where a class occurs twice: stable when others go."""
    seen: dict[str, int] = {}
    named = []
    for callback in callbacks:
        kind = type(callback).__name__
        seen[kind] = seen.get(kind, 0) + 1
        named.append((f"{kind}.{seen[kind]}", callback))
    return named


def _make_room(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".partial_*"):
        shutil.rmtree(leftover)


def _finish(partial: Path, final: Path, meta: Mapping[str, Any]) -> None:
    """Turn what is on disk into a checkpoint, and then into the latest one."""
    body = {**meta, "files": _digests(partial)}
    sealed = {"sha256": _digest(body), "meta": body}
    _write_text(partial / META, json.dumps(sealed, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _write_text(final.parent / LATEST, final.name)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _verified(folder: Path) -> dict[str, Any]:
    """The meta data of a checkpoint whose files are as they were written."""
    meta = read_meta(folder)
    for name, stored in meta["files"].items():
        path = folder / name
        try:
            intact = path.stat().st_size == stored["bytes"] and _sha256(path) == stored["sha256"]
        except OSError as error:
            raise CheckpointError(
                f"{path} is missing or unreadable ({error.strerror}); {_way_back(folder)}"
            ) from error
        if not intact:
            raise _altered(path)
    return meta


def _altered(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} was truncated or altered since it was written; {_way_back(path.parent)}"
    )


def _way_back(folder: Path) -> str:
    return f"to continue from an earlier checkpoint, write its name into {folder.parent / LATEST}"


def _load(tensors: dict[str, Any], folder: Path, one_process: bool) -> None:
    """Fill tensors from a verified checkpoint."""
    try:
        with _dcp():
            dcp.load(tensors, checkpoint_id=folder, no_dist=one_process)
    except _DCP_ERRORS as error:
        raise CheckpointError(f"{folder} does not fit the network: {_reason(error)}") from error


@contextmanager
def _dcp() -> Iterator[None]:
    """torch.distributed.checkpoint without its wrapper of errors and a warning for one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            yield
        except dcp.api.CheckpointException as error:
            raise next(cause for cause, _ in error.failures.values()) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
