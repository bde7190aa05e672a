"""Batches for training: shuffled, infinite, and resumable from the step number alone."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastflow.annotations import one_line
from fastflow.data.augment import Augment
from fastflow.data.batch import Batch
from fastflow.data.dataset import Dataset
from fastflow.distributed import World
from fastflow.errors import ConfigError, DataError
from fastflow.rng import Draws, fold_in

Samples = tuple[Tensor, Tensor | None]


class Loader:
    """Divides one global stream of samples into steps, and each step among the processes.

    Sample j of step k stands at position k * batch_size + j of the stream, which is a fresh
    permutation of the dataset per epoch, drawn from (seed, epoch). Nothing else is remembered, so
    a resume needs the step alone, and the division among processes does not change the stream.

    Args:
        dataset: where samples come from.
        batch_size: samples per step over all processes.
        seed: of the order and of the batches' draws.
        world: this process.
        cond_dim: width of the one-hot class rows the network takes, 0 for no condition.
        workers: background processes for datasets that decode; 0 decodes in this process.
        augment: changes the samples, after the dataset's own flip, and labels the changes.

    Raises:
        ConfigError: the batch cannot be divided, or the classes do not fit the network.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        world: World,
        cond_dim: int,
        workers: int = 2,
        augment: Augment | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world.size:
            raise ConfigError(
                f"batch_size: {batch_size} given, accepted: a positive multiple of the "
                f"{world.size} processes (world size), as each takes an equal share"
            )
        if workers < 0:
            raise ConfigError(f"workers: {workers} given, 0 or more accepted")
        if cond_dim not in (0, dataset.num_classes):
            raise ConfigError(
                f"network.cond_dim: {cond_dim} given, but dataset {dataset.name} has "
                f"{dataset.num_classes} classes: accepted are cond_dim={dataset.num_classes}"
                + (" or cond_dim=0 for a model without classes" if dataset.num_classes else "")
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.world = world
        self.cond_dim = cond_dim
        self.workers = workers
        self.augment = augment
        share = batch_size // world.size
        self._rows = torch.arange(world.rank * share, (world.rank + 1) * share)
        # A batch touches at most one epoch's end in the usual case, hence two.
        self._order = functools.lru_cache(maxsize=2)(self._permutation)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """This process's share of each step from `start_step` on, without end.

        Raises:
            DataError: names the sample that cannot be read, or says how a background worker died.
        """
        for step, (x, labels) in enumerate(self._samples(start_step), start_step):
            yield self._batch(step, x, labels)

    def indices(self, step: int) -> Tensor:
        """Indices into the dataset of this process's share of a step, int64 [B / processes]."""
        positions = step * self.batch_size + self._rows
        epochs = positions // len(self.dataset)
        offsets = positions % len(self.dataset)
        indices = torch.empty_like(positions)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            now = epochs == epoch
            indices[now] = self._order(epoch)[offsets[now]]
        return indices

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(fold_in(self.seed, "order", epoch))
        return torch.randperm(len(self.dataset), generator=generator)

    def _samples(self, start_step: int) -> Iterator[Samples]:
        indices = map(self.indices, itertools.count(start_step))
        if self.dataset.decodes and self.workers:
            return self._prefetch(indices)
        return (_fetch(self.dataset, batch) for batch in indices)

    def _prefetch(self, indices: Iterable[Tensor]) -> Iterator[Samples]:
        """Fetch batches ahead of time in background processes, in order."""
        loader: torch.utils.data.DataLoader[Samples | DataError] = torch.utils.data.DataLoader(
            _InWorker(self.dataset),
            batch_size=None,
            sampler=(batch.tolist() for batch in indices),
            num_workers=self.workers,
            timeout=self.world.timeout,
            # Its own, or starting would advance the global generator.
            generator=torch.Generator(),
        )
        batches = iter(loader)
        while True:
            with self.watched():
                samples = next(batches)
            if isinstance(samples, DataError):
                raise samples
            yield samples

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Say of a background worker that died that it was one.

        Torch interrupts whatever the process does at that moment with a RuntimeError.

        Raises:
            DataError: a worker died, or did not answer.
        """
        try:
            yield
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            raise DataError(
                f"{self.dataset.name}: a background worker failed: {one_line(error)}"
            ) from error

    def _batch(self, step: int, x: Tensor, labels: Tensor | None) -> Batch:
        draws = Draws(self.seed, step, self._rows, self.world.device, total=self.batch_size)
        x = draws.move(x)
        if self.dataset.flip:
            mirrored = draws.uniform("flip", (1,) * (x.ndim - 1)) < 0.5
            x = torch.where(mirrored, x.flip(-1), x)
        changes = None
        if self.augment is not None:
            x, changes = self.augment(x, draws)
        cond = None
        if self.cond_dim:
            assert labels is not None, "a dataset with classes returns labels"
            cond = draws.move(torch.eye(self.cond_dim)[labels])
        return Batch(x=x, cond=cond, augment=changes, draws=draws)


def _fetch(dataset: Dataset, indices: Tensor) -> Samples:
    """A batch of samples; an error names the sample, whatever a dataset raises."""
    try:
        return dataset.fetch(indices)
    except Exception as error:
        raise _first_bad(dataset, indices) or _unreadable(dataset, "a sample", error) from error


def _first_bad(dataset: Dataset, indices: Tensor) -> DataError | None:
    """The error of the first sample that cannot be read by itself either."""
    for index in indices.tolist():
        try:
            dataset.fetch(torch.tensor([index]))
        except Exception as error:
            return _unreadable(dataset, f"sample {index}", error)
    return None


def _unreadable(dataset: Dataset, what: str, error: Exception) -> DataError:
    if isinstance(error, DataError):  # says which file
        return DataError(f"{error} ({what} of {dataset.name})")
    return DataError(
        f"{dataset.name}: {what} cannot be read: {type(error).__name__}: {one_line(error)}"
    )


class _InWorker(torch.utils.data.Dataset[Samples | DataError]):
    """Fetches a whole batch in a worker; an error travels as a value and keeps its one line."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: list[int]) -> Samples | DataError:
        try:
            return _fetch(self.dataset, torch.tensor(indices))
        except DataError as error:
            return error
