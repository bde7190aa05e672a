"""What callbacks see of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fastflow.distributed import World
from fastflow.ema import EMA
from fastflow.experiment import Experiment
from fastflow.method import FlowMapMethod, Loss, Networks
from fastflow.progress import Progress

if TYPE_CHECKING:
    from fastflow.checkpoint import Keep


class Saver(Protocol):
    """What writes a run's checkpoints: the trainer."""

    def save(self, keep: Keep | None = None) -> None: ...

    def last_saved(self) -> Path | None: ...


@dataclasses.dataclass
class TrainState:
    """A run in memory.

    Attributes:
        experiment: its resolved description.
        method: the method being trained.
        world: rank, number of processes, device.
        networks: student and companions.
        emas: evaluation EMAs by name, filled by EMA callbacks in `setup`.
        optimizer: over the student's parameters.
        run_dir: where everything is written; rank 0 writes, unless said otherwise.
        step: optimizer steps finished.
        seconds: wall time of training so far, earlier runs that this one continues included.
        curriculum: values the drivers wrote for the current step.
        loss: the local losses of the last step, detached: per_sample [B_local], times [B_local].
        metrics: scalars of the last step by name: tensors on the device (read them only where
            they are logged: reading waits for the device) or plain numbers.
        stop: the reason why the run was asked to stop after this step, or None.
        saver: writes checkpoints; set by the trainer.
    """

    experiment: Experiment
    method: FlowMapMethod
    world: World
    networks: Networks
    optimizer: torch.optim.Optimizer
    run_dir: Path
    emas: dict[str, EMA] = dataclasses.field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    curriculum: dict[str, float] = dataclasses.field(default_factory=dict)
    loss: Loss | None = None
    metrics: dict[str, Tensor | float] = dataclasses.field(default_factory=dict)
    stop: str | None = None
    saver: Saver | None = None

    def save_checkpoint(self, keep: Keep | None = None) -> None:
        """Begin to write a checkpoint of this moment; every process must call it.

        Args:
            keep: which older ones stay once it is complete; None leaves all.

        Raises:
            CheckpointError: the one before could not be written.
        """
        assert self.saver is not None, "the trainer sets the saver"
        self.saver.save(keep)

    def last_checkpoint(self) -> Path | None:
        """The last complete checkpoint, once none is being written; None if there is none."""
        assert self.saver is not None, "the trainer sets the saver"
        return self.saver.last_saved()

    @property
    def images(self) -> int:
        """Training images seen."""
        return self.step * self.experiment.batch_size

    @property
    def now(self) -> Progress:
        """This moment, as methods and schedules see it."""
        return Progress(
            step=self.step,
            images=self.images,
            total_steps=self.experiment.steps,
            batch_size=self.experiment.batch_size,
            curriculum=dict(self.curriculum),
        )
