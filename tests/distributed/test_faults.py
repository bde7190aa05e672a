"""What happens to the others when one of several processes is killed, hangs or fails."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from callbacks.nonfinite import NonFiniteGuard
from fastflow import checkpoint
from fastflow.checkpoint import files
from fastflow.config import lazy
from fastflow.experiment import Parallel
from faulty import (
    bad_sample_second,
    full_second,
    hang_first,
    hang_second,
    loaded,
    lost_second,
    poisoned,
    saving,
    trained,
)
from lives import Life
from tiny import toy, toy_with_target

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[2]


# Killed, hung, stopped


def test_a_killed_process_does_not_keep_the_others_waiting(tmp_path):
    life = Life(saving(steps=10_000), tmp_path / "run", 2)
    while checkpoint.latest(tmp_path / "run") is None:
        time.sleep(0.01)
    life.kill([1])
    assert life.end() == [4, -signal.SIGKILL]
    last = checkpoint.latest(tmp_path / "run")
    # Whichever of training and saving comes to know it first.
    assert "lost another one, which ended" in life.said() or "process died" in life.said()
    assert str(last) in life.said()
    assert files.damage_of(last) is None


@pytest.mark.parametrize(
    ("before", "hung", "text"),
    [
        (hang_second, 1, "waited 4 s for process 1, which does not answer, and gave up"),
        (hang_first, 0, "waited 4 s for another one (process 0 knows which, or is the one)"),
    ],
)
def test_a_hung_process_is_named_after_the_timeout(before, hung, text, tmp_path):
    life = Life(saving(), tmp_path / "run", 2, timeout=4, before=before)
    other = 1 - hung
    life.processes[other].join(60)
    life.kill([hung])
    assert life.end()[other] == 4
    last = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert f"after step 2 (last checkpoint: {last})" in life.said()
    assert f"process {other} of 2 {text}" in life.said()
    assert "--timeout SECONDS waits longer" in life.said()


@pytest.mark.parametrize(
    ("number", "ranks", "status"), [("SIGTERM", [1], 143), ("SIGINT", [0, 1], 130)]
)
def test_a_signal_to_any_stops_all_after_the_same_step(number, ranks, status, tmp_path):
    life = Life(saving(steps=10_000), tmp_path / "run", 2)
    while checkpoint.latest(tmp_path / "run") is None:
        time.sleep(0.01)
    life.send(signal.Signals[number], ranks)
    if number == "SIGTERM":  # which schedulers and launchers send more than once
        life.send(signal.SIGTERM, ranks)
    assert life.end() == [status, status], life.said()
    assert f"stopped by {number} after step" in life.said()
    step = checkpoint.step_of(checkpoint.latest(tmp_path / "run"))
    assert f"after step {step:,} of 10,000, which is saved" in life.said()


ELASTIC = """
import os, signal, sys
from fastflow.cli import main
from fastflow.trainer import Trainer
step = Trainer._step
def until(self, batch):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and self.state.step == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, batch)
Trainer._step = until
sys.exit(main())
"""


def test_torchrun_starts_again_by_itself(tmp_path):
    experiment = saving(parallel=Parallel(shard=2))
    assert Life(experiment, tmp_path / "straight", 2).end() == [0, 0]
    (tmp_path / "train.py").write_text(ELASTIC)
    words = ["--config", str(tmp_path / "straight.yaml"), "--run-dir", str(tmp_path / "run")]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(tmp_path / "train.py"), "train", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout
    same_weights(tmp_path / "run", tmp_path / "straight")


def same_weights(run_dir, other):
    paths = sorted((other / "weights").glob("*.safetensors"))
    assert len(paths) == 3
    for path in paths:
        ours, theirs = load_file(run_dir / "weights" / path.name), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), path.name


# One process fails


@pytest.mark.parametrize(
    ("before", "text"),
    [(full_second, "No space left on device"), (lost_second, "Input/output error")],
)
def test_the_disk_of_one_stops_all_and_leaves_the_last_one_valid(before, text, tmp_path):
    life = Life(saving(steps=50), tmp_path / "run", 2, before=before)
    assert life.end() == [2, 2], life.said()
    last = tmp_path / "run" / "checkpoints" / "step_00000002"
    wanted = f"the checkpoint at step 4 was not written to {last.parent}: [Errno"
    assert life.said().count(wanted) == 2
    assert life.said().count(f"{text}; the last good one is {last}") == 2
    assert sorted(p.name for p in last.parent.iterdir()) == ["latest", "step_00000002"]


def test_a_bad_sample_of_one_is_named_and_ends_all(tmp_path):
    life = Life(saving(), tmp_path / "run", 2, before=bad_sample_second)
    assert life.end() == [4, 2]
    assert "fastflow: cats.zip: image 7.png is unreadable (sample 7 of cats)" in life.said()
    assert "lost another one, which ended; what that one said last tells why" in life.said()
    assert checkpoint.latest(tmp_path / "run").name == "step_00000002"


@pytest.mark.parametrize("shard", [1, 2])
def test_a_bad_gradient_in_one_shard_stops_all_or_is_skipped(shard, two, tmp_path):
    experiment = saving(parallel=Parallel(shard=shard))
    texts = two.run(poisoned, experiment, tmp_path / "run", 4)
    last = tmp_path / "run" / "checkpoints" / "step_00000004"
    for text in texts:
        assert text.startswith("step 5: non-finite loss or gradient: ")
        assert "loss " in text
        assert "first bad gradient: model.first.weight" in text
        assert f"Last good checkpoint: {last}" in text
    assert files.damage_of(last) is None
    kept = tuple(c for c in experiment.callbacks if c.target is not NonFiniteGuard)
    skipping = toy(
        callbacks=(lazy(NonFiniteGuard, action="skip"), *kept), parallel=Parallel(shard=shard)
    )
    assert two.run(poisoned, skipping, tmp_path / "skipped", 4) == [1.0, 1.0]


# Another number of processes, another sharding


def assert_equal(a, b):
    (step, ours), (other, theirs) = a[:2], b[:2]
    assert step == other
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_a_run_goes_on_under_other_numbers_and_shardings_with_the_same_weights(two, tmp_path):
    run_dir = tmp_path / "run"
    copies, shards = (toy_with_target(steps=8, parallel=Parallel(shard=n)) for n in (1, 2))
    straight = [trained(None, copies, tmp_path / "straight", n)[2] for n in (2, 4, 6, 8)]
    at = two.run(trained, shards, run_dir, 2)[0]
    for experiment in (copies, shards):
        for again in two.run(loaded, experiment, run_dir):
            assert_equal(again, at)
    assert_equal(loaded(None, copies, run_dir), at)  # 2 -> 1
    losses = [at[2]]
    at = trained(None, copies, run_dir, 4)
    losses.append(at[2])
    for experiment in (copies, shards):
        for again in two.run(loaded, experiment, run_dir):  # 1 -> 2
            assert_equal(again, at)
    at = two.run(trained, copies, run_dir, 6)[0]
    losses.append(at[2])
    for again in two.run(loaded, shards, run_dir):  # one copy each -> shards
        assert_equal(again, at)
    losses.append(two.run(trained, shards, run_dir)[0][2])
    assert losses == pytest.approx(straight, rel=1e-4)
