"""Models out of training checkpoints: the bits of the run, usable wherever a model is."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from fastflow.cli import main
from fastflow.errors import CheckpointError, ConfigError
from fastflow.export import export_checkpoint
from fastflow.method import Frozen
from fastflow.model import Model
from fastflow.trainer import Trainer
from fastflow.weights import read_header
from methods.tcm import TCM
from tiny import MLP, digits, drivers, toy, train


def test_any_checkpoint_becomes_a_model(stopped_copy, capsys):
    assert main(["export", str(stopped_copy)]) == 0
    assert "step 5: ema_0.9, ema_std0.1, student written to" in capsys.readouterr().out
    four = stopped_copy / "checkpoints" / "step_00000004"
    assert main(["export", str(four), "--output", str(stopped_copy / "four")]) == 0
    state = Trainer(toy(), stopped_copy).state
    folder = stopped_copy / "exported" / "step_00000005"
    model = Model.load(folder)
    assert (model.step, model.images, model.weights_name) == (5, 80, "ema_0.9")
    assert model.seconds == state.seconds > 0
    for name, weights in (("student", state.networks.student), *state.emas.items()):
        stored = load_file(folder / f"{name}.safetensors")
        own = weights.state_dict()
        assert stored.keys() == own.keys()
        assert all(torch.equal(stored[n], own[n]) for n in own)
    assert Model.load(stopped_copy / "four").step == 4
    assert not (stopped_copy / "weights").exists()


def test_an_exported_model_is_sampled_evaluated_and_started_from(stopped_copy, tmp_path):
    folder = tmp_path / "alone"
    export_checkpoint(stopped_copy, folder)
    shutil.rmtree(stopped_copy)
    assert Model.load(folder).sample(range(3), 2).shape == (3, 2)
    assert main(["evaluate", str(folder), "evaluation.samples=8"]) == 0
    trainer = Trainer(toy(init_from=str(folder)), tmp_path / "run")
    for name, value in Model.load(folder).network.state_dict().items():
        assert torch.equal(value, trainer.state.networks.student.state_dict()[name])


def test_it_is_what_the_end_of_training_writes(tmp_path):
    """With a companion that sampling needs, and with classes."""
    two_stages = toy(method=TCM(stage1=Frozen(weights=None, network=MLP)), callbacks=drivers())
    for experiment in (two_stages, digits(steps=2)):
        run_dir = tmp_path / experiment.name
        train(experiment, run_dir)
        export_checkpoint(run_dir)
        (folder,) = (run_dir / "exported").iterdir()
        assert contents(folder) == contents(run_dir / "weights")
    assert "companion_stage1.safetensors" in contents(tmp_path / "tiny_toy" / "weights")


def contents(folder):
    found = {"model.yaml": (folder / "model.yaml").read_text()}
    for path in folder.glob("*.safetensors"):
        tensors = {name: value.tolist() for name, value in load_file(path).items()}
        found[path.name] = (read_header(path), tensors)
    return found


def test_a_damaged_checkpoint_is_not_exported(stopped_copy, capsys):
    five = stopped_copy / "checkpoints" / "step_00000005"
    (five / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp was truncated .*export another"):
        export_checkpoint(five)
    assert export_checkpoint(stopped_copy).step == 4
    assert "__0_0.distcp was truncated or altered" in capsys.readouterr().err


def test_mistakes_write_nothing(stopped_copy, tmp_path):
    before, root = sorted(stopped_copy.rglob("*")), stopped_copy / "checkpoints"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for source, output, kind, text in (
        (tmp_path / "full", None, CheckpointError, "neither a run directory"),
        (tmp_path / "nowhere", None, CheckpointError, "neither a run directory"),
        (root / "step_00000009", None, CheckpointError, "meta.json is missing"),
        (stopped_copy, tmp_path / "full", ConfigError, "full is there already; name another"),
        (stopped_copy, tmp_path / "full" / "thesis.tex", ConfigError, "is there already"),
    ):
        with pytest.raises(kind, match=text):
            export_checkpoint(source, output)
    assert sorted(stopped_copy.rglob("*")) == before
    fresh = tmp_path / "fresh"
    Trainer(toy(), fresh)
    with pytest.raises(CheckpointError, match="fresh holds no checkpoint"):
        export_checkpoint(fresh)
