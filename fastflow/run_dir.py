"""What lies in a run directory: the resolved experiment, checkpoints, weights for inference.

runs/cm_digits/
    experiment.yaml     the resolved experiment; can be trained from again
    checkpoints/        training state (fastflow/checkpoint)
    weights/            one .safetensors for the student and for each EMA, and model.yaml
    exported/           the same of checkpoints, where asked for (fastflow/export.py)
    log.jsonl, samples/, results.json ...   written by callbacks and by evaluation
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastflow import checkpoint
from fastflow.callback import Driver
from fastflow.checkpoint import Good
from fastflow.config import (
    Lazy,
    build,
    diff,
    from_plain,
    load_yaml,
    packages_of,
    read_yaml,
    save_yaml,
)
from fastflow.errors import CheckpointError, ConfigError, one_of, warn
from fastflow.evaluation.spec import Evaluation
from fastflow.experiment import Experiment, Parallel
from fastflow.lock import LOCK, RunLock
from fastflow.network import Network
from fastflow.pretrained import Asked, convert, fetched, network_of, require_same_reading
from fastflow.weights import load_strict, read_weights

EXPERIMENT = "experiment.yaml"
WEIGHTS = "weights"
MODEL = "model.yaml"
STUDENT = "student"
COMPANION = "companion_"  # begins the file names of those that sampling needs
ELSEWHERE = "choose another directory with --run-dir"
# What is there of a run that was killed before it wrote its experiment.
_BEGINNINGS = {LOCK, f".{EXPERIMENT}.partial"}
_LOGVAR_HEAD = "logvar_head."  # what `fastflow.wrappers` call it


def check(run_dir: Path, experiment: Experiment, elsewhere: str = ELSEWHERE) -> None:
    """Make sure that a directory is free, or holds a run of this experiment; nothing is written.

    What does not change the weights may differ: observers, evaluation, expected results, how the
    batch is divided, and how the runs that initial weights come from are trained.

    Args:
        run_dir: the directory.
        experiment: what is to be trained there.
        elsewhere: how another directory is chosen, for errors.

    Raises:
        ConfigError: it holds something else, and the text lists what differs; or it cannot be
            used.
        CheckpointError: it holds trained weights, but nothing to continue from.
    """
    require_own(run_dir, experiment, elsewhere)
    if checkpoint.latest(run_dir) is None and (run_dir / WEIGHTS / MODEL).exists():
        raise CheckpointError(
            f"{run_dir} holds trained weights but no checkpoint to continue from; {elsewhere}, or "
            f"remove this one to train again"
        )


def require_own(run_dir: Path, experiment: Experiment, elsewhere: str = ELSEWHERE) -> None:
    """The first half of `check`: whose the directory is, whether or not a run can continue.

    Raises:
        ConfigError: as there.
    """
    stored = run_dir / EXPERIMENT
    try:
        if not stored.exists():
            if run_dir.exists() and {path.name for path in run_dir.iterdir()} - _BEGINNINGS:
                raise ConfigError(f"{run_dir} is not empty and holds no run; {elsewhere}")
            return
        before = load_yaml(stored, allow=packages_of(experiment))
    except OSError as error:
        raise _unusable(run_dir, error, elsewhere) from error
    if not isinstance(before, Experiment):
        raise ConfigError(f"{stored} describes no experiment; {elsewhere}")
    changes = differences(before, experiment)
    if changes:
        raise ConfigError(
            f"{run_dir} holds a run of another configuration ({'; '.join(changes)}); {elsewhere}, "
            f"or remove this one"
        )


def differences(a: Experiment, b: Experiment) -> list[str]:
    """What two experiments differ in that changes the weights, as lines `key: old -> new`."""
    return diff(_essence(a), _essence(b))


def steps_done(run_dir: Path, allow: tuple[str, ...] = ()) -> int:
    """How far a run has come: the step of its newest checkpoint or exported weights, or 0.

    Raises:
        CheckpointError: what is there cannot be read.
    """
    weights, newest = run_dir / WEIGHTS, checkpoint.latest(run_dir)
    exported = _exported(weights, allow).step if (weights / MODEL).exists() else 0
    if newest is None or checkpoint.step_of(newest) <= exported:
        return exported
    good = checkpoint.find_good(run_dir)
    return exported if good is None else max(exported, good.meta["step"])


def claim(run_dir: Path, lock: RunLock) -> None:
    """Make a directory that `check` accepted this process's own.

    Raises:
        ConfigError: it cannot be written, or another process trains there.
    """
    try:
        lock.acquire()
    except OSError as error:
        raise _unusable(run_dir, error) from error


def describe(run_dir: Path, experiment: Experiment) -> None:
    """Write what is trained in a directory that was claimed.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        save_yaml(experiment, run_dir / EXPERIMENT)
    except OSError as error:
        raise _unusable(run_dir, error) from error


def _unusable(run_dir: Path, error: OSError, elsewhere: str = ELSEWHERE) -> ConfigError:
    return ConfigError(f"run directory {run_dir} cannot be used: {error.strerror}; {elsewhere}")


def _essence(experiment: Experiment) -> Experiment:
    drivers = tuple(c for c in experiment.callbacks if issubclass(c.target, Driver))
    return dataclasses.replace(
        experiment,
        callbacks=drivers,
        parallel=Parallel(),
        prerequisites=(),
        expected=(),
        published={},
        evaluation=Evaluation(metrics=()),
    )


@dataclasses.dataclass(frozen=True)
class Stored:
    """A trained model on disk, before its weights are read.

    Attributes:
        folder: a run directory, or a folder of exported weights.
        experiment: what was trained.
        step, images: how far.
        seconds, hardware: what it cost: wall time of training, and where.
        names: its sets of weights, the preferred one first.
        good: the checkpoint that holds them; None for exported weights.
    """

    folder: Path
    experiment: Experiment
    step: int
    images: int
    seconds: float
    hardware: str
    names: tuple[str, ...]
    good: Good | None = None


def find(source: Path, allow: tuple[str, ...] = ()) -> Stored:
    """Look at a run directory or a folder of exported weights.

    Of a run that is not finished it is the newest good checkpoint; stderr names damaged ones.

    Raises:
        CheckpointError: there is no trained model.
        ConfigError: its description names a class outside the allowed packages.
    """
    if source.is_dir() and (source / MODEL).exists():
        return _exported(source, allow)
    if not (source / EXPERIMENT).exists():
        raise CheckpointError(
            f"{source} holds no trained model: give a run directory (with {EXPERIMENT}) or a "
            f"folder of exported weights (with {MODEL})"
        )
    newest = checkpoint.latest(source)
    if (source / WEIGHTS / MODEL).exists():
        exported = _exported(source / WEIGHTS, allow)
        if newest is None or exported.step >= checkpoint.step_of(newest):
            return exported
    good = checkpoint.find_good(source)
    if good is None:
        raise CheckpointError(f"{source} holds no checkpoint and no weights yet: train it first")
    if good.remarks:
        warn(f"{'; '.join(good.remarks)}: using {good.folder}")
    return stored_in(good, read_experiment(source, allow))


def stored_in(good: Good, experiment: Experiment) -> Stored:
    """The model in a training checkpoint."""
    meta = good.meta
    return Stored(
        folder=good.folder,
        experiment=experiment,
        step=meta["step"],
        images=meta["images"],
        seconds=meta["seconds"],
        hardware=meta["hardware"],
        names=(*meta["emas"], STUDENT),
        good=good,
    )


def read_experiment(run_dir: Path, allow: tuple[str, ...]) -> Experiment:
    """What is trained in a run directory.

    Raises:
        ConfigError: it cannot be read, or names a class outside the allowed packages.
        CheckpointError: it is no experiment.
    """
    file = run_dir / EXPERIMENT
    return _experiment(read_yaml(file), allow, file)


def _exported(folder: Path, allow: tuple[str, ...]) -> Stored:
    file = folder / MODEL
    try:
        description = read_yaml(file)
        step, images = int(description["step"]), int(description["images"])
        seconds, hardware = float(description["seconds"]), str(description["hardware"])
        names, plain = tuple(description["weights"]), description["experiment"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is no model description: {error}") from error
    experiment = _experiment(plain, allow, file)
    return Stored(folder, experiment, step, images, seconds, hardware, names)


def _experiment(plain: object, allow: tuple[str, ...], source: Path) -> Experiment:
    try:
        experiment = from_plain(plain, allow)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    if not isinstance(experiment, Experiment):
        raise CheckpointError(f"{source} describes no experiment")
    return experiment


def read(stored: Stored, name: str | None, network: nn.Module) -> tuple[str, dict[str, Tensor]]:
    """A set of weights and its name; None takes the preferred one (the first EMA).

    Raises:
        CheckpointError: no such set, or it cannot be read.
    """
    name = stored.names[0] if name is None else name
    if name not in stored.names:
        raise CheckpointError(
            f"{stored.folder} has no weights {name!r}: {one_of(name, stored.names)}"
        )
    if stored.good is None:
        return name, read_weights(stored.folder / f"{name}.safetensors")
    return name, checkpoint.read_weights(stored.good, name, network.state_dict())


def read_companion(stored: Stored, name: str) -> dict[str, Tensor] | None:
    """The exported weights of a companion, or None where there are none beside the model.

    Raises:
        CheckpointError: they cannot be read.
    """
    path = stored.folder / f"{COMPANION}{name}.safetensors"
    return read_weights(path) if path.exists() else None


def load_weights(
    network: Network, description: Lazy, source: str, allow: tuple[str, ...] = ()
) -> None:
    """Load initial weights: every name and shape must fit, up to what is new in the network.

    The network keeps its own values of `additions()` that the weights lack altogether. A
    log-variance head among the weights is left out where the network has none.

    Args:
        network: unsharded.
        description: what `network` was built from.
        source: a run directory or weights folder (its preferred weights), a .safetensors file, a
            file of another project that a converter knows (`fastflow.pretrained`), or the
            https:// address of a file, which is downloaded once.
        allow: packages beside fastflow's own that a description may name.

    Raises:
        CheckpointError: there are none, or they do not fit.
    """
    weights, of = _initial(source, description, allow)
    if not network.has_logvar:
        weights = {n: v for n, v in weights.items() if not n.startswith(_LOGVAR_HEAD)}
    load_strict(network, weights, source, network.additions())
    if of is not None:
        require_same_reading(of, description, source)


def _initial(
    source: str, description: Lazy, allow: tuple[str, ...]
) -> tuple[Mapping[str, Tensor], Lazy | None]:
    """Weights to start from, and the network they are of where that is known."""
    path = fetched(source)
    if path.is_dir():
        stored = find(path, allow)
        of = stored.experiment.network
        with torch.device("meta"):
            network: nn.Module = build(of, at="network")
        return read(stored, None, network)[1], of
    if path.suffix == ".safetensors":
        return read_weights(path), network_of(path, allow)
    converted = convert(path, Asked(target=description))
    return converted.weights, converted.network
