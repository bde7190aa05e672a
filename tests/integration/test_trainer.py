"""The training loop: exact steps, drivers and observers, accumulation, signals, divergence."""

import dataclasses
import importlib
import json
import math
import os
import pkgutil
import re
import signal
import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import callbacks
from callbacks.checkpoint import CheckpointCallback
from callbacks.curves import Curves
from callbacks.early_metrics import EarlyMetrics
from callbacks.ema import EMACallback
from callbacks.jsonl_log import JsonlLog
from callbacks.loss_by_time import LossByTime
from callbacks.memory import MemoryUse
from callbacks.model_summary import ModelSummary
from callbacks.nonfinite import NonFiniteGuard
from callbacks.profiler import TraceSteps
from callbacks.progress_bar import ProgressBar
from callbacks.sample_grid import SampleGrid
from callbacks.tensorboard_log import TensorBoardLog
from callbacks.wandb_log import WandbLog
from fastflow.callback import Driver, Observer
from fastflow.config import lazy
from fastflow.consistency import GridPairing
from fastflow.data.digits import Digits
from fastflow.data.toy import GaussianMixture2D
from fastflow.ema import ConstantEMA
from fastflow.errors import ConfigError, DataError, DivergenceError
from fastflow.evaluation.toy_metrics import EnergyDistance
from fastflow.experiment import Parallel
from fastflow.method import Frozen
from fastflow.network import Network
from fastflow.progress import Progress
from fastflow.schedules import LinearWarmup
from fastflow.teacher import Teacher
from fastflow.trainer import Trainer
from fastflow.wrappers import EDMDenoiser
from methods.cm import CM
from methods.tcm import TCM
from networks.layers import PositionalEmbedding
from networks.mlp import ToyMLP
from tiny import (
    GRID_CURRICULUM,
    MLP,
    OBSERVERS,
    RATIO,
    RATIO_CURRICULUM,
    assert_same,
    digits,
    drivers,
    everything,
    toy,
    toy_with_target,
    toy_with_teacher,
    train,
    without_observers,
)


@pytest.mark.parametrize("steps", [1, 5])
def test_exactly_the_configured_number_of_steps_is_run(steps, tmp_path):
    calls = []

    class Count(Observer):
        def after_step(self, state):
            calls.append((state.step, state.images))

    trainer = Trainer(toy(steps=steps), tmp_path / "run")
    trainer.observers.append(Count())
    state = trainer.fit()
    assert calls == [(n, 16 * n) for n in range(1, steps + 1)]
    assert state.step == steps
    counts = {int(s["step"]) for s in state.optimizer.state.values()}
    assert counts == {steps}


def test_hooks_run_in_order_and_drivers_first(tmp_path):
    trainer = Trainer(toy(steps=2), tmp_path / "run")
    heard = []

    def spy(kind, name):
        hooks = sorted(kind.hooks - {"setup", "state_dict", "load_state_dict"})
        listener = type(name, (kind,), {h: _note(heard, f"{name}.{h}") for h in hooks})
        return listener()

    driver, observer = spy(Driver, "D"), spy(Observer, "O")
    trainer.callbacks = (driver, observer)
    trainer.drivers, trainer.observers = [driver], [observer]
    trainer.state.curriculum["ratio"] = 0.5
    driver.before_step = lambda state: (
        heard.append("D.before_step"),
        state.curriculum.update(ratio=0.5),
    )
    trainer.fit()
    step = ["D.before_step", "D.before_update", "D.after_update", "O.after_step"]
    end = ["D.on_end", "D.before_save", "O.on_end"]
    assert heard == ["D.on_start", "O.on_start", *step, *step, *end]


def _note(heard, text):
    def hook(self, state):
        heard.append(text)

    return hook


WATCHERS = (
    lazy(ModelSummary),
    lazy(ModelSummary, counter="fvcore"),
    lazy(LossByTime, every=2),
    lazy(MemoryUse, every=1),
    lazy(
        EarlyMetrics, every=2, samples=20, steps=(1, 2), metrics=(EnergyDistance(),), keep_best=True
    ),
    lazy(ProgressBar, seconds=1e-9),
    lazy(JsonlLog, every=1),
    lazy(TensorBoardLog, every=2),
    lazy(WandbLog, every=2),
    lazy(TraceSteps, start=1, steps=2),
    lazy(SampleGrid, every=2, count=4, steps=(1, 2)),
    lazy(SampleGrid, every=3, count=3, steps=(1,), weights="ema_std0.1"),
    lazy(CheckpointCallback, every=1, keep=1),
    lazy(Curves, every=3),
)


@pytest.mark.parametrize("make", [toy, digits])
def test_removing_every_observer_leaves_the_weights_bit_identical(make, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    plain = without_observers(make(steps=4))
    watched = dataclasses.replace(plain, callbacks=(*plain.callbacks, *WATCHERS))
    assert_same(train(watched, tmp_path / "watched"), train(plain, tmp_path / "plain"))
    written = {path.name for path in (tmp_path / "watched").iterdir()}
    assert {"log.jsonl", "samples", "curves.png", "loss_by_time.jsonl", "model.txt"} <= written
    assert {"early_results.jsonl", "weights_best"} <= written
    assert len(list((tmp_path / "watched" / "samples").iterdir())) == 3


def test_every_observer_there_is_watches():
    modules = [f"callbacks.{m.name}" for m in pkgutil.iter_modules(callbacks.__path__)]
    found = [value for name in modules for value in vars(importlib.import_module(name)).values()]
    observers = {v for v in found if isinstance(v, type) and issubclass(v, Observer)}
    assert observers - {Observer} == {node.target for node in WATCHERS}


@pytest.mark.parametrize("method", ["ratio", "target"])
def test_gradient_accumulation_is_one_large_batch(method, tmp_path):
    make = toy if method == "ratio" else toy_with_target
    whole = train(make(), tmp_path / "whole")
    for micro in (5, 1):
        parts = train(make(parallel=Parallel(micro_batch=micro)), tmp_path / str(micro))
        for name, value in everything(whole).items():
            torch.testing.assert_close(everything(parts)[name], value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(parts.loss.per_sample, whole.loss.per_sample)
        torch.testing.assert_close(parts.metrics["distance"], whole.metrics["distance"])
        torch.testing.assert_close(parts.metrics["grad_norm"], whole.metrics["grad_norm"])
        assert torch.equal(parts.loss.times, whole.loss.times)


def test_activation_checkpointing_changes_nothing(tmp_path):
    plain = train(digits(steps=2), tmp_path / "plain")
    saving = train(digits(steps=2, parallel=Parallel(checkpoint=True)), tmp_path / "saving")
    for name, value in everything(plain).items():
        torch.testing.assert_close(everything(saving)[name], value, rtol=1e-4, atol=1e-6)


def test_bf16_computes_in_bf16_and_keeps_weights_times_and_losses_in_fp32(tmp_path):
    trainer = Trainer(digits(precision="bf16", steps=2), tmp_path / "run")
    dtypes = {torch.nn.Conv2d: set(), PositionalEmbedding: set()}
    for module in trainer.state.networks.student.modules():
        if isinstance(module, tuple(dtypes)):
            found = dtypes[type(module)]
            module.register_forward_hook(lambda m, given, out, found=found: found.add(out.dtype))
    state = trainer.fit()
    assert dtypes == {torch.nn.Conv2d: {torch.bfloat16}, PositionalEmbedding: {torch.float32}}
    assert state.loss.per_sample.dtype == torch.float32
    assert state.loss.times.dtype == torch.float64
    assert {v.dtype for v in everything(state).values()} == {torch.float32}


def test_the_learning_rate_law_scales_the_peak(tmp_path):
    """Warm-up over 64 images: factors 0, 1/4, 2/4, 3/4, 1, 1, and at a resume the same peak."""
    callbacks = (*drivers(), lazy(JsonlLog, every=1))
    experiment = toy(lr=LinearWarmup(images=64), callbacks=callbacks)
    train(experiment, tmp_path / "run", stop_at=3)
    train(experiment, tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    factors = [LinearWarmup(images=64)(_progress(step)) for step in range(6)]
    assert [r["lr"] for r in log] == pytest.approx([1e-3 * f for f in factors])
    assert factors[0] < factors[3] < factors[4] == 1


def _progress(step):
    return Progress(step=step, images=16 * step, total_steps=6, batch_size=16)


def test_the_target_follows_the_student(tmp_path):
    trainer = Trainer(toy_with_target(steps=3), tmp_path / "run")
    nets = trainer.state.networks
    expected = {n: v.clone() for n, v in nets["target"].state_dict().items()}
    assert all(torch.equal(v, nets.student.state_dict()[n]) for n, v in expected.items())

    class Follow(Observer):
        def after_step(self, state):
            for name, value in state.networks.student.state_dict().items():
                expected[name] += 0.1 * (value - expected[name])

    trainer.observers.append(Follow())
    trainer.fit()
    for name, value in nets["target"].state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert not any(p.requires_grad for p in nets["target"].parameters())


# Signals and divergence


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_saves(number, tmp_path, capsys):
    class Kill(Observer):
        def after_step(self, state):
            if state.step == 3:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    experiment = without_observers(toy())  # also without a CheckpointCallback nothing is lost
    trainer = Trainer(experiment, tmp_path / "run")
    trainer.observers.append(Kill())
    state = trainer.fit()
    assert (state.step, state.stop) == (3, number.name)
    said = capsys.readouterr().err
    assert said.count(f"{number.name}: stopping after this step") == 1
    assert ("once more aborts" in said) == (number == signal.SIGINT)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000003"
    assert not (tmp_path / "run" / "weights").exists()
    assert signal.getsignal(number) is before
    assert_same(train(experiment, tmp_path / "run"), train(experiment, tmp_path / "straight"))


def test_a_second_interrupt_aborts(tmp_path):
    class Kill(Observer):
        def after_step(self, state):
            if state.step == 3:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    trainer = Trainer(toy(), tmp_path / "run")
    trainer.observers.append(Kill())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_more_of_sigterm_change_nothing(tmp_path):
    """Schedulers send it to every process, and launchers pass it on."""

    class Kill(Observer):
        def after_step(self, state):
            if state.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = Trainer(toy(), tmp_path / "run")
    trainer.observers.append(Kill())
    assert trainer.fit().stop == "SIGTERM"
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000003"


def test_a_signal_before_the_first_step_saves_nothing(tmp_path):
    trainer = Trainer(toy(), tmp_path / "run")
    trainer.state.stop = "SIGINT"
    assert trainer.fit().step == 0
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert_same(train(toy(), tmp_path / "run"), train(toy(), tmp_path / "straight"))


class Poison(Driver):
    """Makes the gradient of one step infinite."""

    def __init__(self, step: int) -> None:
        self.step = step

    def before_update(self, state):
        if state.step == self.step:
            state.networks.student.model.first.bias.grad[0] = math.inf


@pytest.mark.parametrize("step", [4, 5])
def test_divergence_stops_and_leaves_the_good_checkpoint(step, tmp_path):
    """Bad gradients after the checkpoint of step 4; the guard looks at steps 2, 4, 6."""
    good = train(toy(), tmp_path / "good", stop_at=4)
    trainer = Trainer(toy(), tmp_path / "run")
    trainer.drivers.insert(0, Poison(step))
    with pytest.raises(DivergenceError, match=rf"step {step + 1}:.*model\.first\.bias.*00000004"):
        trainer.fit()
    folders = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert folders == ["latest", "step_00000004"]
    assert not (tmp_path / "run" / "weights").exists()
    assert_same(Trainer(toy(), tmp_path / "run").state, dataclasses.replace(good, curriculum={}))


def test_divergence_in_the_step_of_a_checkpoint_is_not_saved(tmp_path):
    """The guard looks every 100 steps, but always before a checkpoint is written."""
    guard = lazy(NonFiniteGuard, every=100)
    kept = tuple(c for c in drivers() if c.target is not NonFiniteGuard)
    trainer = Trainer(toy(callbacks=(*kept, guard, *OBSERVERS)), tmp_path / "run")
    trainer.drivers.insert(0, Poison(3))
    with pytest.raises(DivergenceError, match="step 4:"):
        trainer.fit()
    assert not (tmp_path / "run" / "checkpoints").exists()


# Data that fails


class Killed(GaussianMixture2D):
    """Fetched in a background process, which is killed at one of the batches."""

    decodes = True

    def fetch(self, indices):
        if indices.tolist() == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fetch(indices)


def test_a_killed_worker_is_named_wherever_training_is(tmp_path):
    """Torch interrupts whatever the process does, not only the wait for the next batch."""
    trainer = Trainer(without_observers(toy(steps=500)), tmp_path / "run")
    dataset = Killed(modes=4, size=200)
    dataset.last = trainer.loader.indices(20).tolist()
    trainer.loader.dataset = dataset
    with pytest.raises(DataError, match=r"^gaussian_mixture2d: a background worker failed: .*Kill"):
        trainer.fit()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (DataError("cats.zip: image 7.png is unreadable"), "7.png is unreadable (sample 7 of gau"),
        (ValueError("not\na PNG"), "sample 7 cannot be read: ValueError: not a PNG"),
    ],
    ids=["file", "other"],
)
def test_a_bad_sample_is_named_with_its_file_and_index(tmp_path, error, text):
    class Bad(GaussianMixture2D):
        def fetch(self, indices):
            if 7 in indices.tolist():
                raise error
            return super().fetch(indices)

    trainer = Trainer(without_observers(toy(steps=500)), tmp_path / "run")
    trainer.loader.dataset = Bad(modes=4, size=200)
    with pytest.raises(DataError, match=re.escape(text)):
        trainer.fit()


# What is refused before anything is written


class Score(Network):
    predicts = "score"
    sample_shape = (2,)


class Velocity(Network):
    predicts = "velocity"
    sample_shape = (2,)

    def __init__(self) -> None:
        super().__init__()


def distilled(teacher: Teacher):
    return {
        "method": CM(pairs=GridPairing(), teacher=teacher),
        "callbacks": (GRID_CURRICULUM,),
    }


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            lambda: {"callbacks": ()},
            r"CM needs the curriculum value 'ratio' .* add lazy\(CTScheduleCallback, "
            r"schedule=RatioStages",
        ),
        (
            lambda: {"callbacks": (GRID_CURRICULUM,)},
            r"needs the curriculum value 'ratio' .*\(provided: N\)",
        ),
        (
            lambda: {"callbacks": (RATIO_CURRICULUM, RATIO_CURRICULUM)},
            "2 drivers provide 'ratio', 1 accepted",
        ),
        (
            lambda: {"callbacks": (GRID_CURRICULUM, *drivers(), GRID_CURRICULUM)},
            "2 drivers provide 'N', 1 accepted",
        ),
        (
            lambda: {"network": lazy(EDMDenoiser, model=lazy(ToyMLP, data_dim=3, width=16))},
            r"network: made for samples \(3,\), but the data 'gaussian_mixture2d' has \(2,\)",
        ),
        (
            lambda: {"data": lazy(Digits)},
            r"network: made for samples \(2,\), but the data 'digits' has \(1, 8, 8\)",
        ),
        (
            lambda: {"network": lazy(EDMDenoiser, model=lazy(ToyMLP, width=16, cond_dim=3))},
            "network.cond_dim: 3 given, .* 4 classes",
        ),
        (lambda: {"network": lazy(Velocity)}, "predicts 'velocity', but CM expects 'denoiser'"),
        (
            lambda: {"network": MLP.replace(model=MLP.model.replace(two_times=True))},
            "network: takes two times, but CM trains a network of one time",
        ),
        (
            lambda: distilled(Teacher(source=Frozen(weights=None, network=lazy(Score)))),
            "teacher: predicts 'score', accepted: 'denoiser', 'velocity', 'trigflow'",
        ),
        (
            lambda: distilled(Teacher(source=Frozen(weights=None, network=MLP), guidance=3.0)),
            "method.teacher.guidance: 3.0 given without classes, accepted: 1",
        ),
        (
            lambda: {
                **distilled(Teacher(source=Frozen(weights=None, network=MLP))),
                "network": lazy(EDMDenoiser, model=lazy(ToyMLP, width=16, cond_dim=4)),
            },
            "teacher: cond_dim 0 given, accepted: 4",
        ),
        (
            lambda: {"method": CM(pairs=RATIO, sigma_data=0.7)},
            "method.sigma_data: 0.7 given, accepted: 0.5, that of the network",
        ),
        (lambda: {"precision": "fp16"}, "precision: 'fp16' given, accepted on a CPU: fp32, bf16"),
        (lambda: {"parallel": Parallel(shard=2)}, "parallel.shard: 2 given for 1 processes"),
        (
            lambda: {"optimizer": lazy(torch.optim.RAdam, lr=-1.0)},
            "optimizer.lr: -1.0 given, .*Invalid learning rate: -1.0",
        ),
        (
            lambda: {"callbacks": (*drivers(), lazy(EMACallback, law=ConstantEMA(beta=0.9)))},
            "two callbacks keep an EMA named 'ema_0.9'",
        ),
        (
            lambda: {"callbacks": (lazy(SampleGrid, every=1, weights="ema_1"), *drivers())},
            "SampleGrid.weights: 'ema_1' given, accepted: ema_0.9, ema_std0.1",
        ),
        (
            lambda: {"data": lazy(GaussianMixture2D, modes=4, size=0)},
            "data.size: 0 given",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(changes, text, tmp_path):
    with pytest.raises(ConfigError, match=text):
        Trainer(toy(**changes()), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_another_shape_is_refused(tmp_path):
    network = lazy(EDMDenoiser, model=lazy(ToyMLP, data_dim=3, width=16))
    teacher = Teacher(source=Frozen(weights=None, network=network))
    method = dataclasses.replace(toy_with_target().method, teacher=teacher)
    experiment = dataclasses.replace(toy_with_target(), method=method)
    with pytest.raises(ConfigError, match=r"teacher: made for samples \(3,\), .* \(2,\)"):
        Trainer(experiment, tmp_path / "run")


def test_observers_may_come_before_what_they_look_at(tmp_path):
    """A grid of the EMA's samples is found whatever the order in the configuration."""
    grid = lazy(SampleGrid, every=6, count=4, steps=(1,))
    train(toy(callbacks=(grid, *drivers())), tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "step_00000006.png").exists()


# Waiting for the device


class Reads(TorchDispatchMode):
    """Notes what a GPU would be waited for: tensors read back as Python numbers, masks as indices.

    Lists of whole numbers are let through: the indices of a batch always lie on the CPU.
    """

    names = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2"}

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.names or mask:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name):
        stack = traceback.extract_stack(limit=12)[:-2]
        self.found.append((name, [f"{f.filename}:{f.lineno}" for f in stack]))

    def __enter__(self):
        tolist = torch.Tensor.tolist

        def noted(tensor):
            if tensor.is_floating_point():
                self.note("tolist")
            return tolist(tensor)

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(torch.Tensor, "tolist", noted)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)


@pytest.mark.parametrize("method", ["ratio", "grid", "teacher", "tcm", "micro"])
def test_a_step_reads_nothing_back(method, tmp_path):
    """With guard, clipping, EMAs, log and buckets of the loss, while none of them is due.

    SGD, because on a CPU torch's other optimizers read their own step count, which lies there.
    """
    watchers = (lazy(LossByTime, every=100), lazy(JsonlLog, every=100), lazy(ProgressBar))
    changes = {"optimizer": lazy(torch.optim.SGD, lr=1e-3, momentum=0.9)}

    def callbacks(curriculum):
        kept = (c for c in drivers(curriculum) if c.target is not NonFiniteGuard)
        return (*kept, lazy(NonFiniteGuard, every=100), *watchers)

    if method == "teacher":
        train(toy(steps=1), tmp_path / "teacher")
        experiment = toy_with_teacher(tmp_path / "teacher", **changes)
    elif method == "grid":
        experiment = toy_with_target(**changes)
    elif method == "tcm":
        experiment = toy(method=TCM(stage1=Frozen(weights=None, network=MLP)), **changes)
    else:
        micro = 4 if method == "micro" else None
        experiment = toy(parallel=Parallel(micro_batch=micro), **changes)
    experiment = dataclasses.replace(experiment, callbacks=callbacks(experiment.callbacks[0]))
    trainer = Trainer(experiment, tmp_path / "run")
    for callback in trainer.callbacks:
        callback.on_start(trainer.state)
    batches = trainer.loader.batches()
    for _ in range(2):
        batch = next(batches)
        with Reads() as reads:
            trainer._step(batch)
        assert reads.found == []


def test_reads_are_counted():
    with Reads() as reads:
        torch.ones(1).item()
        bool(torch.ones(1) > 0)
        torch.ones(2).tolist()
        torch.ones(3)[torch.ones(3) > 0]
    assert [name for name, _ in reads.found] == [
        *("_local_scalar_dense", "_local_scalar_dense"),
        *("tolist", "index"),
    ]
