"""Every experiment of a folder: trained, measured, and held to what its configuration states.

    make bench-digits
    python -m benchmarks.zoo configs/experiments/Digits --jobs 2
    make bench-toy
    python -m benchmarks.zoo configs/experiments/Toy --jobs 2

Each `config_*.py` is trained in `runs/NAME`, after the runs it needs, and measured in 1, 2 and 4
steps and those of its own evaluation. The table is that of `fastflow compare`: each value beside
the bound that the configuration states (`expected`) and beside the real data. A value worse than
its bound, a bound that nothing was measured for, and a run that failed make the exit status 1.
The same as a page is `runs/report-FOLDER.html`, and images of all runs from the same noise are
`runs/report-FOLDER.png`.

Finished runs and measurements are used again. Each process has one thread, on the CPU, so on one
machine the table (standard output) is the same each time it is made. What takes how long goes to
standard error, and what the processes say to `runs/logs-FOLDER`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from fastflow import run_dir as run_directory
from fastflow.checkpoint.files import write_text
from fastflow.config import diff, load_experiment
from fastflow.distributed import World
from fastflow.errors import ConfigError, FastflowError
from fastflow.evaluation.compare import lines_of
from fastflow.evaluation.gallery import draw, drawn, same_noise
from fastflow.evaluation.report import page
from fastflow.evaluation.results import FILE, label
from fastflow.evaluation.runs import Run, runs_in
from fastflow.evaluation.table import Line, render
from fastflow.experiment import Experiment, Prerequisite
from fastflow.generate import step_times
from fastflow.model import Model
from fastflow.pictures import save_rows
from fastflow.prerequisites import Stage, check_all, position, unfinished

RUNS = Path("runs")
STEPS = (1, 2, 4)
POLL = 0.1  # seconds between looks at the processes
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclasses.dataclass(frozen=True)
class Job:
    """Calls of fastflow to be made one after the other, once other runs are done.

    Attributes:
        run_dir: of the run.
        needs: run directories of the others.
        calls: the arguments of each call.
    """

    run_dir: Path
    needs: frozenset[Path]
    calls: tuple[tuple[str, ...], ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status: 0, 1 for failures, 2 for mistakes, 130."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("folder", type=Path, help="of configurations, configs/experiments/Toy")
    options.add_argument("--jobs", type=int, default=2, help="processes at once (default 2)")
    arguments = options.parse_args(argv)
    began = time.perf_counter()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = bench(arguments.folder, arguments.jobs)
    except FastflowError as error:
        _say(f"benchmark: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        _say("benchmark: stopped; the same command goes on from there")
        return 128 + signal.SIGINT
    _say(f"{(time.perf_counter() - began) / 60:.1f} minutes of wall time")
    return status


def bench(folder: Path, at_once: int) -> int:
    """Train and measure what is not done yet and print the table; returns 0, or 1 for failures.

    Raises:
        ConfigError, CheckpointError, DataError: a run cannot be trained; none was.
    """
    if at_once < 1:
        raise ConfigError(f"--jobs: {at_once} given, accepted: a whole number from 1 up")
    stages = found(folder)
    logs = RUNS / f"logs-{folder.resolve().name.lower()}"
    failures = work(planned(stages), at_once, logs)
    lines: list[Line] = []
    runs: list[Run] = []
    for stage in stages:
        run = measured(stage)
        own = lines_of(run, stage.experiment) if run is not None else []
        failures += misses(stage.experiment, own)
        lines += own
        runs += [run] if run is not None else []
    # How long training took is another time each time.
    print(render([dataclasses.replace(line, train_seconds=None) for line in lines], "text"))
    for text in failures:
        print(f"FAILED {text}")
    if runs:
        for path in report(lines, runs, RUNS / f"report-{folder.resolve().name.lower()}"):
            print(f"written to {path}")
    return 1 if failures else 0


def report(lines: Sequence[Line], runs: Sequence[Run], to: Path) -> list[Path]:
    """Write the comparison as a page, and where samples are images a picture of all runs.

    Args:
        lines, runs: what was measured, and of what.
        to: the files' path without suffix.
    """
    pictures: dict[str, dict[str, Tensor]] = {}
    for run in runs:
        model = Model.load(run.folder)
        if not drawn(run.folder, run.weights, run.rows[0].step):
            draw(model, run.folder, sorted({row.steps for row in run.rows}))
        if len(model.shape) == 3:
            panels = {f"{n} steps" if n > 1 else "1 step": same_noise(model, n, 20) for n in STEPS}
            pictures[run.experiment] = panels
    page_file, picture_file = to.with_suffix(".html"), to.with_suffix(".png")
    write_text(page_file, page(lines, runs))
    if not pictures:
        return [page_file]
    save_rows(pictures, picture_file, columns=10)
    return [page_file, picture_file]


def found(folder: Path) -> list[Stage]:
    """The runs of all configurations of a folder.

    Raises:
        ConfigError: there is none, two share a name, or one cannot be read, or its run directory
            holds another.
    """
    stages: dict[str, Stage] = {}
    for path in sorted(folder.glob("config_*.py")):
        experiment = load_experiment(path, kind=Experiment)
        name, run_dir = experiment.name, RUNS / experiment.name
        if name in stages:
            other = stages[name].source.config
            raise ConfigError(f"{path}: name: {name!r} given, which {other} has already")
        source = Prerequisite(config=str(path), run_dir=str(run_dir))
        step = position(experiment, run_dir, World())
        stages[name] = Stage(source, experiment, run_dir, step)
    if not stages:
        raise ConfigError(f"{folder}: no config_*.py there; accepted: a folder with some")
    return list(stages.values())


def planned(stages: Sequence[Stage]) -> list[Job]:
    """What is left to do, runs that others need first.

    Raises:
        ConfigError, CheckpointError, DataError: one of the runs cannot be trained.
    """
    jobs: dict[Path, Job] = {}
    own = {stage.run_dir.resolve(): stage.experiment for stage in stages}
    for stage in stages:
        first: tuple[Stage, ...] = ()
        if stage.step < stage.experiment.steps:
            first = unfinished(stage.experiment, stage.run_dir, World())
            check_all(first, stage.experiment, World())
        for number, needed in enumerate(first):
            place = needed.run_dir.resolve()
            _require_same(needed, own.setdefault(place, needed.experiment))
            job = Job(needed.run_dir, _places(first[:number]), (_train(needed),))
            jobs.setdefault(place, job)
        train = () if _is_finished(stage) else (_train(stage),)
        evaluate = () if measured(stage) else (_evaluate(stage),)
        job = Job(stage.run_dir, _places(first), (*train, *evaluate))
        jobs[stage.run_dir.resolve()] = job
    left = [job for job in jobs.values() if job.calls]
    return sorted(left, key=lambda job: -sum(job.run_dir.resolve() in j.needs for j in left))


def _places(stages: Sequence[Stage]) -> frozenset[Path]:
    return frozenset(stage.run_dir.resolve() for stage in stages)


def _require_same(needed: Stage, other: Experiment) -> None:
    changes = run_directory.differences(other, needed.experiment)
    if changes:
        raise ConfigError(
            f"{needed.run_dir} is asked for in two configurations ({'; '.join(changes)}); name "
            f"another run_dir in the prerequisites that want {needed.source.config}"
        )


def _is_finished(stage: Stage) -> bool:
    """Whether it is trained, and stored as its configuration describes it now.

    Training it again refreshes what is stored and may differ, such as its evaluation.
    """
    if stage.step < stage.experiment.steps:
        return False
    return not diff(run_directory.find(stage.run_dir).experiment, stage.experiment)


def _train(stage: Stage) -> tuple[str, ...]:
    return (*stage.arguments("cpu", ()), "--no-prerequisites")


def _evaluate(stage: Stage) -> tuple[str, ...]:
    steps = f"evaluation.steps={list(_steps(stage.experiment))}"
    return ("evaluate", str(stage.run_dir), steps, "--device", "cpu")


def _steps(experiment: Experiment) -> tuple[int, ...]:
    """The numbers of sampler steps that are measured."""
    return tuple(sorted({*STEPS, *experiment.evaluation.steps}))


def work(jobs: Sequence[Job], at_once: int, logs: Path) -> list[str]:
    """Do the jobs, some at once, each after those that it needs; returns what failed and how.

    What a job says is appended to its file in the folder `logs`.
    """
    waiting, done = list(jobs), set[Path]()
    lost: dict[Path, str] = {}
    running: dict[Path, tuple[Job, int, subprocess.Popen[bytes]]] = {}

    def call(job: Job, number: int) -> None:
        _say(f"{job.calls[number][0]} {job.run_dir}")
        running[job.run_dir.resolve()] = (job, number, _start(job.calls[number], _log(logs, job)))

    try:
        while waiting or running:
            for job in list(waiting):
                missing = job.needs & lost.keys()
                if missing:
                    waiting.remove(job)
                    lost[job.run_dir.resolve()] = f"{job.run_dir}: not trained, a run before failed"
                elif job.needs <= done and len(running) < at_once:
                    waiting.remove(job)
                    call(job, 0)
            for place, (job, number, process) in list(running.items()):
                before = _spent_by_children()
                status = process.poll()
                if status is None:
                    continue
                minutes = (_spent_by_children() - before) / 60  # of this one, which poll waited for
                _say(f"{job.calls[number][0]} {job.run_dir}: {minutes:.1f} CPU minutes")
                del running[place]
                if status != 0:
                    what = f"{job.calls[number][0]} ended with status {status}"
                    lost[place] = f"{job.run_dir}: {what}; see {_log(logs, job)}"
                elif number + 1 < len(job.calls):
                    call(job, number + 1)
                else:
                    done.add(place)
            time.sleep(POLL)
    finally:
        for _, _, process in running.values():
            process.terminate()  # training saves its step first
        for _, _, process in running.values():
            process.wait()
    return list(lost.values())


def _spent_by_children() -> float:
    """CPU seconds of all processes that we started and that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def _log(logs: Path, job: Job) -> Path:
    return logs / f"{job.run_dir.name}.log"


def _start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Call fastflow; what it says is appended to the file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "fastflow", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ONE_THREAD},
            start_new_session=True,  # Ctrl-C reaches us alone, and we stop it once
        )


def measured(stage: Stage) -> Run | None:
    """What was measured of the finished run as its configuration asks; None if any of it lacks."""
    experiment = stage.experiment
    if not (stage.run_dir / FILE).exists():
        return None
    evaluation = experiment.evaluation
    found = runs_in(stage.run_dir, experiment.name)
    run = next((run for run in found if run.weights == run.preferred), None)
    if run is None:
        return None
    times = {
        n: step_times(experiment.method, n, evaluation.times.get(n)) for n in _steps(experiment)
    }
    rows = tuple(
        row
        for row in run.rows
        if times.get(row.steps) == row.times
        and row.step == experiment.steps
        and (row.generated, row.first_seed, row.blocks)
        == (evaluation.samples, evaluation.seed, evaluation.blocks)
    )
    complete = {row.steps for row in rows} == times.keys()
    return dataclasses.replace(run, rows=rows) if complete else None


def misses(experiment: Experiment, lines: Sequence[Line]) -> list[str]:
    """The bounds of an experiment that its lines do not keep, in words."""
    found = []
    for bound in experiment.expected:
        what = f"{label(bound.metric, bound.samples)} in {bound.steps} steps"
        against = [
            line
            for line in lines
            if (line.metric, line.steps, line.expected, line.source)
            == (bound.metric, bound.steps, bound.value, bound.source)
        ]
        if not against or not all(line.reached for line in against):
            values = ", ".join(f"{x.measured:.3g}" for x in against if x.difference is not None)
            got = f"{values} measured" if values else "nothing comparable measured"
            limit = "at least" if "higher" in {line.better for line in against} else "at most"
            found.append(f"{experiment.name}: {what}: {got}, {limit} {bound.value:g} stated")
    return found


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
