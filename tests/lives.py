"""Trainings that may be killed: processes forked from one that has imported everything.

Starting one costs milliseconds, so that a test can afford hundreds; each is a process of its own
that runs the command line.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from fastflow.cli import main
from fastflow.config import save_yaml
from fastflow.experiment import Experiment

_FORKS = multiprocessing.get_context("forkserver")
# What a training imports on its way, too.
_ON_THE_WAY = ("fastflow.prerequisites", "fastflow.summary", "omegaconf", "torch._dynamo", "yaml")
_FORKS.set_forkserver_preload([__name__, "faulty", *_ON_THE_WAY])


class Life:
    """The processes that train together, from their start to their end.

    Args:
        experiment: what is trained.
        run_dir: where; what the processes print goes into files beside it.
        size: number of processes.
        timeout: seconds that they wait for each other.
        before: called in each process with its rank before it trains.
    """

    def __init__(
        self,
        experiment: Experiment,
        run_dir: Path,
        size: int = 1,
        timeout: float = 60.0,
        before=None,
    ) -> None:
        config = run_dir.with_name(f"{run_dir.name}.yaml")
        if not config.exists():
            save_yaml(experiment, config)
        words = ["train", "--config", str(config), "--run-dir", str(run_dir), "--device", "cpu"]
        words += ["--timeout", str(timeout)]
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(size),
        }
        self._logs = [run_dir.with_name(f"{run_dir.name}.{rank}.log") for rank in range(size)]
        self.processes: list[BaseProcess] = []
        for rank, log in enumerate(self._logs):
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _FORKS.Process(target=_live, args=(words, env, log, rank, before))
            process.start()
            self.processes.append(process)

    @property
    def over(self) -> bool:
        return not any(process.is_alive() for process in self.processes)

    def kill(self, ranks: Sequence[int]) -> None:
        """SIGKILL, for all of these at once."""
        self.send(signal.SIGKILL, ranks)

    def send(self, number: signal.Signals, ranks: Sequence[int]) -> None:
        for rank in ranks:
            pid = self.processes[rank].pid
            if pid is not None and self.processes[rank].is_alive():
                os.kill(pid, number)

    def end(self, patience: float = 120.0) -> list[int]:
        """Wait until all have ended by themselves; their exit statuses.

        Raises:
            AssertionError: one did not end.
        """
        until = time.monotonic() + patience
        for process in self.processes:
            process.join(max(until - time.monotonic(), 0.0))
        hanging = [rank for rank, p in enumerate(self.processes) if p.is_alive()]
        self.kill(hanging)
        assert not hanging, f"{hanging} of {len(self.processes)} hang:\n{self.said()}"
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        """What they printed in this life."""
        return "\n".join(log.read_text() for log in self._logs if log.exists())


def _live(words: list[str], env: dict[str, str], log: Path, rank: int, before) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if before is not None:
        before(rank)
    sys.exit(main(words))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
