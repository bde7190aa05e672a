"""Weights for inference: whole tensors in safetensors files, with a description of the model."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path

import torch
from torch import Tensor

from fastflow import checkpoint
from fastflow.build import build_companion
from fastflow.checkpoint import Good
from fastflow.config import build, save_yaml
from fastflow.errors import CheckpointError, ConfigError, warn
from fastflow.network import Network
from fastflow.run_dir import (
    COMPANION,
    EXPERIMENT,
    MODEL,
    STUDENT,
    WEIGHTS,
    Stored,
    read,
    read_experiment,
    stored_in,
)
from fastflow.state import TrainState
from fastflow.weights import gathered, write_weights

EXPORTED = "exported"


def export(state: TrainState, folder: Path | None = None, weights: str | None = None) -> None:
    """Write the weights of a run in memory; every process must call it.

    Args:
        state: the run.
        folder: where to; None is its `weights/`.
        weights: the set that is wanted; None writes all.

    Raises:
        CheckpointError: the disk refused.
    """
    folder, world = folder or state.run_dir / WEIGHTS, state.world
    sets = {name: ema.state_dict() for name, ema in state.emas.items()}
    sets[STUDENT] = state.networks.student.state_dict()
    if weights is not None:
        sets = {weights: sets[weights]}
    names = tuple(sets)
    for name in sorted(state.method.sampling_companions):
        sets[COMPANION + name] = state.networks[name].state_dict()
    stored = Stored(
        folder=folder,
        experiment=state.experiment,
        step=state.step,
        images=state.images,
        seconds=state.seconds,
        hardware=world.hardware,
        names=names,
    )
    for name, tensors in sets.items():
        whole = gathered(tensors, keep=world.is_main)
        world.on_main(functools.partial(_write, stored, name, whole))
    world.on_main(lambda: _describe(stored))


def export_checkpoint(
    source: Path, output: Path | None = None, allow: tuple[str, ...] = ()
) -> Stored:
    """Write the weights in a training checkpoint, in one process and on the CPU.

    Args:
        source: a run directory, of which it is the newest good checkpoint, or a checkpoint.
        output: a folder that does not exist or is empty; None is `exported/step_...` of the run.
        allow: packages beside fastflow's own that a saved run may name classes of.

    Returns:
        What was written.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged; the disk refused.
        ConfigError: the output is not empty.
    """
    run_dir, good = _located(source)
    experiment = read_experiment(run_dir, allow)
    folder = output or run_dir / EXPORTED / good.folder.name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already; name another folder with --output")
    inside = stored_in(good, experiment)
    with torch.device("meta"):
        network: Network = build(experiment.network, at="network")
    specs = experiment.method.companions()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    stored = dataclasses.replace(inside, folder=partial, good=None)
    for name in inside.names:
        _write(stored, name, read(inside, name, network)[1])
    for name in sorted(experiment.method.sampling_companions):
        companion = build_companion(experiment, name, specs[name], network)
        _write(stored, COMPANION + name, gathered(companion.state_dict(), keep=True))
    _describe(stored)
    partial.rename(folder)
    return dataclasses.replace(stored, folder=folder)


def _located(source: Path) -> tuple[Path, Good]:
    """The run and the checkpoint that a user means."""
    place = source.resolve()
    if place.parent.name == checkpoint.FOLDER:
        damage = checkpoint.damage_of(place)
        if damage is not None:
            raise CheckpointError(f"{damage}; export another checkpoint, or the run")
        return place.parent.parent, Good(place, checkpoint.read_meta(place))
    if not (source / EXPERIMENT).exists():
        raise CheckpointError(
            f"{source} is neither a run directory (with {EXPERIMENT}) nor a checkpoint of one"
        )
    good = checkpoint.find_good(source)
    if good is None:
        raise CheckpointError(f"{source} holds no checkpoint")
    if good.remarks:
        warn(f"{'; '.join(good.remarks)}: using {good.folder}")
    return source, good


def _write(stored: Stored, name: str, weights: dict[str, Tensor]) -> None:
    header = {"weights": name, "step": str(stored.step), "images": str(stored.images)}
    write_weights(stored.folder / f"{name}.safetensors", weights, header)


def _describe(stored: Stored) -> None:
    """Write the description, without which the files before it are no model."""
    description = {
        "step": stored.step,
        "images": stored.images,
        "seconds": stored.seconds,
        "hardware": stored.hardware,
        "weights": list(stored.names),
        "experiment": stored.experiment,
    }
    save_yaml(description, stored.folder / MODEL)
