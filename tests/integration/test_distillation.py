"""Distillation from end to end: train a teacher, distil it with an EMA target, sample."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from callbacks.ct_schedule import CTScheduleCallback
from consistency_fakes import GaussianTeacher
from fastflow.config import lazy
from fastflow.consistency import Euler, GridPairing, Heun, TeacherStep
from fastflow.data.toy import GaussianMixture2D
from fastflow.distributed import World
from fastflow.errors import CheckpointError, ConfigError
from fastflow.evaluation.evaluate import evaluate
from fastflow.experiment import Experiment
from fastflow.method import Frozen
from fastflow.model import Model
from fastflow.network import Network
from fastflow.path_difference import PathDifference
from fastflow.schedules import AdaptiveDecay, SqrtDiscretization
from fastflow.summary import start
from fastflow.tangent import FiniteDifference
from fastflow.teacher import Teacher
from fastflow.trainer import Trainer
from fastflow.wrappers import EDMDenoiser, TrigFlowNetwork, VelocityNetwork
from methods.cm import CM
from methods.edm import EDM
from methods.flow_matching import FlowMatching
from methods.mean_flow import MeanFlow
from methods.scm import SCM
from networks.edm2 import LogVariance
from networks.mlp import ToyMLP
from tiny import OBSERVERS, drivers, toy, train, without_observers

N_OF_STEP = lazy(CTScheduleCallback, schedule=SqrtDiscretization(s0=2, s1=10))
STEPS = 5


def distillation(
    teacher: Teacher,
    step: TeacherStep = Heun(),  # noqa: B008, a value
    **changes,
) -> Experiment:
    target = AdaptiveDecay(mu0=0.9, s0=2)
    method = CM(pairs=GridPairing(), teacher=teacher, step=step, target=target)
    callbacks = (*drivers(N_OF_STEP), *OBSERVERS)
    changes = {"callbacks": callbacks, "steps": STEPS, **changes}
    return toy(name="tiny_distillation", method=method, **changes)


@pytest.fixture(scope="module")
def edm_run(tmp_path_factory) -> Path:
    """A denoiser of the toy data, trained for a few steps."""
    run_dir = tmp_path_factory.mktemp("edm") / "run"
    callbacks = drivers(N_OF_STEP)[1:]  # denoising has no curriculum
    train(toy(name="tiny_edm", method=EDM(), callbacks=callbacks, steps=STEPS), run_dir)
    return run_dir


def snapshot(network: Network) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def step_by_step(trainer: Trainer) -> Iterator[dict[str, dict[str, Tensor]]]:
    """The weights of every network, before the first step and after each."""
    networks = trainer.state.networks
    everyone = {"student": networks.student, **networks.companions}
    yield {name: snapshot(network) for name, network in everyone.items()}
    for batch in trainer.loader.batches(0):
        trainer._step(batch)
        yield {name: snapshot(network) for name, network in everyone.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_target_follows_the_student_and_the_teacher_stays(edm_run, tmp_path):
    source = Frozen(weights=str(edm_run))
    trainer = Trainer(distillation(Teacher(source=source), step=Euler()), tmp_path / "cd")
    assert not trainer.state.networks["teacher"].training
    history = [seen for seen, _ in zip(step_by_step(trainer), range(STEPS + 1), strict=False)]
    first = history[0]
    assert same(first["target"], first["student"])
    assert same(first["teacher"], snapshot(Model.load(edm_run).network))
    assert not same(first["teacher"], first["student"])
    decays = []
    for k, (before, after) in enumerate(zip(history, history[1:], strict=False)):
        scales = math.ceil(math.sqrt(k / STEPS * (11**2 - 2**2) + 2**2) - 1)
        mu = math.exp(2 * math.log(0.9) / scales)
        decays.append(mu)
        assert not same(before["student"], after["student"])
        assert same(after["teacher"], first["teacher"])
        for name, value in after["target"].items():
            expected = mu * before["target"][name] + (1 - mu) * after["student"][name]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    assert decays[0] == pytest.approx(0.81)
    assert decays == sorted(set(decays))
    companions = trainer.state.networks.companions.values()
    assert all(p.grad is None and not p.requires_grad for c in companions for p in c.parameters())


def test_a_distilled_model_is_trained_and_sampled(edm_run, tmp_path):
    experiment = distillation(Teacher(source=Frozen(weights=str(edm_run))))
    state = train(experiment, tmp_path / "cd")
    assert state.step == STEPS
    assert bool(state.loss.per_sample.isfinite().all())
    samples = Model.load(tmp_path / "cd").sample(range(4), steps=2)
    assert samples.shape == (4, 2)
    assert bool(samples.isfinite().all())


def test_a_closed_form_teacher_needs_no_weights(tmp_path):
    source = Frozen(weights=None, network=lazy(GaussianTeacher))
    experiment = without_observers(distillation(Teacher(source=source)))
    state = train(experiment, tmp_path / "cd")
    assert state.step == STEPS
    assert bool(state.loss.per_sample.isfinite().all())


def test_a_distillation_needs_its_curriculum_and_its_teacher(tmp_path):
    source = Frozen(weights=str(tmp_path / "nowhere"))
    experiment = distillation(Teacher(source=source), callbacks=())
    with pytest.raises(ConfigError, match="CM needs the curriculum value 'N'"):
        Trainer(experiment, tmp_path / "cd")
    with pytest.raises(CheckpointError, match="nowhere"):
        Trainer(distillation(Teacher(source=source)), tmp_path / "cd")
    assert not (tmp_path / "cd").exists()


def test_a_denoiser_samples_along_the_ode(edm_run):
    model = Model.load(edm_run)
    one, many = model.sample(range(4)), model.sample(range(4), steps=8)
    assert one.shape == many.shape == (4, 2)
    assert not torch.allclose(one, many)
    torch.testing.assert_close(many[:2], model.sample(range(2), steps=8))


# Both kinds of teachers, trained with classes, guide every distillation

CLASSES = {"data_dim": 2, "width": 16, "depth": 2, "cond_dim": 4}
DENOISER = lazy(EDMDenoiser, model=lazy(ToyMLP, **CLASSES), logvar_head=lazy(LogVariance))
VELOCITY = lazy(VelocityNetwork, model=lazy(ToyMLP, **CLASSES))
WEAK = lazy(EDMDenoiser, model=lazy(ToyMLP, **{**CLASSES, "width": 8}))
PLAIN = drivers(N_OF_STEP)[1:]  # these methods read no curriculum
TEACHERS = {"edm": (EDM(), DENOISER), "fm": (FlowMatching(), VELOCITY), "weak": (EDM(), WEAK)}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Frozen]:
    """Models of the toy data, trained until they know of its classes."""
    folder = tmp_path_factory.mktemp("teachers")
    adam = lazy(torch.optim.Adam, lr=0.03)
    for name, (method, network) in TEACHERS.items():
        made = toy(name=name, method=method, network=network, callbacks=PLAIN, optimizer=adam)
        train(made, folder / name)
    return {
        name: Frozen(weights=str(folder / name), network=network)
        for name, (_, network) in TEACHERS.items()
    }


TRIGFLOW = lazy(TrigFlowNetwork, model=lazy(ToyMLP, **CLASSES), logvar_head=lazy(LogVariance))
AVERAGE = lazy(VelocityNetwork, model=lazy(ToyMLP, **CLASSES, two_times=True))


def student_of(name: str, teacher: Teacher) -> Experiment:
    if name == "CD":
        changes = {
            "method": CM(pairs=GridPairing(), teacher=teacher),
            "network": lazy(EDMDenoiser, model=lazy(ToyMLP, **CLASSES)),
            "callbacks": drivers(N_OF_STEP),
        }
    elif name == "sCD":
        changes = {"method": SCM(teacher=teacher), "network": TRIGFLOW, "callbacks": PLAIN}
    else:
        changes = {"method": MeanFlow(teacher=teacher), "network": AVERAGE, "callbacks": PLAIN}
    return toy(name="guided", steps=2, **changes)


@pytest.mark.parametrize("guide", [None, "weak"], ids=["classifier-free", "autoguidance"])
@pytest.mark.parametrize("source", ["edm", "fm"])
@pytest.mark.parametrize("name", ["CD", "sCD", "MeanFlow"])
def test_trained_teachers_guide_each_distillation(name, source, guide, teachers, tmp_path):
    losses = []
    for scale in (2.0, 4.0):
        spec = Teacher(
            source=teachers[source], guidance=scale, guide=teachers[guide] if guide else None
        )
        run_dir = tmp_path / f"{scale:g}"
        state = train(student_of(name, spec), run_dir)
        assert bool(state.loss.per_sample.isfinite().all())
        losses.append(state.loss.per_sample)
        assert Model.load(run_dir).sample(range(2), steps=2).shape == (2, 2)
    assert not torch.allclose(*losses)


def test_results_tell_of_finite_differences(tmp_path):
    """What is not exact is marked where a run begins and in each row of its results."""
    titles = {
        MeanFlow(engine=FiniteDifference(step=1e-3)): "finite differences (central, h=0.001)",
        SCM(engine=PathDifference()): "finite differences (central, h=0.001 t)",
        MeanFlow(): "",
    }
    for number, (method, mark) in enumerate(titles.items()):
        network = TRIGFLOW if isinstance(method, SCM) else AVERAGE
        made = toy(name="marked", method=method, network=network, callbacks=PLAIN, steps=1)
        trainer = Trainer(made, tmp_path / str(number))
        name = type(method).__name__ + (f", {mark}" if mark else "")
        assert f" {name}\n" in start(trainer)
        trainer.fit()
        model = Model.load(tmp_path / str(number))
        few = dataclasses.replace(made.evaluation, samples=16, steps=(1,))
        rows = evaluate(model, few, GaussianMixture2D(modes=4, size=64), World())
        assert {row.method for row in rows} == {name}
