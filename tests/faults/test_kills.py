"""Killed a hundred times, at any moment, a run ends in the bits of one that was left alone."""

import random
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from callbacks.checkpoint import CheckpointCallback
from fastflow.config import lazy
from fastflow.experiment import Parallel
from fastflow.trainer import Trainer
from lives import Life
from tiny import assert_same, drivers, toy

pytestmark = pytest.mark.faults
KILLS = 100
STEPS = 60


def experiment(shard=1):
    saves = lazy(CheckpointCallback, every=2, keep=2, keep_every=10)
    return toy(callbacks=(*drivers(), saves), steps=STEPS, parallel=Parallel(shard=shard))


@pytest.fixture
def folder():
    """In memory where that is possible: a killed process leaves the same files there, sooner."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


class Killer:
    """Kills lives of a run at random moments: anywhere, or while a checkpoint is being written.

    Attributes:
        kills: so far.
        saving: of them, those while a checkpoint was being written.
    """

    def __init__(self, seed: int, size: int) -> None:
        self._random = random.Random(seed)
        self._size = size
        self.kills = 0
        self.saving = 0

    def kill(self, run_dir: Path) -> bool:
        """Start a life and kill it, unless it ends before; whether the run is finished."""
        life = Life(experiment(self._size), run_dir, self._size, timeout=10)
        began = time.monotonic()
        while not life.over and not (run_dir / "checkpoints").exists():
            time.sleep(0.001)
        if self._random.random() < 0.5:
            self._wait_for_a_checkpoint(life, run_dir)
        else:
            time.sleep(self._random.uniform(0.0, 2 * (time.monotonic() - began) + 0.2))
        if not life.over:
            self.saving += any((run_dir / "checkpoints").glob(".partial_step_*"))
            self.kills += 1
            # One, and the others must notice; or all at once, as when a machine goes down.
            everyone = range(self._size)
            life.kill(self._random.choice([*([rank] for rank in everyone), everyone]))
        statuses = life.end()
        # Those that lost another one say so.
        assert set(statuses) <= {0, 4, -signal.SIGKILL}, life.said()
        return statuses == [0] * self._size

    def _wait_for_a_checkpoint(self, life: Life, run_dir: Path) -> None:
        """Until some checkpoint after the next few is begun, and for a part of its writing."""
        for _ in range(self._random.randint(1, 4)):
            before = set((run_dir / "checkpoints").glob("step_*"))
            while not life.over and set((run_dir / "checkpoints").glob("step_*")) <= before:
                time.sleep(0.0005)
        while not life.over and not any((run_dir / "checkpoints").glob(".partial_*")):
            time.sleep(0.0002)
        time.sleep(self._random.uniform(0.0, 0.03))


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bits(size, folder):
    assert Life(experiment(size), folder / "straight", size).end() == [0] * size
    killer, runs = Killer(seed=size, size=size), 0
    while killer.kills < KILLS:
        runs += 1
        run_dir = folder / f"run{runs}"
        while killer.kills < KILLS and not killer.kill(run_dir):
            pass
        last = Life(experiment(size), run_dir, size)
        assert last.end() == [0] * size, last.said()
        compare(run_dir, folder / "straight")
    print(f"{size} processes: {killer.kills} kills, {killer.saving} in a checkpoint, {runs} runs")
    assert killer.saving >= KILLS // 10


def compare(run_dir, other):
    """Weights, EMAs and the optimizer's state are the same, to the bit."""
    files = sorted(path.name for path in (other / "weights").glob("*.safetensors"))
    assert len(files) == 3
    for name in files:
        ours, theirs = (load_file(folder / "weights" / name) for folder in (run_dir, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    # With another number of processes, so that nothing but the state is compared.
    a, b = (Trainer(experiment(), folder).state for folder in (run_dir, other))
    assert a.step == STEPS
    assert_same(a, b)
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert [name for name in kept if not name.startswith("step_")] == ["latest"]
