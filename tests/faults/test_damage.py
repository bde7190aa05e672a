"""Fifty ways to damage the files of checkpoints: each is found out, and none is trained on."""

import random
import shutil

import pytest

from callbacks.checkpoint import CheckpointCallback
from fastflow.config import lazy
from fastflow.errors import CheckpointError
from fastflow.trainer import Trainer
from tiny import assert_same, drivers, toy, train

pytestmark = pytest.mark.faults
EXPERIMENT = toy(callbacks=(*drivers(), lazy(CheckpointCallback, every=1, keep=3)))
FILES = ("__0_0.distcp", ".metadata", "meta.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Stopped after step 5 of 6, with checkpoints at 3, 4 and 5."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(EXPERIMENT, run_dir, stop_at=5)
    return run_dir


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return train(EXPERIMENT, tmp_path_factory.mktemp("straight") / "run")


# What is done to a file, given a source of chance.


def delete(path, chance):
    path.unlink()


def empty(path, chance):
    path.write_bytes(b"")


def truncate(path, chance):
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(1, len(data))])


def flip_a_bit(path, chance):
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def zero_a_block(path, chance):
    """As a disk does that lost a sector; not where zeros stood before."""
    data = bytearray(path.read_bytes())
    at = next(i for i in range(chance.randrange(len(data)), len(data) * 2) if data[i % len(data)])
    at %= len(data)
    data[at : at + 512] = bytes(len(data[at : at + 512]))
    path.write_bytes(data)


def append(path, chance):
    path.write_bytes(path.read_bytes() + chance.randbytes(16))


def take_from_another(path, chance):
    other = path.parent.with_name("step_00000004") / path.name
    path.write_bytes(other.read_bytes())


def make_a_folder(path, chance):
    path.unlink()
    path.mkdir()


DAMAGES = (
    delete,
    empty,
    truncate,
    flip_a_bit,
    zero_a_block,
    append,
    take_from_another,
    make_a_folder,
)
IN_FILES = [
    (damage, name, seed)
    for name in FILES
    for damage in DAMAGES
    for seed in range(4 if damage in (truncate, flip_a_bit) else 1)
]


@pytest.mark.parametrize(("damage", "name", "seed"), IN_FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    damage, name, seed, run, tmp_path, capsys
):
    run_dir = shutil.copytree(run, tmp_path / "run")
    bad = run_dir / "checkpoints" / "step_00000005" / name
    damage(bad, random.Random(seed))
    trainer = Trainer(EXPERIMENT, run_dir)
    assert trainer.state.step == 4
    said = capsys.readouterr().err
    assert str(bad) in said or "step_00000005 holds the checkpoint of step 4" in said
    assert "going on from" in said


def swap_two_files(root):
    a, b = (root / f"step_0000000{n}" / "__0_0.distcp" for n in (4, 5))
    ours, theirs = a.read_bytes(), b.read_bytes()
    a.write_bytes(theirs)
    b.write_bytes(ours)


def swap_two_checkpoints(root):
    (root / "step_00000004").rename(root / "other")
    (root / "step_00000005").rename(root / "step_00000004")
    (root / "other").rename(root / "step_00000005")


def swap_two_seals(root):
    a, b = (root / f"step_0000000{n}" / "meta.json" for n in (4, 5))
    ours, theirs = a.read_bytes(), b.read_bytes()
    a.write_bytes(theirs)
    b.write_bytes(ours)


def damage_all_but_the_oldest(root):
    (root / "step_00000004" / ".metadata").unlink()
    (root / "step_00000005" / "meta.json").write_bytes(b"{}")


AMONG = {
    swap_two_files: 3,
    swap_two_checkpoints: 3,
    swap_two_seals: 3,
    damage_all_but_the_oldest: 3,
}


@pytest.mark.parametrize("damage", AMONG)
def test_checkpoints_that_were_mixed_up_are_found_out(damage, run, straight, tmp_path, capsys):
    run_dir = shutil.copytree(run, tmp_path / "run")
    damage(run_dir / "checkpoints")
    trainer = Trainer(EXPERIMENT, run_dir)
    assert trainer.state.step == AMONG[damage]
    said = capsys.readouterr().err
    assert "step_00000005" in said
    assert "step_00000004" in said
    assert_same(trainer.fit(), straight)
    kept = {path.name for path in (run_dir / "checkpoints").glob("damaged_*")}
    assert kept == {"damaged_step_00000004", "damaged_step_00000005"}


POINTERS = {
    "deleted": None,
    "empty": b"",
    "garbage": bytes(range(128, 256)),
    "a step that is not there": b"step_00000099",
    "a folder that is no checkpoint": b"..",
    "half a name": b"step_0000",
    "zeros": bytes(13),
}


@pytest.mark.parametrize("kind", POINTERS)
def test_a_spoilt_pointer_is_found_out(kind, run, tmp_path, capsys):
    run_dir = shutil.copytree(run, tmp_path / "run")
    pointer = run_dir / "checkpoints" / "latest"
    pointer.unlink()
    if POINTERS[kind] is not None:
        pointer.write_bytes(POINTERS[kind])
    assert Trainer(EXPERIMENT, run_dir).state.step == 5
    assert f"{pointer} names no checkpoint that is there" in capsys.readouterr().err


def test_a_bit_that_makes_another_name_is_found_out(run, tmp_path, capsys):
    run_dir = shutil.copytree(run, tmp_path / "run")
    (run_dir / "checkpoints" / "latest").write_text("step_00000004")  # '5' with its last bit off
    assert Trainer(EXPERIMENT, run_dir).state.step == 4
    assert "names step_00000004, though there is step_00000005" in capsys.readouterr().err


def test_when_all_are_damaged_nothing_is_trained(run, tmp_path):
    run_dir = shutil.copytree(run, tmp_path / "run")
    for number, folder in enumerate(sorted((run_dir / "checkpoints").glob("step_*"))):
        flip_a_bit(folder / FILES[number], random.Random(number))
    with pytest.raises(CheckpointError, match=r"step_00000005/.*step_00000004/.*step_00000003/"):
        Trainer(EXPERIMENT, run_dir)


def test_there_are_at_least_fifty():
    assert len(IN_FILES) + len(AMONG) + len(POINTERS) + 2 >= 50
