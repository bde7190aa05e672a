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
from fastflow.checkpoint import Keep, Saver
from fastflow.data.batch import Batch
from fastflow.distributed import World
from fastflow.ema import lerp_
from fastflow.errors import CheckpointError
from fastflow.experiment import Experiment
from fastflow.export import export
from fastflow.lock import RunLock
from fastflow.method import Loss, Target
from fastflow.peers import answered
from fastflow.rng import seed_step
from fastflow.state import TrainState


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
        ConfigError: the experiment cannot work, or the directory holds another one or is in use.
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
            saver=self,
        )
        self._saver = Saver(self.state, self.callbacks, self.scaler)
        self._lock = RunLock(run_dir)
        self._started = time.perf_counter()
        self.peak_lr = [float(group["lr"]) for group in self.state.optimizer.param_groups]
        for callback in self.callbacks:
            callback.setup(self.state)
        self.world.on_main(lambda: run_directory.claim(run_dir, self._lock))
        self.resumed_from = checkpoint.resume(self.state, self.callbacks, self.scaler)
        self.world.on_main(lambda: run_directory.describe(run_dir, experiment))

    def fit(self) -> TrainState:
        """Train until the configured number of steps is done, or until asked to stop.

        SIGINT and SIGTERM let the step finish; `state.stop` then names the signal. Either way
        the last step is saved, and at the end of training the weights are exported.

        Raises:
            DivergenceError: the loss or a gradient became non-finite.
            CheckpointError: a checkpoint or the weights could not be written.
            DataError: a sample could not be read.
            LostProcessError: another process died or did not answer in time.
        """
        state, begun = self.state, self.state.step
        try:
            with (
                answered(self.world, self._position),
                self.loader.watched(),
                _stop_on_signals(state),
                self._saver,  # whatever ends training waits for a checkpoint that is being written
            ):
                for callback in self.callbacks:
                    callback.on_start(state)
                batches = self.loader.batches(state.step)
                self._started = time.perf_counter() - state.seconds
                while state.step < self.experiment.steps and state.stop is None:
                    self._step(next(batches))
                    self._agree()
                for driver in self.drivers:
                    driver.on_end(state)
                if state.step > begun:
                    self.save()
                    self._saver.wait()
                for observer in self.observers:
                    observer.on_end(state)
                if state.step == self.experiment.steps:
                    export(state)
                self._agree()  # so that all go on to another run, or none
        finally:
            self._lock.release()
        return state

    def save(self, keep: Keep | None = None) -> None:
        """Begin to write a checkpoint of this moment; every process must call it.

        Args:
            keep: which older ones stay once it is complete; None leaves all.

        Raises:
            CheckpointError: the one before could not be written.
        """
        for driver in self.drivers:
            driver.before_save(self.state)
        self._saver.save(keep)

    def last_saved(self) -> Path | None:
        """The last complete checkpoint, once none is being written; None if there is none."""
        return self._saver.last()

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
                distributed.reshard(target)
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
            loss = self.state.method.loss(self.state.networks, micro, self.state.now)
            self.scaler.scale(loss.per_sample.sum() / batch.size).backward()
            losses.append(_detached(loss))
        return _joined(losses)

    def _agree(self) -> None:
        """What one process has come to know, a signal say, all act on after the same step."""
        state = self.state
        # On the CPU: no step waits for the device.
        known = torch.tensor([_code(state.stop), int(self._saver.failed)])
        stop, failed = self.world.max(known).tolist()
        if failed:
            self._saver.wait()
            raise CheckpointError(
                "another process could not write its part of a checkpoint; it says why"
            )
        if stop and state.stop is None:
            state.stop = _reason(stop)

    def _position(self) -> str:
        last = self.last_saved()
        return f"after step {self.state.step:,} (last checkpoint: {last or 'none'})"


# What stands for a reason to stop that is no signal, where processes agree; signals are below.
_OTHER_REASON = 1000


def _code(stop: str | None) -> int:
    """A reason to stop as a number; 0 is none."""
    if stop is None:
        return 0
    return signal.Signals[stop] if stop in signal.Signals.__members__ else _OTHER_REASON


def _reason(code: int) -> str:
    if code == _OTHER_REASON:
        return "another process was asked to stop"
    return signal.Signals(code).name


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
    """Turn SIGINT and SIGTERM into a request to stop after the step; a second SIGINT interrupts.

    A second SIGTERM does not: schedulers send it to every process, and launchers pass it on.
    """
    previous: dict[int, Callable[..., object] | int | None] = {}
    process = os.getpid()

    def ask(number: int, frame: types.FrameType | None) -> None:
        name = signal.Signals(number).name
        again = ""
        if number == signal.SIGINT:
            signal.signal(number, previous[number] or signal.SIG_DFL)
            again = "; once more aborts"
        # Once, and not in a data worker's copy.
        if state.stop is None and state.world.is_main and os.getpid() == process:
            print(f"\n{name}: stopping after this step{again}", file=sys.stderr)
        state.stop = state.stop or name

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
