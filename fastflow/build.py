"""From the description of an experiment to its parts, with every check that can be made before."""

from __future__ import annotations

import dataclasses

import torch

from fastflow import distributed
from fastflow.callback import Callback, Driver
from fastflow.config import FILE_MODULE, Lazy, build, packages_of, targets_of
from fastflow.data.augment import Augment
from fastflow.data.dataset import Dataset
from fastflow.data.loader import Loader
from fastflow.distributed import World
from fastflow.errors import CheckpointError, ConfigError
from fastflow.experiment import Experiment
from fastflow.method import Companion, FlowMapMethod, Frozen, Networks
from fastflow.network import Network
from fastflow.parts import parameters
from fastflow.rng import fold_in, isolated_rng
from fastflow.run_dir import load_weights


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a trainer runs: data, networks on their device (sharded), optimizer, callbacks."""

    loader: Loader
    networks: Networks
    optimizer: torch.optim.Optimizer
    callbacks: tuple[Callback, ...]

    @classmethod
    def of(cls, experiment: Experiment, world: World) -> Parts:
        """Build an experiment's parts; nothing is written anywhere.

        Raises:
            ConfigError: parts do not fit each other, or a driver is missing.
            DataError, CheckpointError: the data or some weights are missing or do not fit.
        """
        callbacks, dataset, student = _without_weights(experiment, world)
        specs = experiment.method.companions()
        companions = {
            name: _companion(experiment, name, spec, student, empty=not world.is_main)
            for name, spec in specs.items()
        }
        networks = Networks(student.train(), companions)
        experiment.method.check(networks)

        def initialise() -> None:
            if experiment.init_from is not None:
                _load(student, experiment.network, "init_from", experiment.init_from, experiment)
            student.after_step()
            for name, spec in specs.items():
                _initialise(experiment, name, spec, companions[name], student)

        world.on_main(initialise)  # the others get their shards of it
        parallel = experiment.parallel
        for network in (student, *companions.values()):
            distributed.shard(
                network,
                world,
                parallel.shard,
                recompute=parallel.checkpoint and network is student,
                compile=parallel.compile,
                narrow=experiment.narrow,
            )
        return cls(
            loader=Loader(
                dataset,
                experiment.batch_size,
                experiment.seed,
                world,
                student.cond_dim,
                augment=experiment.augment,
            ),
            networks=networks,
            optimizer=_optimizer(experiment, student),
            callbacks=callbacks,
        )


def check(experiment: Experiment, world: World) -> None:
    """All checks of `Parts.of` but those of initial weights and companions.

    For an experiment whose weights are yet to be trained.

    Raises:
        ConfigError, DataError: as there.
    """
    _without_weights(experiment, world)


def _without_weights(
    experiment: Experiment, world: World
) -> tuple[tuple[Callback, ...], Dataset, Network]:
    """Callbacks, data and the student, with its own initial weights on the main process."""
    _check_classes(experiment)
    callbacks = build_callbacks(experiment)
    _check_world(experiment, world)
    dataset = build(experiment.data, at="data")
    student = build_network(experiment, "network", experiment.network, empty=not world.is_main)
    check_fit(experiment.method, student, dataset)
    check_augment(experiment.augment, student, dataset)
    return callbacks, dataset, student


def build_callbacks(experiment: Experiment) -> tuple[Callback, ...]:
    """The callbacks of an experiment: drivers first, then observers, each in their order.

    Raises:
        ConfigError: a curriculum value that the method needs has no driver, or a value has two.
    """
    callbacks = tuple(
        build(node, at=f"callbacks.{number}") for number, node in enumerate(experiment.callbacks)
    )
    drivers = tuple(c for c in callbacks if isinstance(c, Driver))
    observers = tuple(c for c in callbacks if not isinstance(c, Driver))
    provided = [name for driver in drivers for name in sorted(driver.provides)]
    for name in provided:
        if provided.count(name) > 1:
            raise ConfigError(
                f"callbacks: {provided.count(name)} drivers provide {name!r}, 1 accepted; remove "
                f"all but one"
            )
    for name in sorted(experiment.method.needs - set(provided)):
        raise ConfigError(
            f"callbacks: {type(experiment.method).__name__} needs the curriculum value {name!r} "
            f"and no driver provides it (provided: {', '.join(provided) or 'none'}); add "
            f"{_driver_line(name)} to callbacks"
        )
    return (*drivers, *observers)


def _driver_line(name: str) -> str:
    schedules = {"ratio": "RatioStages(q=2, kimg_per_stage=...)", "N": "SqrtDiscretization()"}
    return f"lazy(CTScheduleCallback, schedule={schedules.get(name, '...')})"


def build_network(experiment: Experiment, key: str, node: Lazy, *, empty: bool = False) -> Network:
    """A network with its initial weights, which follow from the experiment's seed alone.

    Args:
        experiment: gives the seed.
        key: where the network stands in the configuration.
        node: its description.
        empty: build it on the meta device, without weights.
    """
    device = torch.device("meta" if empty else "cpu")
    with isolated_rng(fold_in(experiment.seed, "init", key), torch.device("cpu")), device:
        network: Network = build(node, at=key)
    return network


def check_fit(method: FlowMapMethod, network: Network, dataset: Dataset) -> None:
    """Raise ConfigError unless method, network and data speak of the same thing."""
    kind = type(method).__name__
    if network.predicts != method.expects:
        raise ConfigError(
            f"network: predicts {network.predicts!r}, but {kind} expects {method.expects!r}"
        )
    if method.two_times and not network.two_times:
        raise ConfigError(f"network: takes one time, but {kind} trains a network of two times")
    if network.two_times and not method.two_times:
        raise ConfigError(f"network: takes two times, but {kind} trains a network of one time")
    if network.sample_shape != dataset.shape:
        raise ConfigError(
            f"network: made for samples {network.sample_shape}, but the data {dataset.name!r} has "
            f"{dataset.shape}"
        )


def check_augment(augment: Augment | None, network: Network, dataset: Dataset) -> None:
    """Raise ConfigError unless the images can be augmented and the network is told how."""
    if augment is None:
        return
    augment.check(dataset.shape)
    if network.augment_dim != augment.dim:
        raise ConfigError(
            f"network: augment_dim {network.augment_dim} given, accepted: {augment.dim}, the "
            f"number of labels of {type(augment).__name__}; build the network's model with "
            f"augment_dim={augment.dim}, or leave augment out"
        )


def _check_classes(experiment: Experiment) -> None:
    """Nobody could load, sample or evaluate a run with classes that only its file has."""
    for target in targets_of(experiment):
        if target.startswith(FILE_MODULE):
            raise ConfigError(
                f"{target.partition(':')[2]}: defined in the configuration file, so that a saved "
                f"run cannot name it; accepted: classes of modules that can be imported. Move it "
                f"to a file of its own and set PYTHONPATH to that folder"
            )


def _check_world(experiment: Experiment, world: World) -> None:
    if experiment.precision == "fp16" and world.device.type == "cpu":
        raise ConfigError("precision: 'fp16' given, accepted on a CPU: fp32, bf16")


def build_companion(
    experiment: Experiment, name: str, spec: Companion, student: Network
) -> Network:
    """A companion with its initial weights, without gradients.

    Raises:
        ConfigError, CheckpointError: it or its weights do not fit.
    """
    network = _companion(experiment, name, spec, student, empty=False)
    _initialise(experiment, name, spec, network, student)
    return network


def _companion(
    experiment: Experiment, name: str, spec: Companion, student: Network, *, empty: bool
) -> Network:
    """A companion before its weights are set; `empty` leaves it on the meta device."""
    if not isinstance(spec, Frozen):  # a target starts as the student and keeps its dropout
        network = build_network(experiment, "network", experiment.network, empty=True)
        return network.train().requires_grad_(False)
    network = build_network(experiment, name, spec.network or experiment.network, empty=empty)
    if network.sample_shape != student.sample_shape:
        raise ConfigError(
            f"{name}: made for samples {network.sample_shape}, but the student has "
            f"{student.sample_shape}"
        )
    return network.train(spec.dropout).requires_grad_(False)


def _initialise(
    experiment: Experiment, name: str, spec: Companion, network: Network, student: Network
) -> None:
    """Give a companion its initial weights."""
    if not isinstance(spec, Frozen):
        distributed.materialise(network, student.state_dict(), torch.device("cpu"))
        return
    if spec.weights is not None:
        description = spec.network or experiment.network
        _load(network, description, f"{name} weights", spec.weights, experiment)
    network.after_step()


def _load(
    network: Network, description: Lazy, key: str, source: str, experiment: Experiment
) -> None:
    try:
        load_weights(network, description, source, packages_of(experiment))
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error


# What torch's optimizers raise for a value out of range; they check it, but not for us.
_REFUSALS = (ValueError, TypeError, RuntimeError)


def _optimizer(experiment: Experiment, student: Network) -> torch.optim.Optimizer:
    node = experiment.optimizer
    try:
        optimizer: torch.optim.Optimizer = build(
            node, at="optimizer", params=list(student.parameters())
        )
    except ConfigError:
        raise
    except _REFUSALS as error:
        raise ConfigError(
            f"{_refused(node)} (torch.optim.{node.target.__name__}: {error})"
        ) from error
    return optimizer


def _refused(node: Lazy) -> str:
    """Which argument of an optimizer is refused: the first that cannot be used by itself."""
    for name, value in node.kwargs.items():
        try:
            node.target(params=[torch.zeros(1, 1)], **{name: value})
        except _REFUSALS:
            default = parameters(node.target)[name].default
            return f"optimizer.{name}: {value} given, accepted e.g. {default}"
    return "optimizer: these arguments do not fit each other or the network"
