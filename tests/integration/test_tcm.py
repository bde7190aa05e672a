"""TCM from end to end: a first stage, the second from its run directory, resume, samples."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from callbacks.ct_schedule import CTScheduleCallback
from fastflow.callback import Observer
from fastflow.config import lazy
from fastflow.errors import CheckpointError, ConfigError
from fastflow.experiment import Experiment, Parallel
from fastflow.generate import generate
from fastflow.method import Frozen
from fastflow.model import Model
from fastflow.schedules import RatioStages
from fastflow.trainer import Trainer
from fastflow.wrappers import EDMDenoiser
from methods.ect import ECT
from methods.tcm import TCM, Truncated
from networks.mlp import ToyMLP
from tiny import OBSERVERS, assert_same, digits, drivers, everything, toy, train

STAGES = RatioStages(q=2.0, kimg_per_stage=0.032, limit=0.999)


def first_stage(make=toy, **changes) -> Experiment:
    """Three steps of 16 samples: stages 0, 0, 1."""
    callbacks = (*drivers(lazy(CTScheduleCallback, schedule=STAGES)), *OBSERVERS)
    changes = {"method": ECT(), "callbacks": callbacks, "steps": 3, **changes}
    return dataclasses.replace(make(), name="tiny_ect", **changes)


def second_stage(run: Path, make=toy, **changes) -> Experiment:
    """From the run of the first stage, whose curriculum goes on where it stopped."""
    schedule = dataclasses.replace(STAGES, offset_images=48)
    callbacks = (*drivers(lazy(CTScheduleCallback, schedule=schedule)), *OBSERVERS)
    method = TCM(stage1=Frozen(weights=str(run)))
    changes = {"callbacks": callbacks, "init_from": str(run), "steps": 6, **changes}
    return dataclasses.replace(make(), name="tiny_tcm", method=method, **changes)


@pytest.fixture(scope="module")
def stage1(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("stage1") / "run"
    train(first_stage(), run)
    return run


@pytest.fixture(scope="module")
def orphan(stage1, tmp_path_factory) -> Path:
    """A second stage whose first is gone."""
    folder = tmp_path_factory.mktemp("stage2")
    source = shutil.copytree(stage1, folder / "source")
    train(second_stage(source), folder / "run")
    shutil.rmtree(source)
    return folder / "run"


def test_both_networks_start_as_the_first_stage(stage1, tmp_path):
    trainer = Trainer(second_stage(stage1), tmp_path / "run")
    nets = trainer.state.networks
    source = Model.load(stage1).network
    for network in (nets.student, nets["stage1"]):
        for name, value in source.state_dict().items():
            assert torch.equal(network.state_dict()[name], value)
    assert nets["stage1"].training  # its dropout is active
    assert not any(p.requires_grad for p in nets["stage1"].parameters())
    before = {n: v.clone() for n, v in nets["stage1"].state_dict().items()}
    state = trainer.fit()
    after = nets["stage1"].state_dict()
    assert all(torch.equal(v, after[n]) for n, v in before.items())
    student = nets.student.state_dict()
    assert any(not torch.equal(v, student[n]) for n, v in before.items())
    assert bool(state.loss.per_sample.isfinite().all())
    assert int((state.loss.times == 1 + 1e-8).sum()) == 4  # int(0.25 * 16)


def test_the_curriculum_goes_on(stage1, tmp_path):
    """Stage floor((48 + 16 k) / 32): the first stage ended in 1."""
    seen = []

    class Watch(Observer):
        def after_step(self, state):
            seen.append((state.curriculum["stage"], state.curriculum["ratio"]))

    trainer = Trainer(second_stage(stage1), tmp_path / "run")
    trainer.observers.append(Watch())
    trainer.fit()
    stages = [(48 + 16 * k) // 32 for k in range(6)]
    assert seen == [(stage, 1 - 2.0 ** -(stage + 1)) for stage in stages]
    assert stages == [1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("make", [toy, digits])
def test_a_stopped_run_goes_on_to_the_bit(make, stage1, tmp_path):
    """Also with dropout, classes and micro-batches."""
    run, changes = stage1, {}
    if make is digits:
        run = tmp_path / "stage1"
        train(first_stage(digits), run)
        changes = {"parallel": Parallel(micro_batch=5), "steps": 4}
    experiment = second_stage(run, make, **changes)
    straight = train(experiment, tmp_path / "straight")
    assert train(experiment, tmp_path / "stopped", stop_at=2).step == 2
    torch.manual_seed(5)
    assert_same(train(experiment, tmp_path / "stopped"), straight)


def test_gradient_accumulation_is_one_large_batch(stage1, tmp_path):
    """The share of boundary rows is that of the whole batch."""
    whole = train(second_stage(stage1), tmp_path / "whole")
    parts = train(second_stage(stage1, parallel=Parallel(micro_batch=5)), tmp_path / "parts")
    for name, value in everything(whole).items():
        torch.testing.assert_close(everything(parts)[name], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts.loss.per_sample, whole.loss.per_sample, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.metrics["distance"], whole.metrics["distance"])


def test_samples_come_from_both_stages_without_the_first_run(stage1, orphan):
    """The exported folder holds the first stage; below t' it answers, to the bit."""
    first = Model.load(stage1)
    for weights in ("student", "ema_0.9"):
        model = Model.load(orphan, weights=weights)
        assert isinstance(model.network, Truncated)
        assert not model.network.below.training
        x, t = torch.randn(4, 2), torch.tensor([0.999, 0.5, 0.01, 0.9], dtype=torch.float64)
        with torch.no_grad():
            ends = model.method.flow_map(model.network, x, t, 0 * t)
            expected = first.method.flow_map(first.network, x, t, 0 * t)
            assert torch.equal(ends, expected)
            above = torch.full((4,), 80.0, dtype=torch.float64)
            assert torch.equal(
                model.method.flow_map(model.network, x, above, 0 * t),
                model.network.above(x, above),
            )
    one, two = model.sample(range(4)), model.sample(range(4), steps=2, times=(0.821,))
    assert one.shape == two.shape == (4, 2)
    assert torch.equal(one, generate(model.method, model.network.above, range(4), (2,), (80.0,)))
    assert not torch.equal(one, two)


def test_a_checkpoint_alone_needs_the_first_run(stage1, tmp_path):
    """Before the export, samples take the first stage from where training took it."""
    source = shutil.copytree(stage1, tmp_path / "source")
    train(second_stage(source), tmp_path / "run", stop_at=4)
    assert Model.load(tmp_path / "run").sample(range(2), steps=2, times=(0.5,)).shape == (2, 2)
    shutil.rmtree(source)
    with pytest.raises(CheckpointError, match="source"):
        Model.load(tmp_path / "run")


def test_what_does_not_fit_is_refused_before_anything_is_written(stage1, tmp_path):
    other = lazy(EDMDenoiser, model=lazy(ToyMLP, data_dim=2, width=16, depth=2), sigma_data=1.0)
    experiment = second_stage(stage1)
    method = TCM(stage1=Frozen(weights=None, network=other))
    with pytest.raises(ConfigError, match=r"stage1: sigma_data 1.0 given, accepted: 0.5"):
        Trainer(dataclasses.replace(experiment, method=method), tmp_path / "run")
    with pytest.raises(CheckpointError, match="nowhere"):
        Trainer(second_stage(tmp_path / "nowhere"), tmp_path / "run")
    without = dataclasses.replace(experiment, callbacks=experiment.callbacks[1:])
    with pytest.raises(ConfigError, match="TCM needs the curriculum value 'ratio'"):
        Trainer(without, tmp_path / "run")
    assert not (tmp_path / "run").exists()
