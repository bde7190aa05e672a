"""A step without memory holds what a real one does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from configs.experiments.Digits import config_mf_digits, config_sct_digits, config_tcm_digits
from configs.experiments.Digits.common import UNET
from fastflow import rehearsal
from fastflow.config import lazy, load_experiment
from fastflow.consistency import GridPairing
from fastflow.counting import Traffic
from fastflow.distributed import World
from fastflow.errors import ConfigError
from fastflow.evaluation.compare import experiment_files
from fastflow.experiment import Experiment, Parallel
from fastflow.method import Frozen
from fastflow.rehearsal import WIDE, rehearse
from fastflow.schedules import FixedDecay
from fastflow.wrappers import EDMDenoiser
from methods.cm import CM
from networks.mlp import ToyMLP
from real_step import counted
from tiny import GRID_CURRICULUM, digits, drivers, toy

SAMPLES = 16


def tcm() -> Experiment:
    """With a first stage that needs no weights."""
    experiment = config_tcm_digits.experiment()
    stage1 = Frozen(weights=None, network=lazy(EDMDenoiser, model=UNET))
    method = dataclasses.replace(experiment.method, stage1=stage1)
    return dataclasses.replace(experiment, method=method, init_from=None)


EXPERIMENTS = {
    "dropout, classes, two EMAs": digits(batch_size=SAMPLES),
    "checkpointing": digits(batch_size=SAMPLES, parallel=Parallel(checkpoint=True)),
    "a target": digits(
        batch_size=SAMPLES,
        method=CM(pairs=GridPairing(), target=FixedDecay(mu=0.9)),
        callbacks=drivers(GRID_CURRICULUM),
    ),
    "tangents": config_mf_digits.experiment(),
    "tangents, log-variance": dataclasses.replace(config_sct_digits.experiment(), init_from=None),
    "rows chosen by their times": tcm(),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_rehearsed_step_holds_what_a_real_one_does(name: str) -> None:
    experiment = EXPERIMENTS[name]
    real = counted(World(), experiment, SAMPLES)
    step = rehearse(experiment, 1, [SAMPLES])
    for item in ("parameters", "gradients", "emas", "companions"):
        assert getattr(step, item) == getattr(real, item), item
    assert step.optimizer == pytest.approx(real.optimizer, rel=0.01)
    assert step.working(SAMPLES) == pytest.approx(real.working, rel=0.03)
    assert real.two <= step.working(SAMPLES) + step.accumulated <= 1.1 * real.two


@pytest.mark.slow
@pytest.mark.parametrize("path", experiment_files(), ids=lambda path: path.stem)
def test_every_configuration_can_be_rehearsed(path: Path) -> None:
    experiment: Experiment = load_experiment(path, kind=Experiment)
    step = rehearse(experiment, 1, [2])
    assert step.parameters > 0
    assert step.working(2) > 0
    assert (step.companions > 0) == bool(experiment.method.companions())


def test_lines_give_sizes_between_and_beyond() -> None:
    experiment = digits(batch_size=64)
    step = rehearse(experiment, 1, (1, 8, 32, 48))
    known = {size: step.measured[size] for size in (8, 32)}
    line = dataclasses.replace(step, measured=known)
    assert line.working(48) == pytest.approx(step.measured[48], rel=0.02)
    known = {size: step.measured[size] for size in (1, 48)}
    chord = dataclasses.replace(step, measured=known)
    assert step.measured[8] <= chord.working(8) < 1.3 * step.measured[8]


def test_nothing_is_computed_nor_kept_in_memory() -> None:
    """A network of 4 TB."""
    wide = lazy(EDMDenoiser, model=lazy(ToyMLP, data_dim=2, width=10**6, depth=2))
    step = rehearse(toy(network=wide), 1, [4])
    assert step.parameters > 4e12
    assert step.optimizer == pytest.approx(2 * step.parameters, rel=0.01)


def test_a_share_of_the_weights_on_each_of_many_processes() -> None:
    experiment = digits(batch_size=64)
    whole = rehearse(experiment, 1, [8])
    # As on GPUs, where Adam works on all parameters at once.
    assert whole.update == pytest.approx(whole.gradients, rel=0.1)
    traffic = Traffic()
    parallel = Parallel(shard=8)
    sharded = rehearse(dataclasses.replace(experiment, parallel=parallel), 8, [8], traffic)
    for item in ("parameters", "gradients", "optimizer", "emas"):
        share = getattr(sharded, item) / getattr(whole, item)
        assert 1 / 8 <= share < 0.2, item  # rows do not always divide by eight
    assert sharded.accumulated == whole.gradients
    assert traffic.calls["scatter"] == sharded.units + 1
    assert traffic.sent["scatter"] == pytest.approx(whole.gradients * 7 / 8, rel=0.3)
    assert not dist.is_initialized()


def test_narrow_types_hold_less() -> None:
    wide = rehearse(digits(batch_size=64), 1, (8, 16))
    narrow = rehearse(digits(batch_size=64, precision="bf16"), 1, (8, 16))
    assert narrow.parameters == wide.parameters
    grown = [step.working(16) - step.working(8) for step in (narrow, wide)]
    assert 0.5 < grown[0] / grown[1] < 0.95


def test_types_are_those_of_gpus() -> None:
    """What autocast widens on GPUs alone, as torch itself lists it."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    overloads: dict[str, list[str]] = {}
    for name in torch._C._dispatch_get_all_op_names():
        overloads.setdefault(name.removeprefix("aten::").partition(".")[0], []).append(name)
    operators = {"interpolate": "upsample_nearest2d", "vector_norm": "linalg_vector_norm"}
    for name in WIDE:
        found = overloads[operators.get(name, name)]
        assert any(has(overload, "AutocastCUDA") for overload in found), name
        assert not any(has(overload, "AutocastCPU") for overload in found), name


def test_types_of_gpus_hold_more(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = digits(batch_size=8, precision="bf16")
    as_on_gpus = rehearse(experiment, 1, [8]).working(8)
    monkeypatch.setattr(rehearsal, "WIDE", frozenset())
    assert rehearse(experiment, 1, [8]).working(8) < 0.9 * as_on_gpus


def test_types_of_gpus_reach_what_is_recomputed() -> None:
    with_units = digits(batch_size=8, precision="bf16", parallel=Parallel(checkpoint=True))
    plain = dataclasses.replace(with_units, parallel=Parallel())
    sizes = [rehearse(e, 1, [8]).working(8) for e in (with_units, plain)]
    assert sizes[0] < sizes[1]


class Reads(ToyMLP):
    """A network that looks at its numbers."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.abs().max() > 100:
            x = x / 2
        out: torch.Tensor = super().forward(x, *args, **kwargs)
        return out


def test_a_network_that_reads_numbers_is_refused() -> None:
    experiment = toy(network=lazy(EDMDenoiser, model=lazy(Reads, data_dim=2, width=16, depth=2)))
    with pytest.raises(ConfigError, match=r"_local_scalar_dense\S* reads from a tensor"):
        rehearse(experiment, 1, [4])
    assert not dist.is_initialized()
    rehearse(toy(), 1, [4])


def test_weights_must_be_divided_evenly() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.shard: 3 given for 8 processes"):
        rehearse(digits(parallel=Parallel(shard=3)), 8, [1])
    assert not dist.is_initialized()


def test_one_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal.dist, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="without torchrun"):
        rehearse(toy(), 1, [4])
