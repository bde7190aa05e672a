"""Continuing from a checkpoint, and reading weights out of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fastflow.callback import Callback
from fastflow.checkpoint import engine, files
from fastflow.checkpoint.contents import named, tensors_of
from fastflow.checkpoint.files import Good
from fastflow.distributed import World
from fastflow.errors import warn
from fastflow.state import TrainState
from fastflow.weights import require_names


def resume(
    state: TrainState, callbacks: Sequence[Callback], scaler: torch.amp.GradScaler
) -> Path | None:
    """Continue from the newest good checkpoint of the run directory; every process must call it.

    It may have been written by another number of processes, sharded in another way. Damaged ones
    that it is used instead of are named on stderr and kept under another name.

    Returns:
        The checkpoint, or None where nothing was saved yet.

    Raises:
        CheckpointError: there are checkpoints, but none is good, or it is of another model.
    """
    root = state.run_dir / files.FOLDER
    state.world.on_main(lambda: files.abandon(root))  # what the killed left
    good = files.find_good(state.run_dir, state.world)
    if good is None:
        return None
    _load(good, state, callbacks, scaler)
    if good.remarks:
        state.world.on_main(lambda: _go_on_without(good))
    return good.folder


def read_weights(good: Good, name: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read one set of weights ("student" or an EMA's name) out of a training checkpoint.

    Args:
        good: the checkpoint, just verified.
        name: the set.
        like: tensors of the names, shapes and types wanted, on any device.

    Returns:
        Tensors on the CPU.

    Raises:
        CheckpointError: it is of another network.
    """
    require_names(good.folder, good.meta["student"], like)
    empty = {key: torch.empty_like(value, device="cpu") for key, value in like.items()}
    wanted = {"student": empty} if name == "student" else {"emas": {name: empty}}
    engine.read(wanted, good.folder, World())
    return empty


def _load(
    good: Good, state: TrainState, callbacks: Sequence[Callback], scaler: torch.amp.GradScaler
) -> None:
    meta, tensors = good.meta, tensors_of(state)
    require_names(good.folder, meta["student"], tensors["student"])
    # A parameter that never had a gradient has no state, which a fresh optimizer would give it.
    optimizer = tensors["optimizer"]
    optimizer["state"] = {n: s for n, s in optimizer["state"].items() if n in meta["optimized"]}
    engine.read(tensors, good.folder, state.world)
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
    for key, callback in named(callbacks):
        if key in meta["callbacks"]:
            callback.load_state_dict(meta["callbacks"][key])


def _go_on_without(good: Good) -> None:
    kept = [folder.name for folder in files.set_aside(good)]
    also = f"; kept: {', '.join(kept)}" if kept else ""
    warn(f"{'; '.join(good.remarks)}: going on from {good.folder}{also}")
