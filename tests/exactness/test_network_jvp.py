"""Tangents of every network, by every exact engine, against finite differences in float64."""

from __future__ import annotations

import contextlib

import pytest
import torch

from fastflow.distributed import World, shard
from fastflow.tangent import FunctionalJVP, TangentEngine
from tangent_networks import ENGINES, NETWORKS, Case, error, exact

every_network = pytest.mark.parametrize("name", NETWORKS)
every_engine = pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)


@every_network
@every_engine
@pytest.mark.parametrize("training", [False, True], ids=["plain", "dropout"])
def test_tangents_are_exact(name: str, engine: TangentEngine, training: bool) -> None:
    wanted = exact(name, training)
    assert wanted.isfinite().all()
    assert wanted.norm() > 0.01
    double = Case(name, torch.float64, training).jvp(engine)[1]
    assert double.dtype == torch.float64
    assert error(double, wanted) < 1e-7
    single = Case(name, torch.float32, training).jvp(engine)[1]
    assert single.dtype == torch.float32
    assert error(single, wanted) < 1e-4


MODES = ["plain", "dropout", "autocast", "checkpoint"]


@every_network
@pytest.mark.parametrize("mode", MODES)
@every_engine
def test_value_and_gradients_are_those_of_a_plain_step(
    name: str, mode: str, engine: TangentEngine
) -> None:
    if mode == "checkpoint" and isinstance(engine, FunctionalJVP):
        pytest.skip("refused, see test_tangent.py")
    case = Case(name, torch.float32, training=mode != "plain")
    precision = autocast() if mode == "autocast" else contextlib.nullcontext()
    with precision:
        expected = case.f(*case.primals)
    gradients = case.gradients(expected)
    if mode == "checkpoint":
        shard(case.network, World(), 1, recompute=True)
    with precision:
        value, tangent = case.jvp(engine)
    if mode == "autocast":
        assert error(tangent, exact(name, True)) < 0.1
    else:
        assert error(tangent, exact(name, mode != "plain")) < 1e-4
    found = case.gradients(value)
    assert found.keys() == gradients.keys()
    if isinstance(engine, FunctionalJVP):  # whose attention is another kernel's
        whole, other = (torch.cat([g.flatten() for g in d.values()]) for d in (found, gradients))
        assert error(whole, other.double()) < (0.1 if mode == "autocast" else 1e-4)
        return
    assert torch.equal(value, expected)
    for key in found:
        assert torch.equal(found[key], gradients[key]), key


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)
