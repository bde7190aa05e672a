"""Checkpoints: whole or not there, verified when read, never a silent fresh start."""

import dataclasses
import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from callbacks.checkpoint import CheckpointCallback
from fastflow import checkpoint
from fastflow.config import lazy
from fastflow.errors import CheckpointError
from fastflow.model import Model
from fastflow.trainer import Trainer
from tiny import assert_same, digits, drivers, toy, toy_with_teacher, train


@pytest.fixture
def run_dir(stopped_copy):
    return stopped_copy


def contents(folder):
    """All files but the lock, which is left by whoever tried."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {p.relative_to(folder): p.read_bytes() for p in found}


FILES = ("__0_0.distcp", ".metadata", "meta.json")


def damage(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:  # one bit in the middle
        at = len(data) // 2
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "altered"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(name, how, run_dir, capsys):
    bad = run_dir / "checkpoints" / "step_00000005" / name
    damage(bad, how)
    before = contents(run_dir)
    assert Model.load(run_dir).step == 4
    assert contents(run_dir) == before
    warning = _one_line(capsys)
    assert f"{bad} {'is missing' if how == 'missing' else 'was truncated or altered'}" in warning
    assert "using" in warning
    assert "step_00000004" in warning
    assert Trainer(toy(), run_dir).state.step == 4
    warning = _one_line(capsys)
    assert str(bad) in warning
    assert f"going on from {run_dir}/checkpoints/step_00000004" in warning
    assert "kept: damaged_step_00000005" in warning
    assert Trainer(toy(), run_dir).state.step == 4
    assert capsys.readouterr().err == ""  # it was said once, and nothing is wrong any more


def _one_line(capsys):
    err = capsys.readouterr().err
    assert err.startswith("fastflow: ")
    assert err.count("\n") == 1
    return err


def test_a_damaged_checkpoint_is_saved_again_and_kept_aside(run_dir, tmp_path):
    experiment = toy(callbacks=(*drivers(), lazy(CheckpointCallback, every=1)))
    root = run_dir / "checkpoints"
    for _ in range(2):
        damage(root / "step_00000005" / "__0_0.distcp", "truncated")
        (root / "latest").write_text("step_00000005")
        shutil.rmtree(root / "step_00000006", ignore_errors=True)
        state = train(experiment, run_dir)
    assert_same(state, train(experiment, tmp_path / "straight"))
    assert saved_steps(run_dir) == [4, 5, 6]
    kept = ["damaged_step_00000005", "damaged_step_00000005.2"]
    assert sorted(p.name for p in root.glob("damaged_*")) == kept


def test_when_none_is_good_all_are_named(run_dir):
    for step, name in ((4, "meta.json"), (5, "__0_0.distcp")):
        damage(run_dir / "checkpoints" / f"step_0000000{step}" / name, "missing")
    before = contents(run_dir)
    for use in (lambda: Trainer(toy(), run_dir), lambda: Model.load(run_dir)):
        with pytest.raises(CheckpointError) as caught:
            use()
        text = str(caught.value)
        assert f"no checkpoint of {run_dir} is good" in text
        assert "step_00000004/meta.json is missing" in text
        assert "step_00000005/__0_0.distcp is missing" in text
        assert "\n" not in text
    assert contents(run_dir) == before


def test_every_number_of_meta_json_is_sealed(run_dir, capsys):
    path = run_dir / "checkpoints" / "step_00000005" / "meta.json"
    path.write_text(path.read_text().replace('"step": 5', '"step": 3'))
    Trainer(toy(), run_dir)
    assert "meta.json was truncated or altered" in _one_line(capsys)


def test_swapped_checkpoints_are_found_out(run_dir):
    root = run_dir / "checkpoints"
    (root / "step_00000004").rename(root / "other")
    (root / "step_00000005").rename(root / "step_00000004")
    (root / "other").rename(root / "step_00000005")
    with pytest.raises(CheckpointError, match="step_00000005 holds the checkpoint of step 4; .*"):
        Trainer(toy(), run_dir)


@pytest.mark.parametrize("name", [None, b"step_00000099", b"", b"nonsense", b"\xff\xfe\x00"])
def test_without_a_pointer_the_newest_good_checkpoint_is_used(name, run_dir, capsys):
    """As after a kill between the first checkpoint and the pointer to it."""
    pointer = run_dir / "checkpoints" / "latest"
    pointer.unlink()
    if name is not None:
        pointer.write_bytes(name)
    assert Trainer(toy(), run_dir).state.step == 5
    assert f"{pointer} names no checkpoint that is there" in _one_line(capsys)
    assert pointer.read_text() == "step_00000005"


def test_a_pointer_without_any_checkpoint_is_an_error(run_dir):
    for folder in (run_dir / "checkpoints").glob("step_*"):
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="latest names a checkpoint, but there is none"):
        Trainer(toy(), run_dir)


def test_one_can_go_back_to_an_earlier_checkpoint(run_dir, tmp_path, capsys):
    (run_dir / "checkpoints" / "latest").write_text("step_00000004\n")
    state = train(toy(), run_dir)
    assert "names step_00000004, though there is step_00000005" in _one_line(capsys)
    assert_same(state, train(toy(), tmp_path / "straight"))
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000006"


def test_weights_without_a_checkpoint_are_not_trained_over(tmp_path):
    train(toy(steps=1), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="trained weights but no checkpoint"):
        Trainer(toy(steps=1), tmp_path / "run")


def test_a_checkpoint_of_other_code_is_refused(run_dir, monkeypatch):
    """The configuration is the same, but the network has other parameters now."""
    from networks import mlp

    before = mlp.MLPBlock.__init__

    def widened(self, width):
        before(self, width)
        self.extra = torch.nn.Linear(width, width)

    monkeypatch.setattr(mlp.MLPBlock, "__init__", widened)
    with pytest.raises(CheckpointError, match=r"missing: model\.blocks\.0\.extra\.bias"):
        Trainer(toy(), run_dir)

    def renamed(self, width):
        before(self, width)
        self.linear0 = torch.nn.Linear(width, width, bias=False)

    monkeypatch.setattr(mlp.MLPBlock, "__init__", renamed)
    with pytest.raises(CheckpointError, match=r"unexpected: model\.blocks\.0\.linear0\.bias"):
        Trainer(toy(), run_dir)


def test_a_checkpoint_of_other_shapes_is_refused(run_dir, monkeypatch):
    from networks import mlp

    monkeypatch.setattr(mlp, "_FEATURES", 12)
    with pytest.raises(CheckpointError, match="step_00000005 does not fit the network"):
        Trainer(toy(), run_dir)


# Saving


def saved_steps(run_dir):
    folders = (run_dir / "checkpoints").glob("step_*")
    return sorted(int(folder.name.removeprefix("step_")) for folder in folders)


def test_the_newest_are_kept(tmp_path):
    callbacks = (*drivers(), lazy(CheckpointCallback, every=1, keep=2))
    experiment = toy(callbacks=callbacks)
    train(experiment, tmp_path / "run", stop_at=4)
    assert saved_steps(tmp_path / "run") == [3, 4]
    # Going back: the later ones are not in the way, and the latest is never removed.
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000003")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    shutil.copytree(
        tmp_path / "run" / "checkpoints" / "step_00000003",
        tmp_path / "run" / "checkpoints" / "step_00000009",
    )
    state = train(experiment, tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [5, 6, 9]
    assert checkpoint.latest(tmp_path / "run").name == "step_00000006"
    assert_same(state, train(experiment, tmp_path / "straight"))


def test_those_of_some_steps_are_kept_for_ever(tmp_path):
    callbacks = (*drivers(), lazy(CheckpointCallback, every=1, keep=1, keep_every=2))
    train(toy(callbacks=callbacks), tmp_path / "run", stop_at=5)
    assert saved_steps(tmp_path / "run") == [2, 4, 5]


def test_killed_while_saving_leaves_the_last_one_valid(run_dir, tmp_path):
    """What a kill leaves: files under a temporary name."""
    partial = run_dir / "checkpoints" / ".partial_step_00000006"
    shutil.copytree(run_dir / "checkpoints" / "step_00000005", partial)
    (partial / "meta.json").unlink()
    trainer = Trainer(toy(), run_dir)
    assert trainer.state.step == 5
    assert not list((run_dir / "checkpoints").glob(".partial*"))
    assert_same(trainer.fit(), train(toy(), tmp_path / "straight"))


def test_a_failing_disk_at_the_end_is_told(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastflow.weights.save_file", fail)
    with pytest.raises(CheckpointError, match=r"ema_0\.9\.safetensors: .*No space left"):
        train(toy(steps=1), tmp_path / "run")
    monkeypatch.undo()
    train(toy(steps=1), tmp_path / "run")
    assert Model.load(tmp_path / "run").step == 1


def test_one_process_saves_and_loads_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(toy(steps=2), tmp_path / "run", stop_at=1)
        train(toy(steps=2), tmp_path / "run")
        Model.load(tmp_path / "run")


# Weights to start from


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Exported weights of a toy run."""
    run_dir = tmp_path_factory.mktemp("weights") / "run"
    train(toy(steps=2), run_dir)
    return run_dir


def test_init_from_weights_and_run_directories(weights, stopped, tmp_path):
    for source, wanted in (
        (weights / "weights" / "student.safetensors", Model.load(weights, "student")),
        (weights, Model.load(weights)),  # the first EMA
        (weights / "weights", Model.load(weights)),
        (stopped, Model.load(stopped)),  # unfinished: out of the training checkpoint
    ):
        trainer = Trainer(toy(init_from=str(source)), tmp_path / "run")
        for name, value in trainer.state.networks.student.state_dict().items():
            assert torch.equal(value, wanted.network.state_dict()[name])
        shutil.rmtree(tmp_path / "run")


def test_a_resumed_run_does_not_start_from_init_from_again(weights, tmp_path):
    experiment = toy(init_from=str(weights))
    straight = train(experiment, tmp_path / "straight")
    train(experiment, tmp_path / "run", stop_at=3)
    assert_same(train(experiment, tmp_path / "run"), straight)


def bad_sources(weights, folder):
    """(source, pattern): missing, corrupt, truncated and mismatching weights."""
    good = weights / "weights" / "student.safetensors"
    tensors = load_file(good)
    (folder / "cut.safetensors").write_bytes(good.read_bytes()[:-9])
    (folder / "noise.safetensors").write_bytes(b"\x00" * 500)
    (folder / "empty.safetensors").write_bytes(b"")
    torch.save(tensors, folder / "pickle.pt")
    save_file({"other": torch.zeros(1)}, folder / "nothing.safetensors")
    save_file({"x." + k: v for k, v in tensors.items()}, folder / "prefix.safetensors")
    some = {k: v for k, v in tensors.items() if "last" not in k}
    save_file(some, folder / "some.safetensors")
    wide = {k: torch.zeros(3, *v.shape) for k, v in tensors.items()}
    save_file(wide, folder / "wide.safetensors")
    (folder / "nothing here").mkdir()
    shutil.copytree(weights, folder / "cut run", ignore=shutil.ignore_patterns("checkpoints"))
    damage(folder / "cut run" / "weights" / "ema_0.9.safetensors", "truncated")
    shutil.copytree(weights, folder / "gone", ignore=shutil.ignore_patterns("checkpoints"))
    (folder / "gone" / "weights" / "ema_0.9.safetensors").unlink()
    return [
        ("missing.safetensors", "missing.safetensors do not exist; give"),
        ("cut.safetensors", "cut.safetensors is not a readable safetensors file"),
        ("noise.safetensors", "noise.safetensors is not a readable"),
        ("empty.safetensors", "empty.safetensors is not a readable"),
        ("pickle.pt", r"pickle.pt holds \d+ tensors \(model\..*\) of no network known here"),
        ("nothing.safetensors", r"does not fit the network; missing: .*; unexpected: other"),
        ("prefix.safetensors", r"missing: .* and \d+ more; unexpected: x\."),
        ("some.safetensors", r"missing: model\.last\.bias, model\.last\.weight\."),
        ("wide.safetensors", r"misshapen: .*\(3, 16\) instead of \(16,\)"),
        ("nothing here", "nothing here holds no trained model: give a run directory"),
        ("cut run", r"ema_0\.9\.safetensors is not a readable"),
        ("gone", r"ema_0\.9\.safetensors do not exist"),
    ]


def test_weights_that_are_missing_damaged_or_of_another_network_are_refused(weights, tmp_path):
    for name, text in bad_sources(weights, tmp_path):
        source = str(tmp_path / name)
        teacher = toy_with_teacher(tmp_path / name)
        for experiment in (toy(init_from=source), teacher):
            with pytest.raises(CheckpointError, match=text):
                Trainer(experiment, tmp_path / "run")
            assert not (tmp_path / "run").exists()


def test_a_run_of_another_network_is_refused(weights, tmp_path):
    train(digits(steps=1), tmp_path / "digits")
    with pytest.raises(CheckpointError, match="does not fit the network; missing"):
        Trainer(toy(init_from=str(tmp_path / "digits")), tmp_path / "run")
    shutil.rmtree(tmp_path / "digits" / "weights")  # then out of its checkpoint
    with pytest.raises(CheckpointError, match="does not fit the network; missing"):
        Trainer(toy(init_from=str(tmp_path / "digits")), tmp_path / "run")


def test_meta_tells_what_a_person_wants_to_know(stopped):
    meta = checkpoint.read_meta(stopped / "checkpoints" / "step_00000005")
    assert (meta["step"], meta["images"], meta["world_size"]) == (5, 80, 1)
    assert meta["emas"] == ["ema_0.9", "ema_std0.1"]
    text = (stopped / "checkpoints" / "step_00000005" / "meta.json").read_text()
    assert json.loads(text)["meta"] == meta


def test_a_callback_that_is_new_starts_afresh(run_dir, tmp_path):
    """Observers may be added between runs: there is no state of theirs in the checkpoint."""
    from callbacks.jsonl_log import JsonlLog

    more = dataclasses.replace(toy(), callbacks=(*toy().callbacks, lazy(JsonlLog, every=3)))
    assert_same(train(more, run_dir), train(toy(), tmp_path / "straight"))
