"""A real step of an experiment, counted as a rehearsed one is.

Functions of a module, so that other processes can call them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastflow.build import Parts
from fastflow.callback import Driver
from fastflow.counting import Allocations, Traffic, nbytes
from fastflow.data.batch import Batch
from fastflow.distributed import World, synchronise
from fastflow.experiment import Experiment
from fastflow.method import Networks
from fastflow.rng import Draws
from fastflow.state import TrainState


@dataclasses.dataclass(frozen=True)
class Counted:
    """As in `fastflow.rehearsal.Rehearsal`.

    Attributes:
        two: most that two micro-batches hold, the first without exchange of gradients.
        sent: bytes sent in one micro-batch, by kind.
    """

    parameters: int
    gradients: int
    optimizer: int
    emas: int
    companions: int
    working: int
    two: int
    sent: dict[str, int]


def counted(world: World, experiment: Experiment, samples: int) -> Counted:
    """Train for a step on this process, in micro-batches of so many zeros."""
    with Allocations() as memory:
        parts = Parts.of(experiment, world)
        nets = parts.networks
        state = _state(experiment, world, parts)
        parameters = list(nets.student.parameters())

        def working(*synchronised: bool) -> int:
            nets.student.zero_grad(set_to_none=True)
            before = memory.restart()
            for now in synchronised:
                synchronise(nets.student, now)
                batch = _batch(nets, samples, experiment.batch_size)
                loss = experiment.method.loss(nets, batch, state.now)
                (loss.per_sample.sum() / samples).backward()
                del loss
            return memory.peak - before

        working(True)
        two = working(False, True)
        with Traffic() as traffic:
            one = working(True)
        gradients = nbytes([p.grad for p in parameters])
        parts.optimizer.step()
    return Counted(
        parameters=nbytes([*parameters, *nets.student.buffers()]),
        gradients=gradients,
        optimizer=nbytes(list(parts.optimizer.state.values())),
        emas=nbytes([ema.state_dict() for ema in state.emas.values()]),
        companions=sum(nbytes([*n.parameters(), *n.buffers()]) for n in nets.companions.values()),
        working=one,
        two=two,
        sent=dict(traffic.sent),
    )


def _state(experiment: Experiment, world: World, parts: Parts) -> TrainState:
    state = TrainState(
        experiment=experiment,
        method=experiment.method,
        world=world,
        networks=parts.networks,
        optimizer=parts.optimizer,
        run_dir=Path(),
        step=experiment.steps // 2,
    )
    for driver in parts.callbacks:
        if isinstance(driver, Driver):
            driver.setup(state)
            driver.before_step(state)
    return state


def _batch(nets: Networks, samples: int, total: int) -> Batch:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(samples, *shape)

    widths: dict[str, Any] = {
        "cond": nets.student.cond_dim,
        "augment": nets.student.augment_dim,
    }
    rows = {name: zeros(width) if width else None for name, width in widths.items()}
    draws = Draws(0, 0, tuple(range(samples)), total=total)
    return Batch(x=zeros(*nets.student.sample_shape), draws=draws, **rows)
