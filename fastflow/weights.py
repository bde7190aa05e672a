"""Weights for inference: safetensors files, written whole and loaded only where they fit."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastflow.distributed import full_tensor
from fastflow.errors import CheckpointError

SOURCES = (
    "an official .pkl or .pt file, the https:// address of one, a .safetensors file or a run "
    "directory"
)
"""What weights are read from, as errors name it."""


def gathered(weights: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole copies on the CPU of tensors that may be sharded; every process must call it.

    Args:
        weights: by name.
        keep: whether this process wants them; the others get none.
    """
    whole = {}
    for name, value in weights.items():
        tensor = full_tensor(value)
        if keep:
            # A copy, for tensors that share memory cannot be written to a file.
            whole[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return whole


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of whole tensors, in hexadecimal."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def write_weights(path: Path, weights: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file, all or nothing.

    Raises:
        CheckpointError: the disk refused.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, partial, header)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"weights were not written to {path}: {error}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: it is missing or not a safetensors file.
    """
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise CheckpointError(f"weights {path} do not exist; give {SOURCES}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}); get it again, or give a run "
            f"directory"
        ) from error


def read_header(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself, e.g. which weights it holds; empty for nothing.

    Raises:
        CheckpointError: as `read_weights`.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


def load_strict(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    source: object,
    may_lack: Sequence[str] = (),
) -> None:
    """Load weights into an unsharded network; every name and shape must fit.

    Args:
        network: what to load into.
        weights: by name.
        source: where they come from, for errors.
        may_lack: prefixes of names; where the weights have none of those with one prefix, the
            network keeps its own.

    Raises:
        CheckpointError: lists what is missing, unexpected or misshapen.
    """
    own = network.state_dict()
    kept = {
        name: own[name]
        for prefix in may_lack
        if not any(name.startswith(prefix) for name in weights)
        for name in own
        if name.startswith(prefix)
    }
    require_fit({**kept, **weights}, own, source)
    network.load_state_dict({**kept, **weights})


def require_fit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], source: object) -> None:
    """Raise CheckpointError unless weights have the names and shapes of a network's own."""
    require_names(source, weights, own)
    wrong = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if weights[name].shape != own[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{source} does not fit the network; misshapen: {_some(wrong)}")


def require_names(source: object, given: Collection[str], wanted: Collection[str]) -> None:
    """Raise CheckpointError unless the names given are those of the network."""
    missing = sorted(set(wanted) - set(given))
    unexpected = sorted(set(given) - set(wanted))
    problems = [f"missing: {_some(missing)}"] if missing else []
    problems += [f"unexpected: {_some(unexpected)}"] if unexpected else []
    if problems:
        raise CheckpointError(
            f"{source} does not fit the network; {'; '.join(problems)}. Give weights of this "
            f"network, or the network that these weights are of"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
