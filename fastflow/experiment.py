"""The description of a run: everything that determines its result."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Literal

import torch

from fastflow.annotations import kinds
from fastflow.callback import Callback
from fastflow.config import Lazy
from fastflow.data.augment import Augment
from fastflow.data.dataset import Dataset
from fastflow.errors import ConfigError
from fastflow.evaluation.spec import Evaluation, Expected
from fastflow.generate import step_times
from fastflow.method import FlowMapMethod
from fastflow.network import Network
from fastflow.parts import Part
from fastflow.schedules import ConstantLR, LearningRate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel(Part):
    """How a global batch is divided. It changes nothing but rounding, and masks of dropout.

    Attributes:
        shard: processes that share one copy of the weights; 1 is data parallelism, the number of
            processes is full sharding, a divisor between them is hybrid.
        micro_batch: most samples a process computes at once; None takes its share in one go.
        checkpoint: recompute the activations of each block in the backward pass.
        compile: torch.compile each block of the student and its companions. The first steps take
            minutes; forward-mode differentiation runs uncompiled.
    """

    shard: int = 1
    micro_batch: int | None = None
    checkpoint: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(1, self.shard, "parallel.shard")
        _at_least(1, self.micro_batch, "parallel.micro_batch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prerequisite(Part):
    """Another run whose weights an experiment starts from: a teacher, an earlier stage.

    `init_from` or a frozen companion names the same run directory; where neither does (say, since
    an override names other weights) the run is not needed and not trained.

    Attributes:
        config: its configuration, a .py or a saved .yaml; a path from the working directory.
        run_dir: its run directory; a path from the working directory, whatever the directory of
            the run that needs it.
        overrides: `key=value` texts for its configuration.
    """

    config: str
    run_dir: str
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Part):
    """A training run, its evaluation and what the literature says it should reach.

    Attributes:
        name: short name, also of the default run directory `runs/<name>`.
        method: the method with its hyperparameters.
        network: the student, `lazy(...)`.
        data: the dataset, `lazy(...)`.
        augment: changes of the training images; their labels go to the network, which has as many
            (`augment_dim`). None trains on the data as they are, also a network with such labels.
        optimizer: `lazy(torch.optim...)` with its peak learning rate.
        lr: factor on the learning rate as a function of progress.
        batch_size: samples per optimizer step over all processes.
        steps: optimizer steps, exactly.
        callbacks: `lazy(...)`, drivers and then observers run, each in this order.
        precision: "fp32", or "bf16" or "fp16" (with a gradient scaler), in which networks then
            compute by autocast, and many processes gather the weights of blocks; the weights
            themselves, times, their embeddings, losses, gradients and EMAs stay in fp32.
        parallel: how the batch is divided.
        seed: of weights, data order, noise, times and dropout.
        init_from: weights the student starts from: a run directory, a .safetensors file, an
            official .pkl or .pt file that a converter knows, or the https:// address of a file
            (with #sha256=HEX it is checked). None starts from random weights.
        prerequisites: the runs that `fastflow train` trains first where they are not finished.
        evaluation: how the result is measured.
        expected: published results of this configuration.
        published: where this file departs from the recipe that gave those results: key (in
            words or as in the configuration) to the published setting.
    """

    name: str
    method: FlowMapMethod
    network: Lazy
    data: Lazy
    optimizer: Lazy
    batch_size: int
    steps: int
    callbacks: tuple[Lazy, ...]
    evaluation: Evaluation
    lr: LearningRate = dataclasses.field(default_factory=ConstantLR)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    parallel: Parallel = dataclasses.field(default_factory=Parallel)
    augment: Augment | None = None
    seed: int = 0
    init_from: str | None = None
    prerequisites: tuple[Prerequisite, ...] = ()
    expected: tuple[Expected, ...] = ()
    published: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise ConfigError(
                f"name: {self.name!r} given, accepted: letters, digits, '_', '.', '-' (it names "
                f"the run directory)"
            )
        _at_least(1, self.batch_size, "batch_size")
        _at_least(1, self.steps, "steps")
        _at_least(0, self.seed, "seed")
        _is_a(self.network, Network, "network")
        _is_a(self.data, Dataset, "data")
        _is_a(self.optimizer, torch.optim.Optimizer, "optimizer")
        _needs_no_closure(self.optimizer)
        for number, node in enumerate(self.callbacks):
            _is_a(node, Callback, f"callbacks.{number}")
        for steps, times in self.evaluation.times.items():
            try:
                step_times(self.method, steps, times)
            except ConfigError as error:
                raise ConfigError(f"evaluation.{error}") from error

    @property
    def narrow(self) -> torch.dtype | None:
        """The type that networks compute in where it is not that of their weights."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)

    @property
    def departures(self) -> Mapping[str, str]:
        """`published`, less the initial weights where some are given."""
        given = {"init_from"} if self.init_from is not None else set()
        return {key: text for key, text in self.published.items() if key not in given}


def _at_least(least: int, value: int | None, key: str) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{key}: {value} given, accepted: a whole number from {least} up")


def _is_a(node: Lazy, kind: type, key: str) -> None:
    if not issubclass(node.target, kind):
        raise ConfigError(
            f"{key}: {node.target.__name__} given, accepted: a {kind.__name__}, e.g. "
            f"{', '.join(kinds(kind)) or 'one of your own'}"
        )


def _needs_no_closure(node: Lazy) -> None:
    closure = inspect.signature(node.target.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"optimizer: {node.target.__name__} given, accepted: an optimizer that makes a step "
            f"without evaluating the loss again"
        )
