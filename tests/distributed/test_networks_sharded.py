"""Networks with every condition and head, sharded: outputs, gradients and steps of the whole one.

In one process by default, where tensors are sharded all the same, and in several (`dist`).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fastflow import distributed
from fastflow.distributed import World, full_tensor, reshard, synchronise
from processes import Processes
from sharded_networks import FAMILIES, backward, check, inputs, make, sharded

pytestmark = pytest.mark.filterwarnings("error:FSDP2-wrapped module:UserWarning")


@pytest.fixture
def alone() -> Iterator[World]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_network_is_trained_as_the_whole_one(
    alone: World, family: str, recompute: bool
) -> None:
    check(alone, family, recompute=recompute)


def test_a_network_is_sharded_over_two_processes(two: Processes) -> None:
    two.run(check, "edm2")


@pytest.mark.dist
@pytest.mark.parametrize("family", FAMILIES)
def test_every_network_is_sharded_over_two_processes(two: Processes, family: str) -> None:
    two.run(check, family, recompute=True)


@pytest.mark.dist
def test_a_network_is_replicated(two: Processes) -> None:
    two.run(check, "edm2", size=1)


@pytest.mark.dist
@pytest.mark.parametrize("family", FAMILIES)
def test_every_network_is_replicated_in_shards(four: Processes, family: str) -> None:
    four.run(check, family, size=2)


@pytest.mark.parametrize("family", ["edm2", "dit"])
def test_calls_in_any_order_and_number_share_a_backward_pass(alone: World, family: str) -> None:
    """The log-variance first, the network twice, and once without gradients."""
    whole, parts = make(family), sharded(family, alone)
    x, t, *rest = inputs(whole)
    for network in (whole, parts):
        first = network.logvar(t)
        with torch.no_grad():
            target = network(x, t, *rest)
        out = network(x, t, *rest) + network(x / 2, t, *rest)
        loss = (out - target).flatten(1).square().mean(1) * torch.exp(-first) + network.logvar(t)
        loss.mean().backward()
    for (name, p), q in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        torch.testing.assert_close(full_tensor(q[1].grad), p.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["edm2", "mlp"])
def test_gradients_of_micro_batches_add_up(alone: World, family: str) -> None:
    whole, parts = make(family), sharded(family, alone, recompute=True)
    rows = inputs(whole)
    backward(whole, rows)
    for number in (0, 1):
        synchronise(parts, number == 1)
        backward(parts, tuple(None if r is None else r.chunk(2)[number] for r in rows))
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(full_tensor(q.grad) / 2, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["edm2", "dit", "mlp"])
def test_a_frozen_companion_answers_and_stays_sharded(alone: World, family: str) -> None:
    whole, parts = make(family), sharded(family, alone).requires_grad_(False)
    rows = inputs(whole)
    with torch.no_grad():
        torch.testing.assert_close(parts.logvar(rows[1]), whole.logvar(rows[1]))
        torch.testing.assert_close(parts(*rows), whole(*rows))
        torch.testing.assert_close(parts.logvar(rows[1]), whole.logvar(rows[1]))
    reshard(parts)
    assert all(isinstance(p, DTensor) for p in parts.parameters())


def test_compiled_units_of_a_sharded_network(alone: World, monkeypatch) -> None:
    """Traced, with checkpointing inside; what a compiler makes of it is tested elsewhere."""
    monkeypatch.setattr(distributed, "_COMPILER", {"backend": "eager", "isolate_recompiles": True})
    for family in ("mlp", "dit"):
        check(alone, family, recompute=True, compile=True)
