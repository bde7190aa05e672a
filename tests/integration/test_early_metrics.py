"""Metrics while training: records, labels, the best weights, and what they leave alone."""

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from callbacks.early_metrics import EarlyMetrics
from callbacks.jsonl_log import JsonlLog
from fastflow.config import build, lazy
from fastflow.distributed import World
from fastflow.errors import ConfigError, DivergenceError
from fastflow.evaluation.evaluate import evaluate
from fastflow.evaluation.extractors import DigitFeatures
from fastflow.evaluation.metrics import FID
from fastflow.evaluation.spec import Evaluation
from fastflow.evaluation.toy_metrics import EnergyDistance
from fastflow.logging import JsonLines
from fastflow.model import Model
from tiny import assert_same, digits, drivers, toy, train

LOG = lazy(JsonlLog, every=2)


def early(**changes):
    options = {"every": 2, "samples": 50, "steps": (1, 2), "keep_best": True, **changes}
    return lazy(EarlyMetrics, **options)


def log(run_dir, name="log.jsonl"):
    return JsonLines(run_dir / name).read()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six steps measured after 2, 4 and 6; the learning rate makes later weights worse."""
    run_dir = tmp_path_factory.mktemp("early") / "run"
    optimizer = lazy(torch.optim.SGD, lr=0.05)
    experiment = toy(callbacks=(*drivers(), early(), LOG), optimizer=optimizer)
    return train(experiment, run_dir), run_dir


def test_values_are_in_the_log_under_their_own_name(run):
    _, run_dir = run
    names = ("energy_distance/1step", "energy_distance/2step")
    records, rows = log(run_dir), log(run_dir, "early_results.jsonl")
    assert [record["step"] for record in records if names[0] in record] == [2, 4, 6]
    values = [record[name] for record in records for name in names]
    assert values == [float(f"{row['value']:.9g}") for row in rows]
    assert [(row["step"], row["steps"]) for row in rows] == [
        (step, steps) for step in (2, 4, 6) for steps in (1, 2)
    ]
    assert [row["images"] for row in rows[::2]] == [32, 64, 96]
    assert all(row["samples"] == 50 and row["weights"] == "ema_0.9" for row in rows)
    assert all(row["train_seconds"] > 0 for row in rows)
    assert not (run_dir / "results.json").exists()


def test_the_value_is_that_of_the_ema(run):
    """Measured again from the exported weights."""
    state, run_dir = run
    evaluation = dataclasses.replace(state.experiment.evaluation, samples=50)
    data = build(state.experiment.data)
    model = Model.load(run_dir, "ema_0.9")
    again = evaluate(model, evaluation, data, World())
    last = log(run_dir, "early_results.jsonl")[-2:]
    assert [row.value for row in again] == [row["value"] for row in last]
    student = evaluate(Model.load(run_dir, "student"), evaluation, data, World())
    assert student[0].value != last[0]["value"]


def test_the_best_weights_are_kept(run):
    state, run_dir = run
    rows = [row for row in log(run_dir, "early_results.jsonl") if row["steps"] == 1]
    best = min(rows, key=lambda row: row["value"])
    model = Model.load(run_dir / "weights_best")
    assert (model.step, model.weights_name) == (best["step"], "ema_0.9")
    evaluation = dataclasses.replace(state.experiment.evaluation, samples=50, steps=(1,))
    (row,) = evaluate(model, evaluation, build(state.experiment.data), World())
    assert row.value == best["value"]
    assert [path.name for path in run_dir.iterdir() if path.name.startswith(".weights")] == []
    assert [path.name for path in sorted((run_dir / "weights_best").iterdir())] == [
        "ema_0.9.safetensors",
        "model.yaml",
    ]


@pytest.fixture
def scripted(monkeypatch):
    """Make the values of the steps those given."""

    def script(values, better="lower"):
        measured = EarlyMetrics._measured

        def instead(self, state):
            changes = {"value": values[state.step - 1], "better": better}
            return [dataclasses.replace(row, **changes) for row in measured(self, state)]

        monkeypatch.setattr(EarlyMetrics, "_measured", instead)
        callback = early(every=1, samples=20, steps=(1,))
        return toy(callbacks=(*drivers(), callback), steps=len(values))

    return script


@pytest.mark.parametrize(
    ("better", "values", "best"),
    [
        ("lower", (3.0, 2.0, 4.0, 2.0), 2),
        ("higher", (3.0, 2.0, 4.0, 2.0), 3),
        ("lower", (1.0, 2.0, 3.0, 4.0), 1),
    ],
)
def test_what_is_better_is_the_metrics_to_say(better, values, best, tmp_path, scripted):
    train(scripted(values, better), tmp_path / "run")
    assert Model.load(tmp_path / "run" / "weights_best").step == best


def test_the_best_value_survives_a_restart(tmp_path, scripted):
    experiment = scripted((1.0, 5.0, 2.0, 3.0))
    train(experiment, tmp_path / "run", stop_at=2)
    train(experiment, tmp_path / "run")
    assert Model.load(tmp_path / "run" / "weights_best").step == 1
    assert [row["step"] for row in log(tmp_path / "run", "early_results.jsonl")] == [1, 2, 3, 4]


def test_nothing_is_exported_unless_asked(tmp_path):
    train(toy(callbacks=(*drivers(), early(keep_best=False)), steps=2), tmp_path / "run")
    assert not (tmp_path / "run" / "weights_best").exists()


def test_a_fid_of_few_samples_goes_by_its_own_name(tmp_path):
    """With dropout, classes and a real extractor: the weights are those without, to the bit."""
    metrics = (FID(extractor=DigitFeatures()),)
    plain = digits(callbacks=(*drivers(), LOG), steps=3)
    watched = early(every=2, samples=40, steps=(2,), metrics=metrics)
    measured = dataclasses.replace(plain, callbacks=(*drivers(), watched, LOG))
    a, b = train(measured, tmp_path / "watched"), train(plain, tmp_path / "plain")
    assert_same(a, b)
    kept = load_file(tmp_path / "watched" / "weights" / "student.safetensors")
    other = load_file(tmp_path / "plain" / "weights" / "student.safetensors")
    assert all(torch.equal(kept[name], other[name]) for name in other)
    records = log(tmp_path / "watched")
    found = [name for record in records for name in record if "fid" in name.lower()]
    assert found == ["FID-40/2step"] * 2  # after step 2, and after the last
    assert not any("50k" in json.dumps(record) for record in records)


def test_broken_weights_are_told_and_do_not_stop_training(tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise DivergenceError("the 1-step sample of seed 0 has a NaN")

    monkeypatch.setattr("fastflow.evaluation.evaluate.generated", broken)
    state = train(toy(callbacks=(*drivers(), early(), LOG), steps=2), tmp_path / "run")
    assert state.step == 2
    assert "EarlyMetrics at step 2: the 1-step sample" in capsys.readouterr().err
    assert not any("energy" in name for record in log(tmp_path / "run") for name in record)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"every": 0}, "every: 0 given"),
        ({"samples": 1}, "samples: 1 given"),
        ({"steps": ()}, "steps: () given"),
        ({"steps": (0,)}, "steps: (0,) given"),
        ({"weights": "emma_0.9"}, "'emma_0.9' given, did you mean 'ema_0.9'?"),
        ({"metrics": ()}, "EarlyMetrics.metrics: none given"),
        ({"metrics": (FID(extractor=DigitFeatures()),)}, "images"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(options, text, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(text)):
        train(toy(callbacks=(*drivers(), early(**options))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_are_prepared_once(tmp_path, monkeypatch):
    prepared = []
    prepare = EnergyDistance.prepare
    monkeypatch.setattr(EnergyDistance, "prepare", lambda *a: prepared.append(1) or prepare(*a))
    evaluation = Evaluation(metrics=(EnergyDistance(),), steps=(1,), quantisation="none")
    train(toy(callbacks=(*drivers(), early()), evaluation=evaluation), tmp_path / "run")
    assert len(prepared) == 1
