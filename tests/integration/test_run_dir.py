"""A run directory belongs to one experiment; models are found in it."""

import dataclasses
import shutil

import pytest
import torch

from callbacks.ema import EMACallback
from callbacks.jsonl_log import JsonlLog
from callbacks.progress_bar import ProgressBar
from fastflow.config import lazy, load_experiment, override
from fastflow.distributed import World
from fastflow.ema import ConstantEMA
from fastflow.errors import CheckpointError, ConfigError
from fastflow.evaluation.spec import Evaluation, Expected
from fastflow.evaluation.toy_metrics import FlowMapError
from fastflow.experiment import Parallel
from fastflow.model import Model
from fastflow.trainer import Trainer
from tiny import OBSERVERS, assert_same, drivers, toy, toy_with_target, train, without_observers


@pytest.fixture
def run_dir(stopped_copy):
    return stopped_copy


def contents(folder):
    return {
        p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


EMA = lazy(EMACallback, law=ConstantEMA(beta=0.5))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda e: override(e, ["batch_size=32"]), "batch_size: 16 -> 32"),
        (lambda e: override(e, ["optimizer.lr=0.1"]), r"optimizer\.lr: 0\.001 -> 0\.1"),
        (lambda e: override(e, ["method.distance.c=0.1"]), r"method\.distance\.c: 0\.03 -> 0\.1"),
        (lambda e: override(e, ["seed=1", "steps=9"]), "(steps: 6 -> 9; seed: 0 -> 1|seed.*steps)"),
        (lambda e: override(e, ["precision=bf16"]), "precision: 'fp32' -> 'bf16'"),
        (lambda e: override(e, ["name=other"]), "name: 'tiny_toy' -> 'other'"),
        (lambda e: override(e, ["data.modes=5"]), r"data\.modes: 4 -> 5"),
        (
            lambda e: dataclasses.replace(e, callbacks=(*e.callbacks, EMA)),
            r"callbacks\.5: \(absent\) -> .*EMACallback",
        ),
        (
            lambda e: override(e, ["callbacks.0.schedule.q=4.0"]),
            r"callbacks\.0\.schedule\.q: 2\.0 -> 4\.0",
        ),
        (lambda e: toy_with_target(), "name: .*method.pairs"),
    ],
)
def test_another_configuration_is_refused_and_nothing_is_changed(change, text, run_dir):
    before = contents(run_dir)
    with pytest.raises(ConfigError, match=text) as caught:
        Trainer(change(toy()), run_dir)
    assert "holds a run of another configuration" in str(caught.value)
    assert "--run-dir" in str(caught.value)
    assert contents(run_dir) == before


def test_what_does_not_change_the_weights_may_differ(run_dir, tmp_path):
    changed = dataclasses.replace(
        without_observers(toy()),
        callbacks=(lazy(ProgressBar), *drivers(), lazy(JsonlLog, every=1)),
        evaluation=Evaluation(
            metrics=(FlowMapError(),),
            samples=8,
            steps=(2,),
            times={2: (1.0,)},
            seed=3,
            blocks=2,
            batch_size=7,
            quantisation="floor",
        ),
        expected=(Expected(steps=1, value=3.0, source="somewhere"),),
        published={"lr": "1"},
        parallel=Parallel(checkpoint=True),
    )
    state = train(changed, run_dir)
    assert_same(state, train(toy(), tmp_path / "straight"))
    assert load_experiment(run_dir / "experiment.yaml") == changed


def test_a_refused_start_does_not_rename_the_run(run_dir):
    """That no checkpoint is good is found before the stored experiment is replaced."""
    stored = (run_dir / "experiment.yaml").read_bytes()
    for folder in (run_dir / "checkpoints").glob("step_*"):
        (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError):
        Trainer(without_observers(toy()), run_dir)
    assert (run_dir / "experiment.yaml").read_bytes() == stored


def test_a_mistake_leaves_no_directory_behind_and_can_be_corrected(tmp_path):
    twice = (*drivers(), lazy(EMACallback, law=ConstantEMA(beta=0.9)))
    with pytest.raises(ConfigError, match="own name"):
        Trainer(toy(callbacks=twice), tmp_path / "run")
    assert train(toy(steps=1), tmp_path / "run").step == 1


def test_foreign_directories_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="full is not empty and holds no run"):
        Trainer(toy(), tmp_path / "full")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"run directory .* cannot be used: Not a directory"):
            Trainer(toy(), path)
    (tmp_path / "empty").mkdir()
    Trainer(toy(), tmp_path / "empty")
    assert {p.name for p in (tmp_path / "empty").iterdir()} == {"experiment.yaml", ".lock"}


def test_what_a_run_leaves_that_was_killed_at_once_is_no_foreign_directory(tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".lock", ".experiment.yaml.partial"):
        (tmp_path / "run" / name).write_text("")
    assert train(toy(steps=1), tmp_path / "run").step == 1


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fastflow.run_dir.save_yaml", fail)
    with pytest.raises(ConfigError, match="cannot be used: Permission denied; choose another"):
        Trainer(toy(), tmp_path / "run")


@pytest.mark.parametrize("text", ["", "a: [", "name: x", "- 1"])
def test_a_spoilt_experiment_file_is_refused(text, run_dir):
    (run_dir / "experiment.yaml").write_text(text)
    before = contents(run_dir)
    with pytest.raises(ConfigError, match=r"experiment\.yaml"):
        Trainer(toy(), run_dir)
    with pytest.raises((ConfigError, CheckpointError), match=r"experiment\.yaml"):
        Model.load(run_dir)
    assert contents(run_dir) == before


# Finding a model


def test_a_model_of_a_finished_run(tmp_path):
    state = train(toy(), tmp_path / "run")
    for source in (tmp_path / "run", tmp_path / "run" / "weights"):
        model = Model.load(source)
        assert (model.weights_name, model.step, model.images) == ("ema_0.9", 6, 96)
        assert model.experiment == toy()
        for name, value in model.network.state_dict().items():
            assert torch.equal(value, state.emas["ema_0.9"].state_dict()[name])
        student = Model.load(source, "student")
        for name, value in student.network.state_dict().items():
            assert torch.equal(value, state.networks.student.state_dict()[name])
    files = sorted(p.name for p in (tmp_path / "run" / "weights").iterdir())
    emas = ["ema_0.9.safetensors", "ema_std0.1.safetensors"]
    assert files == [*emas, "model.yaml", "student.safetensors"]


def test_a_model_of_an_unfinished_run_is_its_latest_checkpoint(stopped):
    model = Model.load(stopped, "ema_std0.1")
    assert (model.weights_name, model.step, model.images) == ("ema_std0.1", 5, 80)
    trainer = Trainer(toy(), shutil.copytree(stopped, stopped.parent / "copy"))
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, trainer.state.emas["ema_std0.1"].state_dict()[name])


def test_a_weights_folder_travels_alone(tmp_path):
    train(toy(steps=1), tmp_path / "run")
    (tmp_path / "run" / "weights").rename(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "run")
    assert Model.load(tmp_path / "elsewhere").sample(range(3)).shape == (3, 2)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda d: shutil.rmtree(d), "holds no trained model"),
        (lambda d: shutil.rmtree(d / "checkpoints"), "no checkpoint and no weights yet"),
        (lambda d: (d / "experiment.yaml").unlink(), "holds no trained model"),
    ],
)
def test_no_model_is_an_error(spoil, text, run_dir):
    spoil(run_dir)
    with pytest.raises(CheckpointError, match=text):
        Model.load(run_dir)


def test_unknown_weights_name_those_that_are_there(stopped):
    with pytest.raises(CheckpointError, match=r"'ema_0\.8': did you mean 'ema_0\.9'\?.* student"):
        Model.load(stopped, "ema_0.8")


@pytest.mark.parametrize("text", ["", "step: 1", "step: x\nimages: 1\nweights: []\nexperiment: 3"])
def test_a_spoilt_model_description_is_an_error(text, tmp_path):
    train(toy(steps=1, callbacks=(*drivers(), *OBSERVERS)), tmp_path / "run")
    (tmp_path / "run" / "weights" / "model.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.yaml is no model description"):
        Model.load(tmp_path / "run" / "weights")


def test_the_cost_of_training_is_kept_across_a_resume(tmp_path):
    halfway = train(toy(), tmp_path / "run", stop_at=2).seconds
    assert halfway > 0
    resumed = Trainer(toy(), tmp_path / "run")
    assert resumed.state.seconds == halfway
    assert resumed.fit().seconds > halfway
    model = Model.load(tmp_path / "run")
    assert model.seconds == resumed.state.seconds
    assert model.hardware == World().hardware


def test_a_departure_that_was_given_is_not_reported():
    published = {"init_from": "weights of a teacher", "lr": "1"}
    experiment = dataclasses.replace(toy(), published=published)
    assert experiment.departures == published
    assert dataclasses.replace(experiment, init_from="w.safetensors").departures == {"lr": "1"}
