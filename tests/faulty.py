"""Trainings in which something goes wrong, for processes of their own: functions of a module."""

from __future__ import annotations

import math
import time

from callbacks.checkpoint import CheckpointCallback
from fastflow.callback import Driver
from fastflow.checkpoint import engine, files
from fastflow.config import lazy
from fastflow.data.loader import Loader
from fastflow.distributed import full_tensor
from fastflow.errors import DataError, DivergenceError
from fastflow.trainer import Trainer
from tiny import drivers, everything, toy, train


def saving(every=2, **changes):
    return toy(callbacks=(*drivers(), lazy(CheckpointCallback, every=every)), **changes)


def at_step(number, act):
    """Have `act()` called in every process in the middle of a step."""
    step = Trainer._step

    def until(self, batch):
        if self.state.step == number - 1:
            act()
        step(self, batch)

    Trainer._step = until


def hang_second(rank):
    at_step(3, lambda: time.sleep(600) if rank == 1 else None)


def hang_first(rank):
    at_step(3, lambda: time.sleep(600) if rank == 0 else None)


def full_second(rank):
    """The disk of the second process refuses the second checkpoint."""
    write, calls = engine._Writer.write_data, []

    def fails(self, plan, planner):
        calls.append(plan)
        if rank == 1 and len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(self, plan, planner)

    engine._Writer.write_data = fails


def lost_second(rank):
    """The second process cannot read again what it wrote."""
    digest, calls = files.digest_of, []

    def fails(path):
        calls.append(path)
        if rank == 1 and len(calls) == 2:
            raise OSError(5, "Input/output error")
        return digest(path)

    files.digest_of = fails


def bad_sample_second(rank):
    batches = Loader.batches

    def fails(self, start_step=0):
        for number, batch in enumerate(batches(self, start_step)):
            if rank == 1 and number == 3:
                raise DataError("cats.zip: image 7.png is unreadable (sample 7 of cats)")
            yield batch

    Loader.batches = fails


class PoisonSecond(Driver):
    """Spoils one number of the second process's shards."""

    def __init__(self, step):
        self.step = step

    def before_update(self, state):
        if state.step == self.step and state.world.rank == 1:
            gradient = state.networks.student.model.first.weight.grad
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            local.view(-1)[0] = math.inf


def poisoned(world, experiment, run_dir, step):
    trainer = Trainer(experiment, run_dir, world)
    trainer.drivers.insert(0, PoisonSecond(step))
    try:
        state = trainer.fit()
    except DivergenceError as error:
        return str(error)
    return float(state.metrics["skipped_steps"])


def contents(state):
    found = {name: full_tensor(value).clone() for name, value in everything(state).items()}
    return state.step, found


def loaded(world, experiment, run_dir):
    """Everything a run would continue with."""
    trainer = Trainer(experiment, run_dir, world)
    trainer._lock.release()
    return contents(trainer.state)


def trained(world, experiment, run_dir, stop_at=None):
    state = train(experiment, run_dir, stop_at, world)
    return (*contents(state), state.metrics["loss"].item())
