"""N steps are k steps, a stop, and N - k steps, to the bit."""

import dataclasses
import json

import pytest
import torch

from callbacks.ct_schedule import CTScheduleCallback
from fastflow.callback import Driver, Observer
from fastflow.config import lazy
from fastflow.experiment import Parallel
from fastflow.schedules import RatioStages
from fastflow.trainer import Trainer
from tiny import assert_same, digits, everything, toy, toy_with_target, toy_with_teacher, train


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("teacher") / "run"
    train(toy(steps=2), run_dir)
    return run_dir


CASES = {
    "ratio": lambda teacher: toy(),
    "target": lambda teacher: toy_with_target(),
    "teacher": lambda teacher: toy_with_teacher(teacher),
    "dropout and flips": lambda teacher: digits(),
    "bf16": lambda teacher: digits(precision="bf16"),
    "micro-batches": lambda teacher: digits(parallel=Parallel(micro_batch=3, checkpoint=True)),
    "target with dropout": lambda teacher: digits(
        method=toy_with_target().method, callbacks=toy_with_target().callbacks
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_goes_on_to_the_bit(case, teacher, tmp_path):
    experiment = CASES[case](teacher)
    straight = train(experiment, tmp_path / "straight")
    assert train(experiment, tmp_path / "stopped", stop_at=3).step == 3
    torch.manual_seed(5)  # what else the process drew in the meantime does not matter
    assert_same(train(experiment, tmp_path / "stopped"), straight)


def test_stops_may_come_anywhere_and_often(tmp_path):
    straight = train(toy(), tmp_path / "straight")
    for stop in (1, 2, 4, 5):  # 4 is where a checkpoint is due anyway
        train(toy(), tmp_path / "stopped", stop_at=stop)
    assert_same(train(toy(), tmp_path / "stopped"), straight)
    # The log goes on too; its records are means since the one before, so compare the whole steps.
    logs = [
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("straight", "stopped")
    ]
    assert [[r["step"] for r in log] for log in logs] == [[2, 4, 6], [1, 2, 4, 5, 6]]
    assert logs[1][2]["loss"] == logs[0][1]["loss"]
    assert logs[1][-1]["seconds"] > logs[1][0]["seconds"] > 0


def test_a_crash_goes_back_to_the_last_checkpoint(tmp_path):
    """The process dies in step 6, two steps after a checkpoint."""
    experiment = toy()
    straight = train(experiment, tmp_path / "straight")
    trainer = Trainer(experiment, tmp_path / "crashed")
    step = trainer._step

    def fail(batch):
        if trainer.state.step == 5:
            raise ZeroDivisionError
        step(batch)

    trainer._step = fail
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    again = Trainer(experiment, tmp_path / "crashed")
    assert again.state.step == 4
    assert_same(again.fit(), straight)


def test_curriculum_and_data_order_go_on(tmp_path):
    seen = []

    class Record(Observer):
        def after_step(self, state):
            times = state.loss.times
            seen.append((state.step, state.curriculum["stage"], times.tolist()))

    experiment = toy()

    def run(run_dir, stop_at=None):
        trainer = Trainer(experiment, run_dir)
        trainer.observers.append(Record())
        batches = trainer.loader.batches

        def recorded(start):
            for batch in batches(start):
                seen.append(batch.x.tolist())
                yield batch

        trainer.loader.batches = recorded
        step = trainer._step

        def until(batch):
            step(batch)
            trainer.state.stop = "now" if trainer.state.step == stop_at else None

        trainer._step = until
        trainer.fit()

    run(tmp_path / "straight")
    straight, seen[:] = list(seen), []
    run(tmp_path / "stopped", 3)
    run(tmp_path / "stopped")
    assert seen == straight
    assert {entry[1] for entry in seen if isinstance(entry, tuple)} == {0, 1, 2}


def test_a_finished_run_stays_as_it_is(tmp_path):
    first = train(toy(), tmp_path / "run")
    log = (tmp_path / "run" / "log.jsonl").read_text()
    again = train(toy(), tmp_path / "run")
    assert again.step == 6
    assert_same(first, dataclasses.replace(again, curriculum=first.curriculum))
    assert (tmp_path / "run" / "log.jsonl").read_text() == log


def test_a_parameter_without_gradient_does_not_break_resuming(tmp_path):
    """The optimizer keeps no state for it, which a fresh optimizer must not be given either."""

    class Cut(Driver):
        def before_update(self, state):
            if state.step < 4:
                state.networks.student.model.first.bias.grad = None

    def run(run_dir, stop_at=None):
        trainer = Trainer(toy(optimizer=lazy(torch.optim.AdamW, lr=1e-2)), run_dir)
        trainer.drivers.append(Cut())
        step = trainer._step

        def until(batch):
            step(batch)
            trainer.state.stop = "now" if trainer.state.step == stop_at else None

        trainer._step = until
        return trainer.fit()

    straight = run(tmp_path / "straight")
    stopped = run(tmp_path / "stopped", 3)
    assert not any("first.bias" in n for n in everything(stopped) if n.startswith("optimizer"))
    assert_same(run(tmp_path / "stopped"), straight)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "NAdam", "Adagrad", "RMSprop"])
def test_state_of_other_optimizers(optimizer, tmp_path):
    extra = {"momentum": 0.9} if optimizer == "SGD" else {}
    node = lazy(getattr(torch.optim, optimizer), lr=1e-3, **extra)
    straight = train(toy(optimizer=node), tmp_path / "straight")
    train(toy(optimizer=node), tmp_path / "stopped", stop_at=3)
    assert_same(train(toy(optimizer=node), tmp_path / "stopped"), straight)


def test_the_saved_experiment_trains_to_the_same_weights(tmp_path):
    from fastflow.config import load_experiment

    first = train(digits(), tmp_path / "run")
    saved = load_experiment(tmp_path / "run" / "experiment.yaml")
    assert saved == digits()
    assert_same(train(saved, tmp_path / "other"), first)


def test_the_seed_decides(tmp_path):
    a, b, c = (train(toy(seed=seed), tmp_path / str(n)) for n, seed in enumerate((0, 0, 1)))
    assert_same(a, b)
    assert not torch.equal(
        a.networks.student.model.first.weight, c.networks.student.model.first.weight
    )


def test_the_curriculum_matters(tmp_path):
    """What the bitwise tests compare does depend on the curriculum."""
    slow = lazy(CTScheduleCallback, schedule=RatioStages(q=2.0, kimg_per_stage=1000.0))
    a = train(toy(), tmp_path / "a")
    b = train(toy(callbacks=(slow, *toy().callbacks[1:])), tmp_path / "b")
    ours, theirs = (state.networks.student.model.last.weight for state in (a, b))
    assert not torch.equal(ours, theirs)
