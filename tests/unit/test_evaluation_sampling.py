"""Samples for evaluation: divided among processes, kept in files, used again only where equal."""

import dataclasses
import json
import math
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation_fakes import DATA, GaussianMap, Model, together
from fastflow.distributed import World
from fastflow.errors import ConfigError, DivergenceError
from fastflow.evaluation import sampling
from fastflow.evaluation.evaluate import evaluate
from fastflow.evaluation.progress import ProgressLine
from fastflow.evaluation.sampling import (
    Kept,
    Plan,
    about_of,
    class_labels,
    generated,
    has_room,
    plan_of,
    restored,
)
from fastflow.evaluation.spec import Evaluation
from fastflow.evaluation.toy_metrics import EnergyDistance

TOY = Evaluation(metrics=(EnergyDistance(samples=60),), samples=60, steps=(1, 2), batch_size=20)
PLAN = Plan(seeds=range(100, 150), steps=2, batch_size=20)


@dataclasses.dataclass
class Saved(Model):
    weights: str = "a"

    def fingerprint(self):
        return self.weights


def batches(model, plan=PLAN, world=None, kept=None):
    return list(generated(model, plan, world or World(), kept))


def whole(found):
    return torch.cat([batch.x for batch in found])


# Labels


def test_balanced_labels_are_equally_often_there():
    labels = class_labels(range(7, 57), 5, "balanced")
    assert labels.bincount().tolist() == [10] * 5
    assert torch.equal(labels[3:9], class_labels(range(10, 16), 5, "balanced"))
    assert class_labels(range(4), 5, 3).tolist() == [3] * 4
    assert class_labels(range(4), 0, "balanced") is None


@pytest.mark.parametrize(("label", "classes"), [(5, 5), (-1, 5), (0, 0)])
def test_a_class_that_is_not_there_is_refused(label, classes):
    with pytest.raises(ConfigError, match=f"label: {label} given"):
        class_labels(range(4), classes, label)


def test_balanced_evaluation_needs_a_multiple_of_the_classes():
    evaluation = dataclasses.replace(TOY, labels="balanced")
    with pytest.raises(ConfigError, match="evaluation.samples: 60 given.* multiple of 7"):
        evaluate(Model(GaussianMap(), cond_dim=7), evaluation, DATA, World())


def test_rows_tell_of_the_labels():
    class Conditional(Model):
        def sample(self, seeds, steps=1, times=None, cond=None):
            assert cond.sum(1).tolist() == [1] * len(seeds)
            given.extend(cond.argmax(1).tolist())
            return torch.randn(len(seeds), 2)

    for labels in ("random", "balanced"):
        given = []
        evaluation = dataclasses.replace(TOY, labels=labels, steps=(1,))
        (row,) = evaluate(Conditional(GaussianMap(), cond_dim=3), evaluation, DATA, World())
        assert row.labels == labels
        assert (given == [seed % 3 for seed in range(60)]) == (labels == "balanced")
    assert evaluate(Model(GaussianMap()), evaluation, DATA, World())[0].labels == "none"


# Batches


def test_every_process_takes_every_other_batch_and_all_turns():
    alone = batches(Saved(GaussianMap()))
    assert [batch.seeds for batch in alone] == [range(100, 120), range(120, 140), range(140, 150)]
    shared = together(2, lambda world: batches(Saved(GaussianMap()), world=world))
    assert [len(found) for found in shared] == [2, 2]
    assert shared[1][1] is None
    merged = [shared[0][0], shared[1][0], shared[0][1]]
    assert torch.equal(whole(merged), whole(alone))
    assert [batch.indices for batch in merged] == [batch.indices for batch in alone]


def test_a_bad_sample_is_told_by_every_process():
    def damage(x):
        x[3] = math.inf
        return x

    def work(world):
        change = damage if world.rank == 1 else lambda x: x
        with pytest.raises(DivergenceError, match="2-step sample of seed 123 .*ema_0.99.*100"):
            batches(Saved(GaussianMap(), change=change), world=world)
        return True

    assert together(2, work) == [True, True]


# Kept


def test_what_was_interrupted_goes_on(tmp_path):
    """Only what is missing is computed, and the samples are the same to the bit."""
    alone = whole(batches(Saved(GaussianMap())))
    model = Saved(GaussianMap())
    kept = Kept.below(tmp_path, model, PLAN)
    stream = generated(model, PLAN, World(), kept)
    next(stream), next(stream)
    stream.close()
    assert model.asked == list(range(100, 140))
    model.asked.clear()
    found = batches(model, kept=Kept.below(tmp_path, model, PLAN))
    assert model.asked == list(range(140, 150))
    assert torch.equal(whole(found), alone)
    assert [f.name for f in sorted(kept.folder.iterdir())] == [
        "seeds_00000100-00000119.safetensors",
        "seeds_00000120-00000139.safetensors",
        "seeds_00000140-00000149.safetensors",
    ]
    assert kept.folder.name.startswith("ema_0.99_step00000100_2step_")
    assert torch.equal(whole(restored(PLAN, 0, kept)), alone)


def test_processes_share_what_is_kept(tmp_path):
    model = Saved(GaussianMap())
    together(2, lambda world: batches(model, world=world, kept=Kept.below(tmp_path, model, PLAN)))
    model.asked.clear()
    found = together(
        3, lambda world: batches(model, world=world, kept=Kept.below(tmp_path, model, PLAN))
    )
    assert model.asked == []
    assert torch.equal(whole([f[0] for f in found]), whole(batches(Saved(GaussianMap()))))


@pytest.mark.parametrize(
    "other",
    [
        {"model": Saved(GaussianMap(), weights="b")},
        {"model": Saved(GaussianMap(), step=101)},
        {"model": Saved(GaussianMap(), weights_name="student")},
        {"plan": dataclasses.replace(PLAN, between=(3.0,))},
        {"plan": dataclasses.replace(PLAN, steps=3)},
        {"plan": dataclasses.replace(PLAN, labels="balanced")},
    ],
)
def test_samples_of_anything_else_are_not_used(other, tmp_path):
    """Also where they lie in the same folder."""
    model, plan = Saved(GaussianMap()), PLAN
    first = Kept.below(tmp_path, model, plan)
    batches(model, kept=first)
    model, plan = other.get("model", model), other.get("plan", plan)
    second = Kept.below(tmp_path, model, plan)
    assert second.folder != first.folder
    same_place = Kept(first.folder, about_of(model, plan))
    for kept in (second, same_place):
        assert kept.load(plan.seeds[:20]) is None
    model.asked.clear()
    batches(model, plan, kept=same_place)
    assert model.asked == list(plan.seeds)
    assert same_place.load(plan.seeds[:20]) is not None


def test_a_damaged_file_is_made_again(tmp_path):
    model = Saved(GaussianMap())
    kept = Kept.below(tmp_path, model, PLAN)
    alone = whole(batches(model, kept=kept))
    files = sorted(kept.folder.iterdir())
    files[0].write_bytes(files[0].read_bytes()[:100])
    header = {"fastflow_samples": json.dumps(about_of(model, PLAN))}
    save_file({"x": torch.zeros(3, 2)}, files[1], metadata=header)
    model.asked.clear()
    assert torch.equal(whole(batches(model, kept=kept)), alone)
    assert model.asked == list(range(100, 140))
    files[2].unlink()
    with pytest.raises(OSError, match="lost the samples of seeds 140"):
        list(restored(PLAN, 0, kept))


def test_a_sample_that_is_not_finite_is_not_kept(tmp_path):
    model = Saved(GaussianMap(), change=lambda x: x * math.nan)
    kept = Kept.below(tmp_path, model, PLAN)
    with pytest.raises(DivergenceError):
        batches(model, kept=kept)
    assert not kept.folder.exists()


def test_samples_stay_only_where_that_was_asked(tmp_path):
    model = Saved(GaussianMap())
    kept = Kept.below(tmp_path, model, PLAN)
    batches(model, kept=kept)
    kept.discard()
    assert list(tmp_path.iterdir()) == []
    batches(model, kept=kept)
    kept.seal()
    Kept.below(tmp_path, model, PLAN).discard()
    assert len(list(kept.folder.glob("*.safetensors"))) == 3
    about = json.loads((kept.folder / "about.json").read_text())
    assert (about["weights"], about["steps"], about["times"][0]) == ("ema_0.99", 2, 80.0)


def test_an_evaluation_goes_on_where_it_stopped(tmp_path):
    """Stopped in the second number of steps; the rows are those of one that was not."""
    straight = evaluate(Saved(GaussianMap(error=0.1)), TOY, DATA, World())
    model = Saved(GaussianMap(error=0.1))

    def stop(what, done, total):
        if what.startswith("2 steps") and done == 40:
            raise KeyboardInterrupt

    def keep(plan):
        return Kept.below(tmp_path, model, plan)

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, TOY, DATA, World(), progress=stop, keep=keep)
    model.asked.clear()
    rows = evaluate(model, TOY, DATA, World(), keep=keep)
    assert model.asked == list(range(40, 60))
    assert [row.value for row in rows] == [row.value for row in straight]


def test_blocks_are_kept_side_by_side(tmp_path):
    model, evaluation = Saved(GaussianMap()), dataclasses.replace(TOY, steps=(1,), blocks=2)
    evaluate(model, evaluation, DATA, World(), keep=lambda plan: Kept.below(tmp_path, model, plan))
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 6
    file = folder / "seeds_00000060-00000079.safetensors"
    expected = batches(Saved(GaussianMap()), plan_of(evaluation, 1, block=1))[0].x
    assert torch.equal(load_file(file)["x"], expected)


def test_room_is_looked_for_before(tmp_path, monkeypatch, capsys):
    model, place = Saved(GaussianMap()), tmp_path / "not" / "yet"
    assert has_room(place, model, TOY, stay=True)
    usage = namedtuple("usage", "total used free")
    needed = 60 * 2 * 2 * 4
    for free, enough in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        assert has_room(place, model, TOY, stay=False) == enough
    assert "what is interrupted starts again" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--keep-samples: 120 samples take"):
        has_room(place, model, TOY, stay=True)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        (tmp_path / "a" / "half").write_bytes(b"x")
        raise sampling.SafetensorError("I/O error: No space left on device")

    kept = Kept(tmp_path / "a", {})
    monkeypatch.setattr(sampling, "save_file", fail)
    with pytest.raises(OSError, match="No space left on device"):
        kept.save(range(3), torch.zeros(3, 2))
    assert kept.load(range(3)) is None


# Progress


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_lines_tell_rate_and_time_left(capsys):
    clock = Clock()
    line = ProgressLine([1, 2], seconds=10, clock=clock)  # 100 samples of each part
    for done in (20, 40, 60, 80, 100):
        clock.now += 4
        line("1 step", done, 100)
    for done in (50, 100):
        clock.now += 20
        line("2 steps", done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "1 step: 60 of 100 samples, 5/s, 0:00:48 left",
        "1 step: 100 of 100 samples, 5/s, 0:00:40 left",
        "2 steps: 50 of 100 samples, 2.5/s, 0:00:20 left",
        "2 steps: 100 of 100 samples, 2.5/s",
    ]


def test_what_was_kept_does_not_spoil_the_estimate_for_long(capsys):
    clock = Clock()
    line = ProgressLine([1], seconds=0, clock=clock)
    for done in range(0, 50_000, 1000):  # read from files
        clock.now += 0.01
        line("1 step", done, 100_000)
    for done in range(50_000, 60_001, 1000):
        clock.now += 10
        line("1 step", done, 100_000)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("0:06:40 left")  # 40,000 at 100 a second


def test_a_terminal_has_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    clock = Clock()
    line = ProgressLine([1], clock=clock).titled("ema, ")
    for done in (1, 2, 3):
        clock.now += 1
        line("1 step", done, 3)
    err = capsys.readouterr().err
    assert err.count("\r") == 3
    assert err.count("\n") == 1
    assert err.splitlines()[-1].startswith("ema, 1 step: 3 of 3 samples")
