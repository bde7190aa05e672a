"""Bytes held and bytes sent, counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastflow.counting import Allocations, Traffic, nbytes

MIB = 2**20


def mebi(count: int) -> torch.Tensor:
    return torch.zeros(count, MIB, dtype=torch.uint8)


@pytest.fixture
def four() -> Iterator[None]:
    """A group of four processes, of which only this one is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_what_tensors_share_counts_once() -> None:
    x, y = mebi(2), mebi(3)
    assert nbytes({"a": [x, x[1:], x.view(-1)], "b": (y, None, 1)}) == 5 * MIB


def test_allocations_know_the_most_and_what_is_left() -> None:
    with Allocations() as memory:
        x = mebi(2)
        y = x + 1
        assert memory.now == memory.peak == 4 * MIB
        view = y[1:]
        del y
        assert memory.now == 4 * MIB, "a view keeps all of it"
        del view
        assert (memory.now, memory.peak) == (2 * MIB, 4 * MIB)
        assert memory.restart() == 2 * MIB
        x += 1
        parts = torch.split_copy(x, 1)
        assert memory.peak == 4 * MIB
        del parts
    del x
    assert memory.now == 0


def test_allocations_see_storages_that_change_their_size() -> None:
    resize = torch.UntypedStorage.resize_
    with Allocations() as memory:
        x = mebi(4)
        x.untyped_storage().resize_(0)
        assert memory.now == 0
        x.untyped_storage().resize_(3 * MIB)
        assert memory.now == 3 * MIB
        other = torch.UntypedStorage(MIB)
        other.resize_(2 * MIB)
        assert memory.now == 3 * MIB, "made by no operation"
    assert torch.UntypedStorage.resize_ is resize


def test_fake_tensors_are_counted_and_take_no_memory() -> None:
    with Allocations() as memory, FakeTensorMode():
        x = torch.zeros(2**20, 2**20)
        y = x @ x
        assert memory.now == 2 * 2**42
        assert nbytes(y) == 2**42


@pytest.mark.usefixtures("four")
def test_traffic_of_each_kind() -> None:
    part, whole = torch.zeros(1024), torch.zeros(4096)
    with Traffic() as traffic:
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(part, whole)
        dist.all_reduce(part)
    assert traffic.sent == {"gather": 3 * 4096, "scatter": 3 * 4096, "sum": 2 * 3 * 1024}
    assert traffic.calls == {"gather": 1, "scatter": 1, "sum": 1}


@pytest.mark.usefixtures("four")
def test_a_group_of_one_sends_nothing() -> None:
    alone = dist.new_group([0])
    x = torch.zeros(8)
    with Traffic() as traffic:
        dist.all_reduce(x, group=alone)
        dist.all_gather_into_tensor(torch.zeros(8), x, group=alone)
    assert traffic.sent == {}
    assert traffic.calls == {}
