"""What a checkpoint holds of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from fastflow.callback import Callback
from fastflow.method import Target
from fastflow.state import TrainState


def tensors_of(state: TrainState) -> dict[str, Any]:
    """The tensors themselves, sharded as they are, in nested dicts by name."""
    student = state.networks.student
    companions = state.method.companions()
    targets = [name for name, spec in companions.items() if isinstance(spec, Target)]
    return {
        "student": get_model_state_dict(student),
        "optimizer": get_optimizer_state_dict(student, state.optimizer),
        "targets": {name: get_model_state_dict(state.networks[name]) for name in targets},
        "emas": {name: ema.state_dict() for name, ema in state.emas.items()},
    }


def meta_of(
    state: TrainState,
    tensors: Mapping[str, Any],
    callbacks: Sequence[Callback],
    scaler: torch.amp.GradScaler,
) -> dict[str, Any]:
    """Everything else, as a copy in JSON values."""
    meta = {
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
        "callbacks": {key: callback.state_dict() for key, callback in named(callbacks)},
    }
    copied: dict[str, Any] = json.loads(json.dumps(meta))
    return copied


def named(callbacks: Sequence[Callback]) -> list[tuple[str, Callback]]:
    """Callbacks by class name, numbered where a class occurs twice: stable when others go."""
    seen: dict[str, int] = {}
    found = []
    for callback in callbacks:
        kind = type(callback).__name__
        seen[kind] = seen.get(kind, 0) + 1
        found.append((f"{kind}.{seen[kind]}", callback))
    return found
