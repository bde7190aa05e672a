"""Runs that need other runs: trained by one command, in order, each once, or refused at once."""

import dataclasses
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastflow import cli
from fastflow.config import from_plain, load_experiment, save_yaml
from fastflow.experiment import Prerequisite
from fastflow.model import Model
from fastflow.run_dir import steps_done
from fastflow.trainer import Trainer
from methods.edm import EDM
from tiny import OBSERVERS, digits, drivers, toy, toy_with_teacher

TEACHER, STUDENT, FINAL = Path("runs/edm"), Path("runs/tiny_teacher"), Path("runs/tiny_toy")


def edm(**changes):
    """A denoiser, which needs nothing."""
    return toy(
        name="tiny_edm", method=EDM(), callbacks=(*drivers()[1:], *OBSERVERS), steps=4, **changes
    )


def distilled(**changes):
    """A student of `edm`."""
    needs = (Prerequisite(config="edm.yaml", run_dir=str(TEACHER)),)
    return toy_with_teacher(TEACHER, **{"prerequisites": needs, "steps": 3, **changes})


def tuned(**changes):
    """Trained on from `distilled`."""
    needs = (Prerequisite(config="distilled.yaml", run_dir=str(STUDENT)),)
    changes = {"init_from": str(STUDENT), "prerequisites": needs, "steps": 2, **changes}
    return toy(**changes)


@pytest.fixture
def call(capsys):
    """Run a command; returns its status, stdout and the lines of stderr."""

    def run(*words):
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return run


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, with the three configurations."""
    monkeypatch.chdir(tmp_path)
    for experiment, name in ((edm(), "edm"), (distilled(), "distilled"), (tuned(), "tuned")):
        save_yaml(experiment, f"{name}.yaml")
    return tmp_path


def weights(run_dir):
    files = sorted((run_dir / "weights").glob("*.safetensors"))
    return {f"{f.name}/{name}": v for f in files for name, v in load_file(f).items()}


def assert_same_weights(run_dir, other):
    ours, theirs = weights(run_dir), weights(other)
    assert ours.keys() == theirs.keys() != set()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def first(out):
    """The runs that a command said it trains first."""
    return [line for line in out.splitlines() if line.startswith("first ")]


def test_one_command_trains_the_chain_and_the_same_weights_as_three(call, folder, monkeypatch):
    status, out, _ = call("train", "--config", "tuned.yaml")
    assert status == 0
    assert first(out) == [
        "first runs/edm: new, 4 steps of edm.yaml",
        "first runs/tiny_teacher: new, 3 steps of distilled.yaml",
    ]
    assert "trained 2 steps; weights are in runs/tiny_toy/weights" in out
    (folder / "apart").mkdir()
    shutil.copy("edm.yaml", "apart")
    shutil.copy("distilled.yaml", "apart")
    shutil.copy("tuned.yaml", "apart")
    monkeypatch.chdir(folder / "apart")
    for name, run in (("edm", TEACHER), ("distilled", STUDENT), ("tuned", FINAL)):
        words = ("--config", f"{name}.yaml", "--run-dir", run, "--no-prerequisites")
        status, out, _ = call("train", *words)
        assert (status, first(out)) == (0, [])
    for run in (TEACHER, STUDENT, FINAL):
        assert_same_weights(folder / run, folder / "apart" / run)


def test_what_is_finished_is_not_trained_again(call):
    assert call("train", "--config", "distilled.yaml")[0] == 0
    # A finished run needs neither what it started from nor its checkpoints.
    shutil.rmtree(TEACHER)
    shutil.rmtree(STUDENT / "checkpoints")
    before = {path: path.stat().st_mtime_ns for path in STUDENT.rglob("*")}
    status, out, _ = call("train", "--config", "tuned.yaml")
    assert (status, first(out)) == (0, [])
    assert not TEACHER.exists()
    assert {path: path.stat().st_mtime_ns for path in STUDENT.rglob("*")} == before
    status, out, _ = call("train", "--config", "tuned.yaml")
    assert "already finished at step 2" in " ".join(out.split())


def test_a_finished_run_does_not_bring_back_what_it_needed(call):
    assert call("train", "--config", "distilled.yaml")[0] == 0
    shutil.rmtree(TEACHER)
    status, _, err = call("train", "--config", "distilled.yaml")
    assert status == 2
    assert f"weights {TEACHER} do not exist" in err[0]
    assert not TEACHER.exists()


def stop_after(monkeypatch, name, step, number):
    """Send a signal to this process in a step of the run of that name."""
    trained = Trainer._step

    def stepped(trainer, batch):
        trained(trainer, batch)
        if trainer.experiment.name == name and trainer.state.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_step", stepped)


@pytest.mark.parametrize(("step", "status"), [(2, 130), (4, 143)])
def test_a_signal_stops_everything_and_the_same_command_goes_on(step, status, call, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, "tiny_edm", step, signal.Signals(status - 128))
        got, out, err = call("train", "--config", "distilled.yaml")
    assert got == status
    name = signal.Signals(status - 128).name
    assert f"stopped by {name} after step {step} of 4, which is saved" in out
    assert any("stopping after this step" in line for line in err)
    assert steps_done(TEACHER) == step
    assert not STUDENT.exists()
    got, out, _ = call("train", "--config", "distilled.yaml")
    assert got == 0
    expected = ["first runs/edm: at step 2, 4 steps of edm.yaml"] if step < 4 else []
    assert first(out) == expected
    assert call("train", "--config", "edm.yaml", "--run-dir", "straight")[0] == 0
    assert_same_weights(TEACHER, Path("straight"))


def test_without_prerequisites_one_line_has_the_commands(call, folder):
    save_yaml(edm(batch_size=8), "other.yaml")
    needs = Prerequisite(config="other.yaml", run_dir=str(TEACHER), overrides=("batch_size=16",))
    save_yaml(distilled(prerequisites=(needs,)), "distilled.yaml")
    before = sorted(folder.rglob("*"))
    words = ("train", "--config", "tuned.yaml", "--device", "cpu")
    status, out, err = call(*words, "--no-prerequisites")
    assert (status, out, len(err)) == (2, "", 1)
    assert sorted(folder.rglob("*")) == before
    text, _, commands = err[0].partition("; train with: ")
    assert text == "fastflow: not finished, but needed first: runs/edm, runs/tiny_teacher"
    for command in commands.split(" && "):
        program, *rest = shlex.split(command)
        assert program == "fastflow"
        assert call(*rest)[0] == 0
    assert load_experiment(TEACHER / "experiment.yaml").batch_size == 16
    status, out, _ = call(*words, "--no-prerequisites")
    assert (status, first(out)) == (0, [])


def test_a_dry_run_and_the_doctor_say_what_would_be_trained(call, folder):
    before = sorted(folder.rglob("*"))
    status, out, err = call("train", "--config", "tuned.yaml", "--dry-run", "seed=3")
    assert (status, err) == (0, [])
    assert out.splitlines()[:2] == [
        "# first runs/edm: new, 4 steps of edm.yaml",
        "# first runs/tiny_teacher: new, 3 steps of distilled.yaml",
    ]
    assert from_plain(yaml.safe_load(out)) == tuned(seed=3)
    status, out, _ = call("doctor", "--config", "tuned.yaml")
    assert status == 0
    assert "runs/edm: new, 4 steps of edm.yaml: 'fastflow train' trains it before" in out
    assert "callbacks fit; weights are yet to be trained" in out
    assert sorted(folder.rglob("*")) == before
    assert call("train", "--config", "distilled.yaml")[0] == 0
    status, out, _ = call("doctor", "--config", "tuned.yaml")
    assert (status, "trains it before" in out, "M parameters" in out) == (0, False, True)


def test_the_run_directory_of_the_run_moves_nothing_else(call):
    assert call("train", "--config", "distilled.yaml", "--run-dir", "elsewhere/run")[0] == 0
    assert Model.load(Path("elsewhere/run")).step == 3
    assert Model.load(TEACHER).step == 4


def test_what_no_weights_name_is_not_trained(call):
    """Who gives weights of their own on the command line needs no teacher of ours."""
    assert call("train", "--config", "edm.yaml", "--run-dir", "mine")[0] == 0
    change = "method.teacher.source.weights=mine"
    status, out, _ = call("train", "--config", "distilled.yaml", change)
    assert (status, first(out)) == (0, [])
    assert not TEACHER.exists()
    # The folder of weights within the run counts as the run.
    change = f"method.teacher.source.weights={TEACHER}/weights"
    words = ("--config", "distilled.yaml", "--run-dir", "again", change)
    assert first(call("train", *words)[1]) == ["first runs/edm: new, 4 steps of edm.yaml"]


def test_a_run_that_two_need_is_trained_once(call):
    needs = (*tuned().prerequisites, *distilled().prerequisites)
    method = distilled().method
    callbacks = distilled().callbacks
    save_yaml(tuned(prerequisites=needs, method=method, callbacks=callbacks), "both.yaml")
    status, out, _ = call("train", "--config", "both.yaml")
    assert status == 0
    assert [line.split(":")[0] for line in first(out)] == ["first runs/edm", f"first {STUDENT}"]


def needing(**changes):
    """`distilled` with another description of its teacher."""
    [source] = distilled().prerequisites
    return distilled(prerequisites=(dataclasses.replace(source, **changes),))


def a_cycle():
    needs = (Prerequisite(config="tuned.yaml", run_dir=str(FINAL)),)
    save_yaml(distilled(prerequisites=needs, init_from=str(FINAL)), "distilled.yaml")


def another_run():
    assert cli.main(["train", "--config", "edm.yaml", "--run-dir", str(TEACHER), "seed=7"]) == 0


def two_descriptions():
    other = Prerequisite(config="edm.yaml", run_dir=str(TEACHER), overrides=("seed=1",))
    changes = {"method": distilled().method, "callbacks": distilled().callbacks}
    save_yaml(tuned(prerequisites=(*tuned().prerequisites, other), **changes), "tuned.yaml")


def no_checkpoint():
    words = ["train", "--config", "edm.yaml", "--run-dir", str(TEACHER)]
    assert cli.main([*words, "steps=2"]) == 0
    shutil.rmtree(TEACHER / "checkpoints")
    save_yaml(edm(), TEACHER / "experiment.yaml")


def occupied():
    TEACHER.mkdir(parents=True)
    (TEACHER / "thesis.tex").write_text("")


MISTAKES = {
    "no configuration": (
        lambda: save_yaml(needing(config="emd.yaml"), "distilled.yaml"),
        ["prerequisites.0: prerequisites.0: emd.yaml: no such file", "'edm.yaml'"],
    ),
    "no experiment": (
        lambda: Path("edm.yaml").write_text("steps: 3\n"),
        ["prerequisites.0: prerequisites.0: edm.yaml: describes"],
    ),
    "override": (
        lambda: save_yaml(needing(overrides=("stps=3",)), "distilled.yaml"),
        ["prerequisites.0: prerequisites.0: stps", "'steps'"],
    ),
    "cycle": (
        a_cycle,
        [f"{FINAL} needs {STUDENT} needs {FINAL}: no run can come before itself"],
    ),
    "another run": (
        another_run,
        [f"{TEACHER} holds a run of another configuration (seed: 7 -> 0)", "another run_dir"],
    ),
    "something else": (occupied, [f"{TEACHER} is not empty and holds no run", "another run_dir"]),
    "two descriptions": (
        two_descriptions,
        [f"prerequisites.1: {TEACHER} is asked for in two configurations (seed: 0 -> 1)"],
    ),
    "no checkpoint": (no_checkpoint, [f"{TEACHER} holds trained weights but no checkpoint"]),
    "held by another": (
        lambda: save_yaml(tuned(seed=5), FINAL_HELD),
        [f"{FINAL} holds a run of another configuration (seed: 5 -> 0)", "--run-dir"],
    ),
    "teacher cannot work": (
        lambda: save_yaml(dataclasses.replace(edm(), network=digits().network), "edm.yaml"),
        ["edm.yaml: network: made for samples (1, 8, 8)"],
    ),
    "the run itself cannot work": (
        lambda: save_yaml(tuned(callbacks=OBSERVERS), "tuned.yaml"),
        ["CTScheduleCallback"],
    ),
}
FINAL_HELD = FINAL / "experiment.yaml"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_before_anything_is_trained(mistake, call, folder, capsys):
    make, parts = MISTAKES[mistake]
    FINAL.mkdir(parents=True)
    make()
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    status, out, err = call("train", "--config", "tuned.yaml")
    assert (status, out, len(err)) == (2, "", 1)
    assert err[0].startswith("fastflow: ")
    for part in parts:
        assert part in err[0]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_prerequisite_may_move_within_a_run(call, folder):
    """How the initial weights were made does not change the run; which they are does."""
    assert call("train", "--config", "distilled.yaml")[0] == 0
    (folder / "moved").mkdir()
    Path("edm.yaml").rename("moved/edm.yaml")
    save_yaml(needing(config="moved/edm.yaml"), "distilled.yaml")
    status, out, _ = call("train", "--config", "distilled.yaml")
    assert status == 0
    assert "already finished" in out
    stored = load_experiment(STUDENT / "experiment.yaml")
    assert stored.prerequisites == needing(config="moved/edm.yaml").prerequisites
