"""Two processes (gloo, CPU) against one: the same losses, weights, checkpoints and samples."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from callbacks.loss_by_time import LossByTime
from callbacks.model_summary import ModelSummary
from callbacks.progress_bar import ProgressBar
from callbacks.sample_grid import SampleGrid
from fastflow import cli
from fastflow.config import lazy, save_yaml
from fastflow.errors import CheckpointError
from fastflow.evaluation import results
from fastflow.experiment import Parallel, Prerequisite
from fastflow.logging import JsonLines
from fastflow.method import Frozen
from fastflow.model import Model
from fastflow.trainer import Trainer
from methods.tcm import TCM
from tiny import (
    MLP,
    OBSERVERS,
    assert_same,
    digits,
    drivers,
    everything,
    toy,
    toy_with_target,
    toy_with_teacher,
    train,
)

ROOT = Path(__file__).parents[2]


def torchrun(script, *words, processes=2):
    """Run a script in several processes; returns them once they have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    started = [
        subprocess.Popen(
            [sys.executable, *script, *map(str, words)],
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    return [(process, *process.communicate(timeout=200)) for process in started]


def train_together(experiment, run_dir, processes=2):
    config = run_dir.with_name(f"{run_dir.name}.yaml")
    save_yaml(experiment, config)
    ended = torchrun(["train.py"], "--config", config, "--run-dir", run_dir, processes=processes)
    for process, out, err in ended:
        assert process.returncode == 0, f"{out}\n{err}"
    return ended


def log(run_dir):
    return JsonLines(run_dir / "log.jsonl").read()


def assert_near(run_dir, other, atol=2e-5):
    """The same loss curve, gradient norms, weights and EMAs, to the rounding of sums."""
    ours, theirs = log(run_dir), log(other)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in b.keys() - {"seconds", "images_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), name
    assert_near_weights(run_dir, other, atol)


def assert_near_weights(run_dir, other, atol=2e-5):
    files = sorted((other / "weights").glob("*.safetensors"))
    assert "ema_0.9.safetensors" in [file.name for file in files]
    for file in files:
        ours, theirs = load_file(run_dir / "weights" / file.name), load_file(file)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=atol)


WATCHED = (
    lazy(ModelSummary),
    lazy(LossByTime, every=3),
    lazy(SampleGrid, every=3, count=4, steps=(1, 2)),
    lazy(ProgressBar),
    *OBSERVERS,
)


def test_two_processes_train_as_one(tmp_path):
    """Both shares of the batch, EMAs and observers, from the command line."""
    experiment = toy(callbacks=(*drivers(), *WATCHED), parallel=Parallel(shard=2))
    train(dataclasses.replace(experiment, parallel=Parallel()), tmp_path / "one")
    ended = train_together(experiment, tmp_path / "two")
    assert_near(tmp_path / "two", tmp_path / "one")
    (_, out, _), (_, silent, _) = ended
    assert "16 samples = 2 processes x 8" in " ".join(out.split())
    assert silent == ""
    for name in ("samples/step_00000003.png", "model.txt", "loss_by_time.jsonl"):
        assert (tmp_path / "two" / name).exists()
    one, two = (JsonLines(tmp_path / n / "loss_by_time.jsonl").read() for n in ("one", "two"))
    assert [r["count"] for r in one] == [r["count"] for r in two]
    seeds = range(5)
    a, b = (Model.load(tmp_path / name).sample(seeds, 2) for name in ("one", "two"))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def two_stages(**changes):
    """With pictures of the EMA, for which both networks sample."""
    grid = lazy(SampleGrid, every=3, count=4, steps=(1, 2), weights="ema_0.9")
    method = TCM(stage1=Frozen(weights=None, network=MLP))
    return toy(method=method, callbacks=(*drivers(), *OBSERVERS, grid), **changes)


# Every method and division, without pictures and images: test_methods_sharded.py.
CASES = {
    "unet": (lambda **kw: digits(dropout=0.0, steps=3, **kw), Parallel(shard=2, checkpoint=True)),
    # Pairs of rows, so that some have no row for one of the networks.
    "two stages": (two_stages, Parallel(shard=2, micro_batch=2)),
}


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_every_division_gives_the_same_curve(case, tmp_path):
    make, parallel = CASES[case]
    train(make(), tmp_path / "one")
    train_together(make(parallel=parallel), tmp_path / "two")
    assert_near(tmp_path / "two", tmp_path / "one", atol=2e-4 if case == "unet" else 2e-5)


@pytest.mark.dist
@pytest.mark.parametrize("shard", [1, 4])
def test_four_copies_and_four_shards(shard, tmp_path):
    train(toy(steps=3), tmp_path / "one")
    train_together(toy(steps=3, parallel=Parallel(shard=shard)), tmp_path / "four", processes=4)
    assert_near(tmp_path / "four", tmp_path / "one")


STOPPED = """
import sys
from tiny import train
from fastflow.config import load_experiment
from fastflow.distributed import world
from pathlib import Path
with world("cpu") as here:
    train(load_experiment(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), here)
"""


def stop_together(experiment, run_dir, step):
    config = run_dir.with_name("stop.yaml")
    save_yaml(experiment, config)
    for process, out, err in torchrun(["-c", STOPPED], config, run_dir, step):
        assert process.returncode == 0, f"{out}\n{err}"


@pytest.mark.dist
@pytest.mark.parametrize("make", [toy_with_target, lambda **kw: digits(steps=4, **kw)])
def test_two_processes_resume_to_the_bit(make, tmp_path):
    experiment = make(parallel=Parallel(shard=2))
    train_together(experiment, tmp_path / "straight")
    stop_together(experiment, tmp_path / "stopped", 3)
    assert not (tmp_path / "stopped" / "weights").exists()
    train_together(experiment, tmp_path / "stopped")
    for file in (tmp_path / "straight" / "weights").glob("*.safetensors"):
        ours, theirs = load_file(tmp_path / "stopped" / "weights" / file.name), load_file(file)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.dist
def test_checkpoints_of_two_are_read_by_one_and_back(tmp_path):
    two = toy_with_target(parallel=Parallel(shard=2))
    one = toy_with_target()
    train(one, tmp_path / "straight")
    stop_together(two, tmp_path / "run", 2)
    # What one process reads is what two wrote; and what it writes, two read.
    as_one = Trainer(one, tmp_path / "run")
    assert as_one.state.step == 2
    assert {"target", "optimizer"} <= {name.split(".")[0] for name in everything(as_one.state)}
    assert_same(Trainer(one, tmp_path / "run").state, as_one.state)
    assert Model.load(tmp_path / "run").step == 2
    train(one, tmp_path / "run", stop_at=4)
    train_together(two, tmp_path / "run")
    assert_near_weights(tmp_path / "run", tmp_path / "straight")


@pytest.mark.dist
def test_every_process_stops_after_the_same_step(tmp_path):
    """The test's stop is seen by the first process only."""
    script = STOPPED.replace("int(sys.argv[3])", "int(sys.argv[3]) if here.is_main else None")
    config = tmp_path / "config.yaml"
    save_yaml(toy(), config)
    for process, out, err in torchrun(["-c", script], config, tmp_path / "run", 3):
        assert process.returncode == 0, f"{out}\n{err}"
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000003"


@pytest.mark.dist
def test_mistakes_end_every_process(tmp_path):
    """No process waits for one that has given up."""
    cases = [
        (toy(batch_size=15), "batch_size: 15 given"),
        (toy(parallel=Parallel(shard=3)), "parallel.shard: 3 given for 2 processes"),
    ]
    for number, (experiment, text) in enumerate(cases):
        config = tmp_path / f"{number}.yaml"
        save_yaml(experiment, config)
        for process, _, err in torchrun(
            ["train.py"], "--config", config, "--run-dir", tmp_path / "run"
        ):
            assert process.returncode == 2
            assert text in err
    stop_together(toy(), tmp_path / "run", 1)
    (tmp_path / "run" / "checkpoints" / "step_00000001" / "__0_0.distcp").write_bytes(b"")
    config = tmp_path / "stop.yaml"
    for process, _, err in torchrun(
        ["train.py"], "--config", config, "--run-dir", tmp_path / "run"
    ):
        assert process.returncode == 2
        assert "__0_0.distcp was truncated or altered" in err
    with pytest.raises(CheckpointError):
        Trainer(toy(), tmp_path / "run")


@pytest.mark.dist
def test_two_processes_sample_and_evaluate_as_one(tmp_path):
    """The files are equal to the bit; sums of features are added in another order."""
    run = tmp_path / "run"
    train(toy(steps=1), run)
    words = ["sample", run, "--steps", "2", "--seeds", "0-69", "--batch", "20", "--out"]
    assert cli.main([*map(str, words), str(tmp_path / "one.safetensors")]) == 0
    assert cli.main(["evaluate", str(run), "evaluation.batch_size=20"]) == 0
    alone = results.read(run / "results.json")
    ended = torchrun(["-m", "fastflow"], *words, tmp_path / "two.safetensors")
    ended += torchrun(
        ["-m", "fastflow"], "evaluate", run, "evaluation.batch_size=20", "--keep-samples"
    )
    for process, out, err in ended:
        assert process.returncode == 0, f"{out}\n{err}"
    assert [out == "" for _, out, _ in ended] == [False, True] * 2
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(list((run / "samples").glob("*/seeds_*.safetensors"))) == 8
    for row, single in zip(results.read(run / "results.json"), alone, strict=True):
        assert row.value == pytest.approx(single.value, rel=1e-9)
        assert row.hardware.startswith("2 x ")


@pytest.mark.dist
def test_all_processes_train_the_prerequisites_first(tmp_path):
    teacher = toy(name="teacher")
    save_yaml(teacher, tmp_path / "teacher.yaml")
    source = Prerequisite(config=str(tmp_path / "teacher.yaml"), run_dir=str(tmp_path / "teacher"))
    student = toy_with_teacher(tmp_path / "teacher", prerequisites=(source,))
    ended = train_together(student, tmp_path / "student")
    (_, out, _), (_, silent, _) = ended
    assert out.count("first ") == 1
    assert silent == ""
    assert Model.load(tmp_path / "student").step == student.steps
    train(teacher, tmp_path / "one")
    assert_near(tmp_path / "teacher", tmp_path / "one")
