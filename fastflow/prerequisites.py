"""What has to be trained before an experiment: the runs that its initial weights come from.

A distillation needs its teacher, a second stage its first. The configuration declares them
(`Experiment.prerequisites`), and `fastflow train` trains those that are not finished, in order.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path

from fastflow import run_dir as run_directory
from fastflow.build import check
from fastflow.config import load_experiment, override, packages_of
from fastflow.distributed import World
from fastflow.errors import CheckpointError, ConfigError, DataError
from fastflow.experiment import Experiment, Prerequisite
from fastflow.method import Frozen

_OF_A_STAGE = (ConfigError, DataError, CheckpointError)
_ELSEWHERE = "name another run_dir there and in the weights that it gives"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run to be finished before another begins.

    Attributes:
        source: how it was declared.
        experiment: what `source` describes.
        run_dir: where it is trained.
        step: optimizer steps it has done already.
    """

    source: Prerequisite
    experiment: Experiment
    run_dir: Path
    step: int

    def __str__(self) -> str:
        done = f"at step {self.step:,}" if self.step else "new"
        return f"{self.run_dir}: {done}, {self.experiment.steps:,} steps of {self.source.config}"

    def arguments(self, device: str, allow: tuple[str, ...]) -> list[str]:
        """What `fastflow` is given to train this run."""
        words = ["train", "--config", self.source.config, "--run-dir", str(self.run_dir)]
        words += [*self.source.overrides, *(f"--allow={package}" for package in allow)]
        return words if device == "auto" else [*words, "--device", device]


def unfinished(
    experiment: Experiment, run_dir: Path | None, world: World, allow: tuple[str, ...] = ()
) -> tuple[Stage, ...]:
    """The runs to train before an experiment, each once and after those that it needs itself.

    A finished run needs nothing. Nothing is written. Every process must call it, and gets the
    same.

    Args:
        experiment: what is to be trained in the end.
        run_dir: its run directory; None where it is not chosen yet.
        world: the processes.
        allow: packages beside fastflow's own that a saved configuration may name classes of.

    Raises:
        ConfigError: a configuration cannot be read, does not fit its overrides, or needs itself;
            a directory holds a run of another configuration.
        CheckpointError: a run that is not finished cannot be continued.
    """
    if not any(_needed(experiment)):
        return ()
    if run_dir is not None and position(experiment, run_dir, world) >= experiment.steps:
        return ()
    found: dict[Path, Stage] = {}
    _collect(experiment, () if run_dir is None else (run_dir,), found, world, allow)
    return tuple(found.values())


def check_all(stages: tuple[Stage, ...], experiment: Experiment, world: World) -> None:
    """Everything that can be checked of the stages and of the experiment before any is trained.

    Raises:
        ConfigError, DataError: one of them cannot work.
    """
    for stage in stages:
        try:
            check(stage.experiment, world)
        except _OF_A_STAGE as error:
            raise type(error)(f"{stage.source.config}: {error}") from error
    check(experiment, world)


def refusal(stages: tuple[Stage, ...], device: str, allow: tuple[str, ...]) -> str:
    """That runs are missing, and the commands that train them, on one line."""
    runs = ", ".join(str(stage.run_dir) for stage in stages)
    commands = " && ".join(
        shlex.join(["fastflow", *stage.arguments(device, allow)]) for stage in stages
    )
    return f"not finished, but needed first: {runs}; train with: {commands}"


def _needed(experiment: Experiment) -> Iterator[tuple[int, Prerequisite]]:
    """The prerequisites whose weights are used, by their number."""
    frozen = (c for c in experiment.method.companions().values() if isinstance(c, Frozen))
    sources = (experiment.init_from, *(companion.weights for companion in frozen))
    used = [Path(source).resolve() for source in sources if source is not None]
    for number, prerequisite in enumerate(experiment.prerequisites):
        if any(path.is_relative_to(Path(prerequisite.run_dir).resolve()) for path in used):
            yield number, prerequisite


def _collect(
    experiment: Experiment,
    above: tuple[Path, ...],
    found: dict[Path, Stage],
    world: World,
    allow: tuple[str, ...],
) -> None:
    """Add what an experiment needs to `found`; `above` are the runs that wait for it, and its."""
    for number, source in _needed(experiment):
        try:
            _add(source, above, found, world, allow)
        except _OF_A_STAGE as error:
            raise type(error)(f"prerequisites.{number}: {error}") from error


def _add(
    source: Prerequisite,
    above: tuple[Path, ...],
    found: dict[Path, Stage],
    world: World,
    allow: tuple[str, ...],
) -> None:
    run_dir = Path(source.run_dir)
    key = run_dir.resolve()
    if key in [path.resolve() for path in above]:
        chain = " needs ".join(map(str, (*above, run_dir)))
        raise ConfigError(f"{chain}: no run can come before itself; name another run_dir")
    written = load_experiment(source.config, kind=Experiment, allow=allow)
    experiment = override(written, source.overrides, allow)
    if key in found:
        changes = run_directory.differences(found[key].experiment, experiment)
        if changes:
            raise ConfigError(
                f"{run_dir} is asked for in two configurations ({'; '.join(changes)}); name "
                f"another run_dir for one of them"
            )
        return
    step = position(experiment, run_dir, world, _ELSEWHERE)
    if step < experiment.steps:
        _collect(experiment, (*above, run_dir), found, world, allow)
        found[key] = Stage(source, experiment, run_dir, step)


def position(
    experiment: Experiment, run_dir: Path, world: World, elsewhere: str = run_directory.ELSEWHERE
) -> int:
    """How many steps the run of an experiment has done; every process must call it.

    Raises:
        ConfigError: the directory holds another run, or cannot be used.
        CheckpointError: the run is not finished and cannot be continued.
    """

    def look() -> int:
        run_directory.require_own(run_dir, experiment, elsewhere)
        step = run_directory.steps_done(run_dir, packages_of(experiment))
        if step < experiment.steps:
            run_directory.check(run_dir, experiment, elsewhere)
        return step

    return world.on_main(look)
