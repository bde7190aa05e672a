"""Saving beside training: a copy of the moment, one at a time, failures told, full disks."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from callbacks.checkpoint import CheckpointCallback
from fastflow import checkpoint
from fastflow.callback import Observer
from fastflow.checkpoint import engine, files
from fastflow.cli import main
from fastflow.config import lazy, save_yaml
from fastflow.distributed import World
from fastflow.errors import CheckpointError, ConfigError, DivergenceError
from fastflow.lock import RunLock
from fastflow.trainer import Trainer
from tiny import assert_same, drivers, toy, train

EVERY = (*drivers(), lazy(CheckpointCallback, every=2))


@pytest.fixture
def slow(monkeypatch):
    """Writing that waits for `release`; what happens is noted in `told`."""
    disk = SimpleNamespace(release=threading.Event(), told=[])
    write = engine.write

    def waits(tensors, folder, world):
        disk.told.append(f"begun {folder.name}")
        assert disk.release.wait(20)
        own = write(tensors, folder, world)
        disk.told.append(f"written {folder.name}")
        return own

    monkeypatch.setattr(engine, "write", waits)
    return disk


def watched(trainer, act):
    """Call `act(state)` after each step."""

    class Watch(Observer):
        def after_step(self, state):
            act(state)

    trainer.observers.append(Watch())
    return trainer


def test_steps_go_on_while_a_checkpoint_of_its_moment_is_written(slow, tmp_path):
    def act(state):
        if state.step == 3:
            assert not (tmp_path / "run" / "checkpoints" / "latest").exists()
            slow.release.set()

    trainer = watched(Trainer(toy(callbacks=EVERY, steps=3), tmp_path / "run"), act)
    trainer.fit()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000003")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000002")
    again = Trainer(toy(callbacks=EVERY, steps=3), tmp_path / "run")
    assert again.state.step == 2
    assert_same(again.fit(), train(toy(callbacks=EVERY, steps=3), tmp_path / "straight"))


def test_a_checkpoint_waits_for_the_one_before(slow, tmp_path):
    def act(state):
        if state.step == 3:
            threading.Timer(0.2, slow.release.set).start()

    watched(Trainer(toy(callbacks=EVERY), tmp_path / "run"), act).fit()
    steps = (2, 4, 6)
    parts = [f"{what} .partial_step_0000000{n}" for n in steps for what in ("begun", "written")]
    assert slow.told == parts


def test_the_last_checkpoint_is_known_once_it_is_complete(slow, tmp_path):
    seen = []

    def act(state):
        if state.step == 2:
            threading.Timer(0.2, slow.release.set).start()
            seen.append(state.last_checkpoint())

    watched(Trainer(toy(callbacks=EVERY), tmp_path / "run"), act).fit()
    assert seen == [tmp_path / "run" / "checkpoints" / "step_00000002"]


def test_an_error_in_training_waits_for_the_checkpoint(slow, tmp_path):
    def act(state):
        if state.step == 3:
            threading.Timer(0.2, slow.release.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        watched(Trainer(toy(callbacks=EVERY), tmp_path / "run"), act).fit()
    assert checkpoint.latest(tmp_path / "run").name == "step_00000002"


# What is called when a checkpoint is written, and how often for one.
STAGES = {
    "begin": (files, "begin", 1),
    "tensors": (engine.dcp, "save", 1),
    "digests": (files, "digest_of", 2),
    "meta": (files, "write_text", 2),
    "finish": (files, "finish", 1),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_refuses_stops_training_and_leaves_the_last_one_valid(
    stage, tmp_path, monkeypatch
):
    steps, calls = [], []
    experiment = toy(callbacks=EVERY)
    trainer = watched(Trainer(experiment, tmp_path / "run"), lambda s: steps.append(s.step))
    module, name, often = STAGES[stage]
    act = getattr(module, name)

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) > often:  # from the second checkpoint on
            raise OSError(28, "No space left on device")
        return act(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fails)
        with pytest.raises(CheckpointError) as caught:
            trainer.fit()
    text = str(caught.value)
    assert "the checkpoint at step 4 was not written" in text
    assert "No space left on device" in text
    assert f"the last good one is {tmp_path}/run/checkpoints/step_00000002" in text
    root = tmp_path / "run" / "checkpoints"
    assert (root / "latest").read_text() == "step_00000002"
    assert not list(root.glob(".partial_step*"))
    assert_same(train(experiment, tmp_path / "run"), train(experiment, tmp_path / "straight"))


def test_a_failure_is_known_after_the_next_step(tmp_path, monkeypatch):
    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine, "write", fails)
    steps = []

    def act(state):
        steps.append(state.step)
        if state.step == 2:
            trainer._saver._thread.join()

    experiment = toy(callbacks=(*drivers(), lazy(CheckpointCallback, every=2)), steps=100)
    trainer = watched(Trainer(experiment, tmp_path / "run"), act)
    with pytest.raises(
        CheckpointError, match="step 2 was not written .* the last good one is none"
    ):
        trainer.fit()
    assert steps == [1, 2]


def test_a_pointer_that_cannot_be_written_leaves_two_good_checkpoints(tmp_path, monkeypatch):
    write = files.write_text

    def fails(path, text):
        if text == "step_00000004":
            raise OSError(5, "Input/output error")
        write(path, text)

    monkeypatch.setattr(files, "write_text", fails)
    with pytest.raises(CheckpointError, match="Input/output error; .*step_00000002"):
        train(toy(callbacks=EVERY), tmp_path / "run")
    monkeypatch.undo()
    straight = train(toy(callbacks=EVERY), tmp_path / "straight")
    assert_same(train(toy(callbacks=EVERY), tmp_path / "run"), straight)


def test_a_failing_disk_does_not_hide_why_training_stopped(tmp_path, monkeypatch, capsys):
    release = threading.Event()

    def fails(*args):
        assert release.wait(20)
        raise OSError(28, "No space left on device")

    def act(state):
        if state.step == 3:
            threading.Timer(0.2, release.set).start()
            raise DivergenceError("step 3: diverged")

    monkeypatch.setattr(engine, "write", fails)
    with pytest.raises(DivergenceError):
        watched(Trainer(toy(callbacks=EVERY), tmp_path / "run"), act).fit()
    assert "the checkpoint at step 2 was not written" in capsys.readouterr().err


def test_a_real_limit_of_the_disk_is_told(tmp_path):
    """The tensors of a checkpoint do not fit into the largest file that is allowed."""
    experiment = toy(callbacks=EVERY)
    train(experiment, tmp_path / "run", stop_at=3)
    trainer = Trainer(experiment, tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        with pytest.raises(CheckpointError, match="step 4 .*: .*File too large; the last good"):
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.latest(tmp_path / "run").name == "step_00000003"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, which few checkpoints of the toy fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("beforehand", [True, False])
def test_a_full_disk_ends_training_with_status_2(
    beforehand, small_disk, tmp_path, capsys, monkeypatch
):
    callbacks = (*drivers(), lazy(CheckpointCallback, every=1, keep=100))
    save_yaml(toy(callbacks=callbacks, steps=50), tmp_path / "config.yaml")
    if not beforehand:  # as if another program took the room meanwhile
        plenty = SimpleNamespace(free=1 << 40)
        monkeypatch.setattr(files.shutil, "disk_usage", lambda path: plenty)
    words = ["train", "--config", str(tmp_path / "config.yaml"), "--device", "cpu"]
    assert main([*words, "--run-dir", str(small_disk / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in error
    assert ("MB are free" in error) == beforehand
    last = checkpoint.latest(small_disk / "run")
    assert f"the last good one is {last}" in error
    assert files.damage_of(last) is None
    for folder in sorted((small_disk / "run" / "checkpoints").glob("step_*"))[:-1]:
        shutil.rmtree(folder)
    assert Trainer(toy(callbacks=callbacks, steps=50), small_disk / "run").state.step > 0


# One training at a time in a run directory

HOLD = """
import socket, sys, time
from pathlib import Path
from fastflow.lock import RunLock
if len(sys.argv) > 3:
    socket.gethostname = lambda: sys.argv[3]
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@contextlib.contextmanager
def held(run_dir, seconds=60.0, *host):
    """The process that holds the lock of a run directory for a while."""
    words = [sys.executable, "-c", HOLD, str(run_dir), str(seconds), *host]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


def test_a_run_directory_in_use_is_refused_until_its_process_has_died(tmp_path, capsys):
    run_dir = tmp_path / "run"
    save_yaml(toy(steps=1), tmp_path / "config.yaml")
    words = ["train", "--config", str(tmp_path / "config.yaml"), "--run-dir", str(run_dir)]
    with held(run_dir) as holder:
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"{run_dir} is in use by another training (process {holder.pid} on " in error
        assert [path.name for path in run_dir.iterdir()] == [".lock"]
    assert main(words) == 0


def test_another_machine_may_be_down(tmp_path, capsys):
    gone = r"on node7\).*if that machine is gone, remove .*/\.lock$"
    with held(tmp_path, 60.0, "node7"), pytest.raises(ConfigError, match=gone):
        RunLock(tmp_path).acquire(lease=0.1)
    capsys.readouterr()
    with held(tmp_path, 0.3, "node7"):
        RunLock(tmp_path).acquire(lease=10.0)
    assert "on node7); waiting 10 s for it" in capsys.readouterr().err


def test_the_lock_is_given_back_after_training(tmp_path):
    train(toy(steps=1), tmp_path / "run")
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    lock.release()
    lock.release()


def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    """A data worker outlives a parent that was killed, for a while."""
    lock = RunLock(tmp_path)
    lock.acquire()
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        lock.release()
        with held(tmp_path):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_copies_are_copies():
    from fastflow.checkpoint.saver import _copied

    source = torch.ones(3)
    copy = _copied(source)
    source.zero_()
    assert copy.tolist() == [1, 1, 1]


@pytest.mark.gpu
def test_what_is_on_a_gpu_is_copied_too(tmp_path):
    world = World(device=torch.device("cuda"))
    train(toy(callbacks=EVERY), tmp_path / "run", stop_at=4, world=world)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000002")
    again = train(toy(callbacks=EVERY), tmp_path / "run", world=world)
    assert_same(again, train(toy(callbacks=EVERY), tmp_path / "straight", world=world))
