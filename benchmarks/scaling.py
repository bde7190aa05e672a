"""What dividing a step over processes costs and saves, on the CPU; with --plan, on many GPUs.

One process, two with a copy of the weights each, and two that share one take the same global batch
in turns, in the same two processes: a step with gradient clipping and EMAs. Memory is what tensors
hold in one process at most; "foretold" is the same from a step without memory, which `fastflow
doctor --gpus` takes. Communication is what one process sends in a step as ring algorithms send it,
counted from its collectives, and beside it by the formula, for P bytes of weights, n processes of
which s share a copy, and c forward passes of the student:

    (c + 1) P (s-1)/s  gathered  +  P (s-1)/s  scattered  +  2 P/s (n/s-1)/(n/s)  summed
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import multiprocessing
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import plan
from benchmarks.common import (
    Subject,
    chosen,
    machine,
    median_ratio,
    network_parser,
    parsed,
    print_table,
    stopwatch,
)
from benchmarks.overhead import Noise
from fastflow.build import Parts
from fastflow.callback import Driver
from fastflow.config import lazy
from fastflow.counting import Allocations, Traffic
from fastflow.distributed import World
from fastflow.experiment import Experiment, Parallel
from fastflow.rehearsal import rehearse
from fastflow.state import TrainState

PROCESSES = 2
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Division:
    """How many processes, and how many of them share a copy of the weights."""

    processes: int
    shard: int

    @property
    def name(self) -> str:
        if self.processes == 1:
            return "1 process"
        return f"{self.processes} processes, shard={self.shard}"

    def of(self, experiment: Experiment) -> Experiment:
        return dataclasses.replace(experiment, parallel=Parallel(shard=self.shard))


DIVISIONS = (Division(1, 1), Division(PROCESSES, 1), Division(PROCESSES, PROCESSES))


@dataclasses.dataclass
class Measured:
    """A division in one process: seconds of each turn, peak bytes, bytes sent, forward passes."""

    peak: int
    sent: int
    calls: int
    seconds: list[float] = dataclasses.field(default_factory=list)


class Run:
    """An experiment in training, on this process as one of some, with its EMAs."""

    def __init__(self, experiment: Experiment, world: World) -> None:
        parts = Parts.of(experiment, world)
        self.batches = parts.loader.batches()
        self.state = TrainState(
            experiment=experiment,
            method=experiment.method,
            world=world,
            networks=parts.networks,
            optimizer=parts.optimizer,
            run_dir=Path(),
        )
        for driver in parts.callbacks:
            if isinstance(driver, Driver):
                driver.setup(self.state)
                driver.before_step(self.state)

    def step(self) -> None:
        state, batch = self.state, next(self.batches)
        state.optimizer.zero_grad(set_to_none=True)
        loss = state.method.loss(state.networks, batch, state.now)
        (loss.per_sample.sum() / batch.size).backward()
        torch.nn.utils.clip_grad_norm_(state.networks.student.parameters(), 1.0)
        state.optimizer.step()
        state.step += 1
        for ema in state.emas.values():
            ema.update(state.networks.student, state.now)


def subject(options: argparse.Namespace) -> tuple[Subject, Experiment]:
    """The largest network that the options ask for, and its experiment on noise."""
    found = chosen(options)[-1]
    network = found.network(torch.device("cpu"))
    data = lazy(Noise, shape=network.sample_shape, classes=network.cond_dim)
    return found, dataclasses.replace(
        found.experiment, data=data, batch_size=found.batch, precision=options.precision
    )


def measured(experiment: Experiment, options: argparse.Namespace) -> list[list[Measured]]:
    """What each process saw of each division it takes part in."""
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ProcessPoolExecutor(PROCESSES, mp_context=context) as pool,
    ):
        store = str(Path(folder) / "store")
        ranks = range(PROCESSES)
        tasks = [pool.submit(_work, rank, store, experiment, options) for rank in ranks]
        return [task.result() for task in tasks]


def _work(
    rank: int, store: str, experiment: Experiment, options: argparse.Namespace
) -> list[Measured]:
    torch.set_num_threads(options.threads)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, PROCESSES),
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(minutes=5),
    )
    try:
        mine = [d for d in DIVISIONS if rank < d.processes]
        pairs = [_counted(d.of(experiment), World(rank=rank, size=d.processes)) for d in mine]
        watch = stopwatch(options)
        for _ in range(options.repeats):
            for division in DIVISIONS:
                dist.barrier()  # a division with one process has the machine to itself
                if division in mine:
                    run, found = pairs[mine.index(division)]
                    began = watch.now()
                    run.step()
                    found.seconds.append(watch.now() - began)
        return [found for _, found in pairs]
    finally:
        dist.destroy_process_group()


def _counted(experiment: Experiment, world: World) -> tuple[Run, Measured]:
    with Allocations() as memory:
        run = Run(experiment, world)
        run.step()  # makes the state of the optimizer
        memory.restart()
        run.step()
    calls: list[None] = []
    hook = run.state.networks.student.register_forward_hook(lambda *_: calls.append(None))
    with Traffic() as traffic:
        run.step()
    hook.remove()
    return run, Measured(memory.peak, sum(traffic.sent.values()), len(calls))


def formula(weights: int, division: Division, calls: int) -> float:
    """Bytes that a process sends in a step; see the module's docstring."""
    n, s = division.processes, division.shard
    copies = n // s
    shared = (calls + 2) * weights * (s - 1) / s
    return shared + 2 * weights / s * (copies - 1) / copies


def foretold(experiment: Experiment, division: Division) -> int:
    """Most bytes in a process, from a step without memory."""
    share = experiment.batch_size // division.processes
    step = rehearse(division.of(experiment), division.processes, [share])
    return step.lasting + max(step.working(share), step.gradients + step.update)


def rows(experiment: Experiment, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """The cells of each division, under their header."""
    found = measured(experiment, options)[0]  # each process sees the same
    weights = rehearse(experiment, 1, [1]).gradients
    base, table = found[0], [HEAD]
    for division, seen in zip(DIVISIONS, found, strict=True):
        table.append(
            (
                division.name,
                f"{statistics.median(seen.seconds):.4f}",
                f"{median_ratio(seen.seconds, base.seconds):.2f}",
                f"{seen.peak / MIB:.1f}",
                f"{seen.peak / base.peak:.2f}",
                f"{foretold(experiment, division) / MIB:.1f}",
                f"{seen.sent / MIB:.2f}",
                f"{formula(weights, division, seen.calls) / MIB:.2f}",
            )
        )
    return table


HEAD = ("division", "seconds", "ratio", "MiB", "ratio", "foretold", "MiB sent", "formula")


def main(argv: Sequence[str] | None = None) -> None:
    options = network_parser(__doc__ or "")
    options.set_defaults(threads=1)  # of each process
    options.add_argument("--plan", action="store_true", help="print the plan for many GPUs")
    arguments = parsed(options, argv)
    if arguments.plan:
        print(plan.text(plan.experiments()))
        return
    arguments.device = "cpu"
    found, experiment = subject(arguments)
    title = f"{found.name}, {found.batch} samples in all, {arguments.precision}"
    print_table(f"scaling, {title}, {machine(arguments)}", rows(experiment, arguments))


if __name__ == "__main__":
    main()
