"""Pictures of samples while training."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fastflow.callback import Observer
from fastflow.config import build
from fastflow.data.dataset import Dataset
from fastflow.distributed import reshard
from fastflow.errors import ConfigError, MissingPackageError
from fastflow.generate import generate, step_times
from fastflow.pictures import class_columns, save_panels
from fastflow.state import TrainState


class SampleGrid(Observer):
    """Draws samples of fixed seeds into `samples/step_00001000.png`, and at the end.

    One panel per number of sampler steps: grids of images, or clouds of points beside the data.
    Intermediate times are those of the experiment's evaluation. Classes take turns, a few of
    them a column each.

    Args:
        every: steps between pictures.
        steps: numbers of sampler steps, one panel each.
        count: samples per panel; None takes 64 images, 6 of each class where classes are
            columns, or 2048 points.
        weights: the EMA that is sampled; None takes the first, or the student without EMAs.

    Raises:
        ConfigError: `every`, `steps` or `count` below 1; (when a run is set up) no EMA of that
            name, or samples that are neither images of 1 or 3 channels nor points in the plane,
            or times that do not fit the numbers of steps.
        MissingPackageError: (when a run is set up) points need matplotlib, which is not installed.
    """

    def __init__(
        self,
        every: int,
        steps: tuple[int, ...] = (1, 2, 4),
        count: int | None = None,
        weights: str | None = None,
    ) -> None:
        for name, value in (("every", every), ("count", count)):
            if value is not None and value < 1:
                raise ConfigError(f"SampleGrid.{name}: {value} given, 1 or more accepted")
        if not steps or min(steps) < 1:
            raise ConfigError(f"SampleGrid.steps: {steps} given, numbers of 1 or more accepted")
        self._every = every
        self._steps = steps
        self._count = count
        self._weights = weights
        self._times: dict[int, tuple[float, ...]] = {}
        self._data: Tensor | None = None
        self._columns: int | None = None
        self._drawn = -1

    def setup(self, state: TrainState) -> None:
        if self._weights is None:
            self._weights = next(iter(state.emas), None)
        elif self._weights not in state.emas:
            raise ConfigError(
                f"SampleGrid.weights: {self._weights!r} given, accepted: "
                f"{', '.join(state.emas) or 'None (there is no EMACallback)'}"
            )
        shape = state.networks.student.sample_shape
        images = len(shape) == 3 and shape[0] in (1, 3)
        if not images and shape != (2,):
            raise ConfigError(
                f"SampleGrid: draws images of 1 or 3 channels and points in the plane, samples "
                f"have shape {shape}; remove it from callbacks"
            )
        self._columns = class_columns(state.networks.student.cond_dim)
        if self._count is None and images:
            self._count = 6 * self._columns if self._columns else 64
        self._count = self._count or 2048
        between = state.experiment.evaluation.times
        self._times = {n: step_times(state.method, n, between.get(n)) for n in self._steps}
        if not images:
            self._data = _points(state, self._count)

    def after_step(self, state: TrainState) -> None:
        if state.step % self._every == 0:
            self._draw(state)

    def on_end(self, state: TrainState) -> None:
        if state.step != self._drawn:
            self._draw(state)

    def _draw(self, state: TrainState) -> None:
        """Every process generates, for a sharded network needs all of them; one writes."""
        self._drawn = state.step
        student = state.networks.student
        panels = {} if self._data is None else {"data": self._data}
        averaged = (
            state.emas[self._weights].swapped_into(student)
            if self._weights is not None
            else contextlib.nullcontext()
        )
        with averaged:
            for steps, times in self._times.items():
                title = f"{steps} step{'s' if steps > 1 else ''}"
                panels[title] = self._samples(state, times)
        reshard(student)
        if state.world.is_main:
            save_panels(
                panels, state.run_dir / "samples" / f"step_{state.step:08d}.png", self._columns
            )

    def _samples(self, state: TrainState, times: tuple[float, ...]) -> Tensor:
        assert self._count is not None
        student, device = state.networks.student, state.world.device
        network = state.method.for_sampling(state.networks)
        cond = None
        if student.cond_dim:
            labels = torch.arange(self._count, device=device) % student.cond_dim
            cond = torch.nn.functional.one_hot(labels, student.cond_dim).float()
        shape = student.sample_shape
        return generate(state.method, network, range(self._count), shape, times, cond, device).cpu()


def _points(state: TrainState, count: int) -> Tensor:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingPackageError("matplotlib", "SampleGrid of points", "log") from None
    dataset: Dataset = build(state.experiment.data)
    return dataset.fetch(torch.arange(min(count, len(dataset))))[0]
