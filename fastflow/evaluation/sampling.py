"""Samples by seed: divided among processes, and kept in files, so that what stopped goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import one_hot

from fastflow.distributed import World
from fastflow.errors import ConfigError, DivergenceError, warn
from fastflow.evaluation.interface import Sampler, Samples
from fastflow.evaluation.spec import Evaluation, Labels
from fastflow.rng import fold_in

ABOUT = "about.json"
_HEADER = "fastflow_samples"


class Saved(Sampler, Protocol):
    """A trained model that does not change."""

    def fingerprint(self) -> str:
        """SHA-256 of what samples follow from beside seeds, times and classes."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be sampled.

    Attributes:
        seeds: one per sample.
        steps: sampler steps.
        between: intermediate times; None takes the model's.
        labels: how classes follow from seeds, or the class of all; see `class_labels`.
        batch_size: samples computed at once.
    """

    seeds: range
    steps: int = 1
    between: tuple[float, ...] | None = None
    labels: Labels | int = "random"
    batch_size: int = 256

    def batches(self) -> list[range]:
        """The places 0 .. n-1 of the samples of each batch."""
        everything = range(len(self.seeds))
        size = self.batch_size
        return [everything[start : start + size] for start in range(0, len(everything), size)]


def plan_of(evaluation: Evaluation, steps: int, block: int = 0) -> Plan:
    """The samples that are measured in one block of seeds."""
    first = evaluation.seed + block * evaluation.samples
    return Plan(
        seeds=range(first, first + evaluation.samples),
        steps=steps,
        between=evaluation.times.get(steps),
        labels=evaluation.labels,
        batch_size=evaluation.batch_size,
    )


def class_labels(seeds: range, classes: int, rule: Labels | int = "random") -> Tensor | None:
    """Class labels [n], each by its seed alone; None without classes.

    "random" draws them uniformly, as published FIDs do; "balanced" has the classes in turn, so
    that each is there equally often; a number is the class of all.

    Raises:
        ConfigError: there is no such class.
    """
    if isinstance(rule, int) and not 0 <= rule < classes:
        accepted = f"0 to {classes - 1}" if classes else "none (the model is unconditional)"
        raise ConfigError(f"label: {rule} given, accepted: {accepted}")
    if classes == 0:
        return None
    if rule == "random":
        return torch.tensor([fold_in(seed, "label") % classes for seed in seeds])
    if rule == "balanced":
        return torch.tensor([seed % classes for seed in seeds])
    return torch.full((len(seeds),), rule)


def require_balance(count: int, classes: int, key: str) -> None:
    """Raise ConfigError unless so many samples have each class equally often."""
    if classes and count % classes:
        raise ConfigError(
            f"{key}: {count} given, accepted for balanced labels: a multiple of {classes}, the "
            f"number of classes"
        )


def generated(
    model: Sampler, plan: Plan, world: World, kept: Kept | None = None
) -> Iterator[Samples | None]:
    """This process's batches, every size-th one; one for each turn of all processes, or None.

    A sample is computed in the same batch, bit for bit, for any number of processes.

    Args:
        model: weights and method; sharded ones only without `kept`.
        plan: which samples.
        world: every process must take all its turns.
        kept: batches found there are not computed again, the others are added.

    Raises:
        DivergenceError: a sample is not finite; on every process.
        OSError: a batch cannot be kept.
    """
    times = model.times(plan.steps, plan.between)
    batches = plan.batches()
    for turn in range(0, len(batches), world.size):
        mine = turn + world.rank
        # A sharded network computes together: who has no batch left repeats the last one.
        indices = batches[min(mine, len(batches) - 1)]
        seeds = plan.seeds[indices.start : indices.stop]
        labels = class_labels(seeds, model.cond_dim, plan.labels)
        known = kept.load(seeds) if kept is not None else None
        if known is None:
            cond = None if labels is None else one_hot(labels, model.cond_dim).float()
            rows = None if cond is None else cond.to(model.device)
            x = model.sample(seeds, plan.steps, plan.between, rows)
        else:
            x = known.to(model.device)
        _require_finite(x, seeds, plan.steps, model, world)
        if kept is not None and known is None and mine < len(batches):
            kept.save(seeds, x)
        yield Samples(x, indices, seeds, labels, times) if mine < len(batches) else None


def _require_finite(x: Tensor, seeds: range, steps: int, model: Sampler, world: World) -> None:
    """Raise DivergenceError on every process if any has a sample that is not finite."""
    finite = x.isfinite().flatten(1).all(1)
    places = torch.zeros(world.size, dtype=torch.int64)
    if not finite.all():
        places[world.rank] = 1 + seeds[int((~finite).nonzero()[0])]
    found = world.sum(places)
    if found.any():
        seed = int(found[found > 0][0]) - 1
        raise DivergenceError(
            f"the {steps}-step sample of seed {seed} has a NaN or infinite value; the weights "
            f"{model.weights_name!r} of step {model.step} are unusable"
        )


class Kept:
    """Batches of samples in a folder: seeds_00000000-00000255.safetensors and so on.

    Each file says what made it, and is used only where exactly that is asked for again. Every
    process writes its own batches.

    Args:
        folder: made when the first batch is kept.
        about: what the samples follow from beside their seeds, as JSON values.
    """

    def __init__(self, folder: Path, about: Mapping[str, object]) -> None:
        self.folder = folder
        self._about = json.dumps(about)

    @classmethod
    def below(cls, root: Path, model: Saved, plan: Plan) -> Kept:
        """In a folder of its own below `root`, whose name tells weights, step and steps."""
        about = about_of(model, plan)
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
        name = f"{model.weights_name}_step{model.step:08d}_{plan.steps}step_{digest}"
        return cls(root / name, about)

    def load(self, seeds: range) -> Tensor | None:
        """The samples [n, *shape], float32, on the CPU, of these seeds; None if not there."""
        try:
            with safe_open(self._path(seeds), framework="pt") as file:
                if (file.metadata() or {}).get(_HEADER) != self._about:
                    return None
                x: Tensor = file.get_tensor("x")
        except (OSError, SafetensorError):
            return None
        return x if len(x) == len(seeds) else None

    def save(self, seeds: range, x: Tensor) -> None:
        """Keep the samples of these seeds, whole or not at all."""
        path = self._path(seeds)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            save_file({"x": x.cpu().contiguous()}, scratch, metadata={_HEADER: self._about})
            scratch.replace(path)
        except SafetensorError as error:  # what a full disk is to safetensors
            scratch.unlink(missing_ok=True)
            raise OSError(f"samples were not written to {path}: {error}") from error

    def seal(self) -> None:
        """Have the samples stay for good, with a description for people."""
        (self.folder / ABOUT).write_text(json.dumps(json.loads(self._about), indent=1) + "\n")

    def discard(self) -> None:
        """Remove the samples, unless they are there for good."""
        if not (self.folder / ABOUT).exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, seeds: range) -> Path:
        return self.folder / f"seeds_{seeds.start:08d}-{seeds.stop - 1:08d}.safetensors"


Keep: TypeAlias = Callable[[Plan], Kept]
"""Tells where the samples of a plan are kept."""


def about_of(model: Saved, plan: Plan) -> dict[str, object]:
    """What samples follow from beside their seeds."""
    return {
        "experiment": model.experiment.name,
        "weights": model.weights_name,
        "step": model.step,
        "model": model.fingerprint(),
        "steps": plan.steps,
        "times": list(model.times(plan.steps, plan.between)),
        "labels": plan.labels,
    }


def restored(plan: Plan, classes: int, kept: Kept) -> Iterator[Samples]:
    """All batches of a plan, in order and on the CPU, after every process has generated its own.

    Raises:
        OSError: a batch is not there.
    """
    for indices in plan.batches():
        seeds = plan.seeds[indices.start : indices.stop]
        x = kept.load(seeds)
        if x is None:
            raise OSError(f"{kept.folder} lost the samples of seeds {seeds.start} and following")
        times = ()
        yield Samples(x, indices, seeds, class_labels(seeds, classes, plan.labels), times)


def has_room(root: Path, model: Sampler, evaluation: Evaluation, stay: bool) -> bool:
    """Whether all samples of an evaluation can be kept until it is done.

    Args:
        root: a folder, which need not exist yet.
        model, evaluation: what is measured.
        stay: whether the samples are wanted after it, too.

    Raises:
        ConfigError: they are wanted, and there is no room.
    """
    count = evaluation.samples * evaluation.blocks * len(evaluation.steps)
    needed = 4 * count * math.prod(model.shape)
    disk = next(place for place in (root, *root.absolute().parents) if place.exists())
    free = shutil.disk_usage(disk).free
    if free >= needed:
        return True
    lack = f"{count:,} samples take {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free"
    if stay:
        raise ConfigError(f"--keep-samples: {lack} at {disk}")
    warn(f"{lack} at {disk}: what is interrupted starts again")
    return False
