"""The training loop."""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastflow import checkpoint, distributed
from fastflow import run_dir as run_directory
from fastflow.build import Parts
from fastflow.callback import Driver, Observer
from fastflow.data.batch import Batch
from fastflow.distributed import World
from fastflow.ema import lerp_
from fastflow.experiment import Experiment
from fastflow.method import Loss, Target
from fastflow.rng import seed_step
from fastflow.state import TrainState

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Trains an experiment in its run directory, continuing where an earlier run stopped.

    Everything random in a step follows from (seed, step, index in the global batch), so a run
    that is stopped and started again goes on to the bit on the same hardware and world size (on
    GPUs as far as torch's kernels repeat themselves: torch.use_deterministic_algorithms).

    Args:
        experiment: what to train.
        run_dir: where checkpoints, logs and pictures go; it must be new or belong to the same
            experiment. Nothing is written before everything has been checked.
        world: the processes and the device.

    Raises:
        ConfigError: the experiment cannot work, or the directory holds another one.
        DataError, CheckpointError: the data or some weights are missing or do not fit.
    """

    def __init__(self, experiment: Experiment, run_dir: Path, world: World | None = None) -> None:
        self.experiment = experiment
        self.world = world or World()
        self.world.on_main(lambda: run_directory.check(run_dir, experiment))
        parts = Parts.of(experiment, self.world)
        self.loader = parts.loader
        self.callbacks = parts.callbacks
        self.drivers = [c for c in parts.callbacks if isinstance(c, Driver)]
        self.observers = [c for c in parts.callbacks if isinstance(c, Observer)]
        self.scaler = torch.amp.GradScaler(
            self.world.device.type, enabled=experiment.precision == "fp16"
        )
        self.state = TrainState(
            experiment=experiment,
            method=experiment.method,
            world=self.world,
            networks=parts.networks,
            optimizer=parts.optimizer,
            run_dir=run_dir,
            saver=self.save,
        )
        self._started = time.perf_counter()
        self.peak_lr = [float(group["lr"]) for group in self.state.optimizer.param_groups]
        for callback in self.callbacks:
            callback.setup(self.state)
        self.resumed_from = self.world.on_main(lambda: checkpoint.latest(run_dir))
        if self.resumed_from is not None:
            checkpoint.restore(self.resumed_from, self.state, self.callbacks, self.scaler)
        self.world.on_main(lambda: run_directory.claim(run_dir, experiment))

    def fit(self) -> TrainState:
        """Train until the configured number of steps is done, or until asked to stop.

        SIGINT and SIGTERM let the step finish; `state.stop` then names the signal. Either way
        the last step is saved, and at the end of training the weights are exported.

        Raises:
            DivergenceError: the loss or a gradient became non-finite.
            CheckpointError: a checkpoint or the weights could not be written.
        """
        state, begun = self.state, self.state.step
        with _stop_on_signals(state):
            for callback in self.callbacks:
                callback.on_start(state)
            batches = self.loader.batches(state.step)
            self._started = time.perf_counter() - state.seconds
            while state.step < self.experiment.steps and state.stop is None:
                self._step(next(batches))
                self._agree_on_stop()
            for driver in self.drivers:
                driver.on_end(state)
            if state.step > begun:
                self.save()
            for observer in self.observers:
                observer.on_end(state)
            if state.step == self.experiment.steps:
                run_directory.export(state)
            self._agree_on_stop()  # so that all go on to another run, or none
        return state

    def save(self) -> Path:
        """Write a checkpoint of this moment; every process must call it."""
        for driver in self.drivers:
            driver.before_save(self.state)
        return checkpoint.save(self.state, self.callbacks, self.scaler)

    def _step(self, batch: Batch) -> None:
        state, student = self.state, self.state.networks.student
        seed_step(self.experiment.seed, state.step, self.world.rank)
        state.curriculum.clear()
        for driver in self.drivers:
            driver.before_step(state)
        now = state.now
        factor = self.experiment.lr(now)
        for group, peak in zip(state.optimizer.param_groups, self.peak_lr, strict=True):
            group["lr"] = peak * factor

        state.optimizer.zero_grad(set_to_none=True)
        state.loss = self._backward(batch)
        mean = self.world.mean(state.loss.per_sample.mean())
        state.metrics = {"loss": mean, "lr": self.peak_lr[0] * factor, **state.loss.metrics}
        self.scaler.unscale_(state.optimizer)
        for driver in self.drivers:
            driver.before_update(state)
        self.scaler.step(state.optimizer)
        self.scaler.update()
        student.after_step()

        state.step += 1
        state.seconds = time.perf_counter() - self._started
        for name, spec in state.method.companions().items():
            if isinstance(spec, Target):
                target = state.networks[name]
                lerp_(target.parameters(), student.parameters(), 1 - spec.decay(now))
        for driver in self.drivers:
            driver.after_update(state)
        for observer in self.observers:
            observer.after_step(state)

    def _backward(self, batch: Batch) -> Loss:
        """Add the gradient of the mean loss of the global batch; returns the detached losses."""
        size = self.experiment.parallel.micro_batch or batch.size
        micro_batches = list(batch.split(size))
        losses: list[Loss] = []
        for number, micro in enumerate(micro_batches, start=1):
            distributed.synchronise(self.state.networks.student, number == len(micro_batches))
            with self._autocast():
                loss = self.state.method.loss(self.state.networks, micro, self.state.now)
            self.scaler.scale(loss.per_sample.sum() / batch.size).backward()
            losses.append(_detached(loss))
        return _joined(losses)

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST.get(self.experiment.precision)
        return torch.autocast(self.world.device.type, dtype, enabled=dtype is not None)

    def _agree_on_stop(self) -> None:
        """A signal may reach one process only: all stop after the same step."""
        if self.world.size > 1:
            # On the CPU: no step waits for the device.
            asked = self.world.sum(torch.tensor(float(self.state.stop is not None)))
            if asked.item() and self.state.stop is None:
                self.state.stop = "another process was asked to stop"


def _detached(loss: Loss) -> Loss:
    return Loss(loss.per_sample.detach(), loss.times.detach(), dict(loss.metrics))


def _joined(losses: list[Loss]) -> Loss:
    """The losses of micro-batches as one; metrics are averaged by the number of samples."""
    if len(losses) == 1:
        return losses[0]
    per_sample = torch.cat([loss.per_sample for loss in losses])
    sizes = [loss.per_sample.numel() / per_sample.numel() for loss in losses]
    metrics: Mapping[str, Tensor] = {
        name: torch.stack(
            [loss.metrics[name] * w for loss, w in zip(losses, sizes, strict=True)]
        ).sum()
        for name in losses[0].metrics
    }
    return Loss(per_sample, torch.cat([loss.times for loss in losses]), metrics)


@contextmanager
def _stop_on_signals(state: TrainState) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a request to stop after the step; a second one interrupts."""
    previous: dict[int, Callable[..., object] | int | None] = {}
    process = os.getpid()

    def ask(number: int, frame: types.FrameType | None) -> None:
        name = signal.Signals(number).name
        state.stop = name
        signal.signal(number, previous[number] or signal.SIG_DFL)
        if state.world.is_main and os.getpid() == process:  # not in a data worker's copy
            print(f"\n{name}: stopping after this step; once more aborts", file=sys.stderr)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, ask)
    except ValueError:  # not in the main thread: signals are the caller's business
        previous.clear()
    try:
        yield
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler or signal.SIG_DFL)
