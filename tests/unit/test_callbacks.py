"""Drivers and observers, on a tiny run with the trainer's order of hooks."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from callback_state import begin, finish, make_state, run, step
from callbacks.checkpoint import CheckpointCallback
from callbacks.ct_schedule import CTScheduleCallback
from callbacks.curves import Curves
from callbacks.ema import EMACallback
from callbacks.grad_clip import GradClipCallback
from callbacks.jsonl_log import JsonlLog
from callbacks.loss_by_time import LossByTime, _even_edges
from callbacks.memory import MemoryUse
from callbacks.model_summary import ModelSummary
from callbacks.nonfinite import PATIENCE, NonFiniteGuard
from callbacks.profiler import TraceSteps
from callbacks.progress_bar import ProgressBar
from callbacks.sample_grid import SampleGrid
from callbacks.tensorboard_log import TensorBoardLog
from callbacks.wandb_log import WandbLog
from fastflow.callback import Callback, Driver, Observer
from fastflow.checkpoint import Keep
from fastflow.config import build, lazy
from fastflow.ema import ConstantEMA, PowerEMA
from fastflow.errors import ConfigError, DivergenceError, MissingPackageError
from fastflow.method import Loss
from fastflow.path import Linear, TrigFlow
from fastflow.posthoc import reconstruct
from fastflow.schedules import RatioStages

EVERY_CALLBACK = {
    CTScheduleCallback: {"schedule": RatioStages(q=2.0, kimg_per_stage=0.016)},
    NonFiniteGuard: {"every": 3, "action": "stop"},
    GradClipCallback: {"max_norm": 1.0},
    EMACallback: {"law": ConstantEMA(beta=0.9), "start_step": 1},
    ModelSummary: {"depth": 1},
    TraceSteps: {"start": 1, "steps": 1},
    MemoryUse: {"every": 1},
    LossByTime: {"every": 2, "edges": (0.5, 5.0)},
    ProgressBar: {"seconds": 1e-6},
    JsonlLog: {"every": 2},
    TensorBoardLog: {"every": 2},
    SampleGrid: {"every": 2, "steps": (1, 2), "count": 4},
    Curves: {"every": 2},
    CheckpointCallback: {"every": 2},
}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights_of(state) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in state.networks.student.state_dict().items()}


# The base classes


@pytest.mark.parametrize("base", [Callback, Driver, Observer])
def test_a_misspelt_hook_fails_when_the_class_is_created(base: type) -> None:
    with pytest.raises(TypeError, match="Typo.on_strat is not a hook.*did you mean 'on_start'"):
        type("Typo", (base,), {"on_strat": lambda self, state: None})


def test_observers_have_no_hooks_that_change_training() -> None:
    for name in ("before_step", "before_update", "after_update", "before_save"):
        assert name in Driver.hooks
        with pytest.raises(TypeError, match=name):
            type("Meddler", (Observer,), {name: lambda self, state: None})


def test_every_callback_is_made_from_a_configuration() -> None:
    for cls, kwargs in {**EVERY_CALLBACK, WandbLog: {"mode": "offline"}}.items():
        assert isinstance(build(lazy(cls, **kwargs)), cls)


@pytest.mark.parametrize(
    ("cls", "kwargs", "text"),
    [
        (NonFiniteGuard, {"every": 0}, "NonFiniteGuard.every: 0"),
        (NonFiniteGuard, {"action": "ignore"}, "action"),
        (GradClipCallback, {"max_norm": 0.0}, "max_norm: 0"),
        (CheckpointCallback, {"every": 0}, "CheckpointCallback.every: 0"),
        (CheckpointCallback, {"every": 2, "keep_every": 0}, "keep_every: 0 given"),
        (CheckpointCallback, {"every": 2, "keep_every": 3}, "keep_every: 3 .* multiple of every=2"),
        (JsonlLog, {"every": 0}, "JsonlLog.every: 0"),
        (TensorBoardLog, {"every": 0}, "TensorBoardLog.every: 0"),
        (WandbLog, {"every": 0}, "WandbLog.every: 0"),
        (MemoryUse, {"every": 0}, "MemoryUse.every: 0"),
        (Curves, {"every": 0}, "Curves.every: 0"),
        (ProgressBar, {"seconds": 0.0}, "ProgressBar.seconds: 0"),
        (LossByTime, {"every": 0}, "LossByTime.every: 0"),
        (LossByTime, {"edges": (2.0, 1.0)}, "LossByTime.edges"),
        (SampleGrid, {"every": 0}, "SampleGrid.every: 0"),
        (SampleGrid, {"every": 1, "steps": ()}, "SampleGrid.steps: ."),
        (SampleGrid, {"every": 1, "count": 0}, "SampleGrid.count: 0"),
        (ModelSummary, {"depth": 0}, "ModelSummary.depth: 0"),
        (TraceSteps, {"steps": 0}, "TraceSteps: start=10, steps=0"),
        (EMACallback, {"law": ConstantEMA(beta=0.9), "start_step": -1}, "start_step: -1"),
        (EMACallback, {"law": ConstantEMA(beta=0.9), "name": "a/b"}, "name: 'a/b'"),
        (EMACallback, {"law": ConstantEMA(beta=0.9), "name": "student"}, "name: 'student'"),
        (EMACallback, {"law": PowerEMA(std=0.1), "snapshot_every": 0}, "snapshot_every: 0"),
        (EMACallback, {"law": ConstantEMA(beta=0.9), "snapshot_every": 5}, "law=ConstantEMA"),
        (EMACallback, {"law": PowerEMA(std=0.1), "snapshot_every": 5, "start_step": 2}, "step=2"),
        (EMACallback, {"law": 0.9}, "law"),
        (CTScheduleCallback, {"schedule": "ratio"}, "schedule"),
    ],
)
def test_impossible_arguments_are_refused(cls: type, kwargs: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build(lazy(cls, **kwargs))


# Drivers


def test_the_curriculum_is_written_before_each_step(tmp_path: Path) -> None:
    schedule = RatioStages(q=2.0, kimg_per_stage=0.016)  # a stage per 2 steps of 8 images
    callback = CTScheduleCallback(schedule=schedule)
    assert callback.provides == {"stage", "ratio"}
    state = make_state(tmp_path)
    ratios = []
    for _ in range(5):
        step(state, [callback])
        ratios.append(state.now["ratio"])
    assert ratios == [0.5, 0.5, 0.75, 0.75, 0.875]


def test_an_ema_follows_the_student(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    late = EMACallback(law=ConstantEMA(beta=0.5), name="late", start_step=2)
    callbacks = [EMACallback(law=ConstantEMA(beta=0.5)), late]
    begin(state, callbacks)
    assert list(state.emas) == ["ema_0.5", "late"]
    expected = state.networks.student.first.weight.detach().clone()
    for number in range(1, 5):
        step(state, callbacks)
        weight = state.networks.student.first.weight.detach()
        expected = expected + 0.5 * (weight - expected)
        torch.testing.assert_close(state.emas["ema_0.5"].state_dict()["first.weight"], expected)
        same = torch.equal(state.emas["late"].state_dict()["first.weight"], weight)
        assert same == (number <= 2)


def test_two_emas_of_one_name_are_refused(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    with pytest.raises(ConfigError, match="two callbacks keep an EMA named 'ema_0.9'"):
        begin(state, [EMACallback(law=ConstantEMA(beta=0.9)) for _ in range(2)])


def test_snapshots_serve_post_hoc_averages(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    run(state, [EMACallback(law=PowerEMA(std=s), snapshot_every=4) for s in (0.05, 0.1)], 8)
    files = sorted((tmp_path / "ema_snapshots").iterdir())
    assert [f.name for f in files] == [
        f"ema_std{s}-step_0000000{n}.safetensors" for s in ("0.05", "0.1") for n in (4, 8)
    ]
    rebuilt = reconstruct(files, 0.1)
    assert rebuilt.keys() == state.networks.student.state_dict().keys()
    for name, value in state.emas["ema_std0.1"].state_dict().items():
        torch.testing.assert_close(rebuilt[name], value)


def test_clipping_scales_the_gradient_and_reports_its_norm(tmp_path: Path) -> None:
    norms = []
    for limit in (math.inf, 1e-3):
        state = make_state(tmp_path)
        step(state, [GradClipCallback(max_norm=limit)])
        grads = torch.cat([p.grad.flatten() for p in state.networks.student.parameters()])
        norms.append(state.metrics["grad_norm"].item())
        assert grads.norm().item() == pytest.approx(min(limit, norms[0]), rel=1e-3)
    assert norms[0] == norms[1] > 1e-2


def spoil(name: str, value: float):
    def poison(state) -> None:
        dict(state.networks.student.named_parameters())[name].grad.flatten()[1] = value

    return poison


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_guard_names_step_parameter_and_metrics(tmp_path: Path, value: float) -> None:
    state = make_state(tmp_path)
    callbacks = [NonFiniteGuard(every=5), GradClipCallback(max_norm=1.0)]
    begin(state, callbacks)
    step(state, callbacks)
    step(state, callbacks, poison=spoil("second.weight", value))
    for _ in range(2):  # noted, not read: the run goes on until the guard looks
        step(state, callbacks)
    with pytest.raises(DivergenceError, match="step 2: non-finite") as caught:
        step(state, callbacks)
    text = str(caught.value)
    assert "first bad gradient: second.weight" in text
    assert "loss 0." in text or "loss 1." in text, "the loss of that very step, still finite"
    assert "Last good checkpoint: none" in text
    advised = re.findall(r"NonFiniteGuard\((\w+)='(\w+)'\)", text)
    assert NonFiniteGuard(**dict(advised)), "the advice can be followed"
    assert advised == [("action", "skip")]


def test_the_guard_sees_a_bad_loss_and_names_the_last_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step_00000001"
    state = make_state(tmp_path)
    state.saver = SimpleNamespace(last_saved=lambda: folder)
    guard = NonFiniteGuard(every=1)

    def bad_loss(state) -> None:
        state.metrics["loss"] = torch.tensor(math.nan)

    step(state, [guard])
    with pytest.raises(DivergenceError, match="step 2.*loss nan.*all gradients were finite") as e:
        step(state, [guard], poison=bad_loss)
    assert str(folder) in str(e.value)
    assert f"init_from={tmp_path}" in str(e.value)


@pytest.mark.parametrize("hook", ["before_save", "on_end"])
def test_the_guard_looks_before_a_checkpoint_and_at_the_end(tmp_path: Path, hook: str) -> None:
    state = make_state(tmp_path)
    guard = NonFiniteGuard(every=1000)
    getattr(guard, hook)(state)
    step(state, [guard])
    getattr(guard, hook)(state)
    step(state, [guard], poison=spoil("first.bias", math.nan))
    with pytest.raises(DivergenceError, match=r"step 2: .*first\.bias"):
        getattr(guard, hook)(state)


def test_no_checkpoint_of_broken_weights(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    guard = NonFiniteGuard()
    with torch.no_grad():
        state.networks.student.second.bias[0] = math.inf
    with pytest.raises(DivergenceError, match=r"weights non-finite, first second\.bias"):
        guard.before_save(state)


def test_skipping_leaves_weights_and_optimizer_alone_and_counts(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    callbacks = [NonFiniteGuard(every=1, action="skip"), GradClipCallback(max_norm=1.0)]
    step(state, callbacks)
    weights = weights_of(state)
    moments = [v["exp_avg"].clone() for v in state.optimizer.state.values()]
    step(state, callbacks, poison=spoil("first.weight", math.nan))
    assert state.metrics["skipped_steps"] == 1.0
    assert all(torch.equal(v, weights[k]) for k, v in weights_of(state).items())
    after = [v["exp_avg"] for v in state.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))
    step(state, callbacks)
    assert state.metrics["skipped_steps"] == 1.0
    assert not torch.equal(state.networks.student.first.weight, weights["first.weight"])
    resumed = NonFiniteGuard(action="skip")
    resumed.load_state_dict(callbacks[0].state_dict())
    assert resumed.state_dict() == {"skipped": 1}


def test_skipping_without_end_stops(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    guard = NonFiniteGuard(every=1, action="skip")
    poison = spoil("first.weight", math.nan)
    for _ in range(PATIENCE - 1):
        step(state, [guard], poison)
    step(state, [guard])
    for _ in range(PATIENCE - 1):
        step(state, [guard], poison)
    with pytest.raises(DivergenceError, match=rf"step {2 * PATIENCE}: .*{PATIENCE} bad steps"):
        step(state, [guard], poison)


def test_the_fp16_loss_scale_may_overflow_now_and_then(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    state.experiment.precision = "fp16"
    state.optimizer.step = lambda: None  # the scaler skips such steps
    guard = NonFiniteGuard(every=1)
    poison = spoil("first.weight", math.inf)
    for _ in range(PATIENCE - 1):
        step(state, [guard], poison)
    step(state, [guard])
    for _ in range(PATIENCE - 1):
        step(state, [guard], poison)
    with pytest.raises(DivergenceError, match=r"first bad gradient: first\.weight"):
        step(state, [guard], poison)


# Observers


def test_observers_change_nothing(tmp_path: Path) -> None:
    results = []
    for observed in (False, True):
        state = make_state(tmp_path / str(observed), shape=(1, 4, 4))
        state.run_dir.mkdir()
        chosen = [
            build(lazy(cls, **kwargs))
            for cls, kwargs in EVERY_CALLBACK.items()
            if issubclass(cls, Driver) or observed
        ]
        run(state, chosen, 6)
        results.append((weights_of(state), state.emas["ema_0.9"].state_dict(), torch.rand(1)))
    for ours, theirs in zip(results[0][:2], results[1][:2], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(results[0][2], results[1][2]), "the global generator went another way"


@pytest.mark.parametrize("cls", [c for c in EVERY_CALLBACK if issubclass(c, Observer)])
def test_no_observer_touches_global_generators_or_the_network(cls: type, tmp_path: Path) -> None:
    state = make_state(tmp_path, shape=(1, 4, 4))
    driver = EMACallback(law=ConstantEMA(beta=0.9))
    begin(state, [driver])
    observer = build(lazy(cls, **EVERY_CALLBACK[cls]))
    JsonlLog(every=1)._write(state, {"step": 1, "loss": 1.0})
    state.networks.student.train()
    for _ in range(4):
        step(state, [driver])
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        before = weights_of(state), torch.get_rng_state(), random.getstate()
        numbers = np.random.get_state()[1].copy()
        grads = [p.grad.clone() for p in state.networks.student.parameters()]
        if state.step == 1:
            begin(state, [observer])
        observer.after_step(state)
        if state.step == 4:
            finish(state, [observer])
        assert all(torch.equal(v, before[0][k]) for k, v in weights_of(state).items())
        assert torch.equal(torch.get_rng_state(), before[1])
        assert random.getstate() == before[2]
        assert (np.random.get_state()[1] == numbers).all()
        assert state.networks.student.training
        now = [p.grad for p in state.networks.student.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(grads, now, strict=True))
        assert state.curriculum == {}


class NoReading(TorchDispatchMode):
    """Any reading of a tensor's value from the device is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the device was waited for"
        return func(*args, **(kwargs or {}))


def test_nothing_reads_from_the_device_between_logs(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    callbacks = [
        NonFiniteGuard(every=100),
        GradClipCallback(max_norm=1.0),
        EMACallback(law=ConstantEMA(beta=0.9)),
        LossByTime(every=100),
        MemoryUse(every=1),
        ProgressBar(seconds=100.0),
        JsonlLog(every=100),
    ]
    begin(state, callbacks)
    for number in range(3):
        state.loss = Loss(torch.rand(8), torch.rand(8))
        state.metrics = {"loss": torch.rand(()), "lr": 0.1}
        for p in state.networks.student.parameters():
            p.grad = torch.ones_like(p)
        with NoReading():
            for callback in callbacks[:3]:
                callback.before_update(state)
            state.step = number + 1
            for callback in callbacks[:3]:
                callback.after_update(state)
            for callback in callbacks[3:]:
                callback.after_step(state)
    with NoReading(), pytest.raises(AssertionError, match="waited"):
        state.metrics["loss"].item()


def test_guard_and_clipping_work_on_shards(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        norms = []
        for sharded in (False, True):
            state = make_state(tmp_path)
            student = state.networks.student
            if sharded:
                fully_shard(student.first)
                fully_shard(student)
                state.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
            callbacks = [NonFiniteGuard(every=2), GradClipCallback(max_norm=0.1)]
            step(state, callbacks)
            norms.append(state.metrics["grad_norm"].item())
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)

        def poison(state) -> None:
            state.networks.student.second.weight.grad.to_local()[0, 1] = math.nan

        with pytest.raises(DivergenceError, match=r"step 2: .*second\.weight"):
            step(state, callbacks, poison)
    finally:
        dist.destroy_process_group()


def test_checkpoints_are_due_every_so_many_steps(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    saved = []
    state.saver = SimpleNamespace(save=lambda keep: saved.append((state.step, keep)))
    run(state, [CheckpointCallback(every=3, keep=2, keep_every=6)], 8)
    keep = Keep(newest=2, every=6)
    assert saved == [(3, keep), (6, keep)]  # the trainer itself saves where it stops


def test_the_log_holds_means_speed_and_curriculum(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    schedule = CTScheduleCallback(schedule=RatioStages(q=2.0, kimg_per_stage=1e6))
    losses = []

    class Keep(Observer):
        def after_step(self, state) -> None:
            losses.append(state.metrics["loss"].item())

    run(state, [schedule, JsonlLog(every=2), Keep()], 5)
    log = lines(tmp_path / "log.jsonl")
    assert [r["step"] for r in log] == [2, 4, 5]
    assert [r["images"] for r in log] == [16, 32, 40]
    means = [sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert [r["loss"] for r in log] == pytest.approx(means)
    assert all(r["curriculum/ratio"] == 0.5 and r["lr"] == 1e-2 for r in log)
    assert all(r["images_per_second"] > 0 for r in log)
    assert [r["seconds"] for r in log] == [0.5, 1.0, 1.25]


def test_a_resumed_log_repeats_nothing(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    run(state, [JsonlLog(every=2)], 7)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # the crash
    resumed = make_state(tmp_path)
    resumed.step = 4
    run(resumed, [JsonlLog(every=2)], 8)
    log = lines(tmp_path / "log.jsonl")
    assert [r["step"] for r in log] == [2, 4, 6, 8]


def test_loss_by_time_sorts_losses_into_buckets(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    callback = LossByTime(every=2, edges=(1.0, 5.0, 100.0))
    begin(state, [callback])
    times, losses = [], []
    for _ in range(4):
        step(state, [callback])
        times.append(state.loss.times)
        losses.append(state.loss.per_sample)
    log = lines(tmp_path / "loss_by_time.jsonl")
    assert [r["step"] for r in log] == [2, 4]
    t, value = torch.cat(times[2:]), torch.cat(losses[2:])
    inside = [t < 1, (t >= 1) & (t < 5), (t >= 5)]
    assert log[1]["count"] == [int(m.sum()) for m in inside] + [0]
    assert log[1]["loss"][3] is None
    assert log[1]["loss"][:3] == pytest.approx([value[m].mean().item() for m in inside])


def test_loss_by_time_divides_the_range_of_the_path(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    run(state, [LossByTime(every=1)], 1)
    edges = lines(tmp_path / "loss_by_time.jsonl")[0]["edges"]
    path = state.method.path
    assert len(edges) == 7
    ratios = np.diff(np.log([path.t_min, *edges, path.t_max]))
    np.testing.assert_allclose(ratios, ratios[0])


@pytest.mark.parametrize("path", [Linear(), TrigFlow(sigma_data=0.5)], ids=repr)
def test_loss_by_time_divides_a_path_that_starts_at_pure_data(path) -> None:
    edges = _even_edges(SimpleNamespace(method=SimpleNamespace(path=path)))
    assert len(edges) == 7
    assert path.t_min < min(edges) < max(edges) < path.t_max
    ratios = np.diff(np.log(path.nsr(torch.tensor(edges, dtype=torch.float64))))
    np.testing.assert_allclose(ratios, np.log(80 / 0.002) / 8)


def test_memory_reaches_the_log(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    run(state, [MemoryUse(every=2), JsonlLog(every=2)], 2)
    assert 50 < lines(tmp_path / "log.jsonl")[0]["memory/peak_mib"] < 1e6


def test_the_progress_line_shows_speed_time_left_and_loss(tmp_path: Path, capsys) -> None:
    state = make_state(tmp_path, steps=4)
    bar = ProgressBar(seconds=1e-6)
    run(state, [bar], 4)
    err = capsys.readouterr().err
    assert "step 4/4" in err
    assert "images/s" in err
    assert "0:00:00 left" in err
    assert "loss" in err


def test_the_progress_bar_of_a_terminal(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    state = make_state(tmp_path, steps=4)
    state.step = 1
    run(state, [ProgressBar(seconds=1e-6)], 4)
    err = capsys.readouterr().err
    assert "tiny 100%" in err
    assert "4/4" in err
    assert "images/s" in err


def test_the_model_table_counts_parameters_and_operations(tmp_path: Path, capsys) -> None:
    state = make_state(tmp_path)
    run(state, [ModelSummary()], 1)
    table = (tmp_path / "model.txt").read_text()
    assert table in capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in table.splitlines()}
    whole = next(row for name, row in rows.items() if name == "Tiny")
    assert whole[1:3] == ["31", "100.0%"]  # 3 * 4 + 4 + 4 * 3 + 3
    part = next(line.split() for line in table.splitlines() if "second (Linear)" in line)
    assert part[2:4] == ["15", "48.4%"]


def test_the_model_table_counts_multiply_accumulates(tmp_path: Path) -> None:
    state = make_state(tmp_path, shape=(500_000,))
    begin(state, [ModelSummary()])
    lines = (tmp_path / "model.txt").read_text().splitlines()
    costs = [float(line.split()[-1]) for line in lines[1:4]]
    assert costs == [0.004, 0.002, 0.002]  # 2e6 products per layer


def test_the_model_table_by_fvcore(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    run(state, [ModelSummary(counter="fvcore")], 1)
    table = (tmp_path / "model.txt").read_text()
    assert "second" in table
    assert "#flops" in table


def test_a_window_of_steps_is_traced(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    run(state, [TraceSteps(start=1, steps=1)], 3)
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    assert any("addmm" in str(event.get("name")) for event in trace["traceEvents"])
    assert "addmm" in (tmp_path / "profile" / "operators.txt").read_text()


def test_tensorboard_gets_the_records(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    state = make_state(tmp_path)
    run(state, [TensorBoardLog(every=2)], 4)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [2, 4]
    assert "images_per_second" in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("callback", "module"),
    [
        (TensorBoardLog(), "tensorboard"),
        (WandbLog(), "wandb"),
        (Curves(), "matplotlib"),
        (ModelSummary(counter="fvcore"), "fvcore"),
    ],
)
def test_absent_packages_are_named_at_once(callback, module: str, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=rf"{module}.*pip install 'fastflow\["):
        callback.setup(make_state(tmp_path))


def test_wandb_is_offline_and_never_asks(tmp_path: Path, monkeypatch) -> None:
    script = f"""
import sys
sys.path[:0] = ["tests"]
from pathlib import Path
from callback_state import make_state, run
import callbacks.wandb_log as module
module.to_plain = lambda experiment: dict(name=experiment.name)
state = make_state(Path({str(tmp_path)!r}))
log = module.WandbLog(every=2)
run(state, [log], 4)
print("id", log.state_dict()["id"])
try:
    module.WandbLog(mode="online").setup(state)
except module.ConfigError as error:
    print(error)
"""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "'online' given, but there is no login" in done.stdout
    runs = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    name = done.stdout.split("id ")[1].split()[0]
    assert [f.name for f in runs] == [f"run-{name}.wandb"]
