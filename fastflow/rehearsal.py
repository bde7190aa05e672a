"""A training step on tensors without memory, which counts what a real one holds.

Networks, method, optimizer and sharding are those of the experiment, and run for one process of as
many as asked; tensors are torch's fake ones, and collectives go nowhere. Neither data nor weights
are needed. What only numbers decide (times, choices of rows) is drawn for real.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map

from fastflow import distributed
from fastflow.build import build_callbacks, build_network
from fastflow.callback import Driver
from fastflow.config import build
from fastflow.counting import Allocations, local, nbytes
from fastflow.data.batch import Batch
from fastflow.distributed import World
from fastflow.errors import ConfigError
from fastflow.experiment import Experiment
from fastflow.method import Companion, Frozen, Networks
from fastflow.network import Network
from fastflow.rng import Draws
from fastflow.state import TrainState

_REFUSED = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Bytes that one process holds in a training step.

    Attributes:
        parameters: of the student, its buffers included.
        gradients: of the student between backward pass and update.
        optimizer: state of the optimizer.
        emas: evaluation EMAs.
        companions: frozen networks and targets.
        measured: by size of the micro-batch, most that its forward and backward pass hold beside
            parameters, optimizer, EMAs and companions: activations, gathered and cast weights,
            gradients as they come.
        accumulated: gradients held between micro-batches, whole on every process.
        update: most that the optimizer's step holds beside all that stays.
        units: blocks that can be checkpointed.
    """

    parameters: int
    gradients: int
    optimizer: int
    emas: int
    companions: int
    measured: Mapping[int, int]
    accumulated: int
    update: int
    units: int

    @property
    def lasting(self) -> int:
        """What is there at all times."""
        return self.parameters + self.optimizer + self.emas + self.companions

    def working(self, samples: int) -> int:
        """As `measured`, by straight lines between the sizes, and beyond them.

        The true curve bends upwards (a few samples hold less than the gradients that follow), so
        that between two sizes this is rather too much.
        """
        sizes = sorted(self.measured)
        if len(sizes) == 1:
            return self.measured[sizes[0]]
        after = next((n for n in range(1, len(sizes) - 1) if samples <= sizes[n]), len(sizes) - 1)
        low, high = sizes[after - 1], sizes[after]
        slope = (self.measured[high] - self.measured[low]) / (high - low)
        return self.measured[low] + round(slope * (samples - low))


def rehearse(
    experiment: Experiment,
    processes: int,
    samples: Iterable[int],
    *watching: contextlib.AbstractContextManager[Any],
) -> Rehearsal:
    """Run a step of an experiment for the first of some processes.

    Args:
        experiment: its `parallel` says how the weights are divided; its micro-batch does not count.
        processes: their number.
        samples: sizes of the micro-batch of this process, one after the other.
        watching: entered around forward and backward pass of the last, say a
            `fastflow.counting.Traffic`.

    Raises:
        ConfigError: the experiment cannot work, this process is one of several, or a network or
            an optimizer reads numbers from tensors.
    """
    if dist.is_initialized():
        raise ConfigError(
            "a step without memory cannot be run among several processes; start one, without "
            "torchrun"
        )
    if processes > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        with Allocations() as memory:
            return _Step(experiment, processes, memory).run(tuple(samples), watching)
    except _REFUSED as error:
        raise ConfigError(
            f"{experiment.name}: its step cannot be run without numbers, which "
            f"{error.func} reads from a tensor in a network or the optimizer; measure a real step"
        ) from error
    finally:
        if processes > 1:
            dist.destroy_process_group()


class _Step:
    """The networks of an experiment with their optimizer and EMAs, on fake tensors."""

    def __init__(self, experiment: Experiment, processes: int, memory: Allocations) -> None:
        self.experiment, self.memory = experiment, memory
        self.world = World(size=processes)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.student = self._network("network", None)
        companions = {
            name: self._network(name, spec) for name, spec in experiment.method.companions().items()
        }
        self.networks = Networks(self.student, companions)
        experiment.method.check(self.networks)
        # Of shards, which it treats as it does whole tensors, but in a tenth of the time here.
        self.shards = [nn.Parameter(local(p.detach())) for p in self.student.parameters()]
        self.optimizer: torch.optim.Optimizer = build(
            experiment.optimizer, at="optimizer", params=self.shards
        )
        for group in self.optimizer.param_groups:  # as torch chooses on GPUs
            if group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True
        self.state = TrainState(
            experiment=experiment,
            method=experiment.method,
            world=self.world,
            networks=self.networks,
            optimizer=self.optimizer,
            run_dir=Path(),
            step=experiment.steps // 2,
        )
        for driver in build_callbacks(experiment):
            if isinstance(driver, Driver):
                driver.setup(self.state)
                driver.before_step(self.state)

    def run(
        self,
        samples: Sequence[int],
        watching: Sequence[contextlib.AbstractContextManager[Any]],
    ) -> Rehearsal:
        measured = {size: self._working(size, ()) for size in samples[:-1]}
        measured[samples[-1]] = self._working(samples[-1], watching)
        parameters = list(self.student.parameters())
        for shard, parameter in zip(self.shards, parameters, strict=True):
            shard.grad = None if parameter.grad is None else local(parameter.grad)
        self.memory.restart()
        self.optimizer.step()
        whole = sum(p.numel() * p.element_size() for p in parameters)
        gradients = nbytes([p.grad for p in self.shards])
        return Rehearsal(
            parameters=_held(self.student),
            gradients=gradients,
            optimizer=nbytes(list(self.optimizer.state.values())),
            emas=nbytes([ema.state_dict() for ema in self.state.emas.values()]),
            companions=sum(map(_held, self.networks.companions.values())),
            measured=measured,
            accumulated=gradients if self.world.size == 1 else whole,
            update=self.memory.peak - self.memory.now,
            units=len(self.student.shard_units()),
        )

    def _working(
        self, samples: int, watching: Sequence[contextlib.AbstractContextManager[Any]]
    ) -> int:
        """Most bytes that a forward and a backward pass hold beside what is there before."""
        self.student.zero_grad(set_to_none=True)
        before = self.memory.restart()
        with contextlib.ExitStack() as stack:
            for watch in watching:
                stack.enter_context(watch)
            batch = self._batch(samples)
            loss = self.experiment.method.loss(self.networks, batch, self.state.now)
            with self.fake:
                (loss.per_sample.sum() / samples).backward()
        return self.memory.peak - before

    def _batch(self, samples: int) -> Batch:
        student = self.student
        total = self.experiment.batch_size
        with self.fake:
            cond = torch.zeros(samples, student.cond_dim) if student.cond_dim else None
            augment = torch.zeros(samples, student.augment_dim) if student.augment_dim else None
            return Batch(
                x=torch.zeros(samples, *student.sample_shape),
                cond=cond,
                augment=augment,
                draws=Draws(0, 0, tuple(range(samples)), total=total),
            )

    def _network(self, name: str, spec: Companion | None) -> Network:
        """The student, or a companion, as the trainer has it but for its weights."""
        experiment, parallel = self.experiment, self.experiment.parallel
        frozen = spec if isinstance(spec, Frozen) else None
        node = (frozen and frozen.network) or experiment.network
        network = build_network(experiment, name, node, empty=True)
        network.train(frozen is None or frozen.dropout).requires_grad_(spec is None)
        for module in (network, *network.shard_units()):
            module.forward = _with_types_of_gpus(module.forward)
        distributed.prepare(
            network,
            self.world.device,
            recompute=parallel.checkpoint and spec is None,
            narrow=experiment.narrow,
        )
        size, shard = self.world.size, parallel.shard
        distributed.require_divisor(shard, size)
        if size > 1:
            distributed.distribute(network, "cpu", size // shard, shard, experiment.narrow)
        with self.fake:
            network.to_empty(device="cpu")
        return _faking(network, self.fake)


def _faking(network: Network, fake: FakeTensorMode) -> Network:
    """The network, every call of which makes its tensors without memory."""

    def enter(*_: object) -> None:
        fake.__enter__()

    def leave(*_: object) -> None:
        fake.__exit__(None, None, None)

    network.register_forward_pre_hook(enter, prepend=True)  # before weights are gathered
    network.register_forward_hook(leave, always_call=True)
    logvar = network.logvar

    def faked(t: Tensor) -> Tensor:
        with fake:
            return logvar(t)

    network.logvar = faked  # type: ignore[method-assign]
    return network


def _held(network: Network) -> int:
    return nbytes([list(network.parameters()), list(network.buffers())])


# Functions that autocast computes in float32 on GPUs, but not on CPUs.
WIDE = frozenset(
    {
        *("group_norm", "layer_norm", "rms_norm", "softmax", "log_softmax", "interpolate"),
        *("exp", "log", "pow", "rsqrt", "reciprocal", "sum", "cumsum", "vector_norm"),
    }
)


def _with_types_of_gpus(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` in a mode of its own, for recomputation is out of reach of one around all."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _AutocastOfGPUs():
            return forward(*args, **kwargs)

    return run


class _AutocastOfGPUs(TorchFunctionMode):
    """Autocast of CPU tensors with the types that it gives on GPUs."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in WIDE and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_widened, (args, dict(kwargs)))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value
