"""Choosing rows of the global batch: how many, which, and the same however the batch is divided."""

from __future__ import annotations

import pytest
import torch

from fastflow.rng import Draws
from fastflow.rows import EachRow, ExactShare, FirstRows

ALL = (ExactShare(), EachRow(), FirstRows(), FirstRows(count="binomial"))
every_choice = pytest.mark.parametrize("choice", ALL, ids=repr)


def draws(total: int, step: int = 0) -> Draws:
    return Draws(seed=3, step=step, indices=tuple(range(total)), total=total)


@every_choice
def test_a_divided_batch_makes_the_same_choice(choice):
    whole = choice(draws(20), "equal", 0.4)
    parts = [draws(20).select(slice(i, i + 7)) for i in (0, 7, 14)]
    assert torch.equal(torch.cat([choice(part, "equal", 0.4) for part in parts]), whole)
    assert whole.dtype == torch.bool


@every_choice
def test_shares_of_none_and_all(choice):
    assert not choice(draws(12), "equal", 0.0).any()
    assert choice(draws(12), "equal", 1.0).all()


@every_choice
def test_the_share_is_kept(choice):
    shares = [choice(draws(50, step), "equal", 0.3).double().mean() for step in range(40)]
    assert abs(torch.stack(shares).mean().item() - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5


def test_what_tells_them_apart():
    found = {repr(c): [c(draws(40, step), "equal", 0.3) for step in range(30)] for c in ALL}
    counts = {name: {int(mask.sum()) for mask in masks} for name, masks in found.items()}
    places = {name: len({tuple(mask.tolist()) for mask in masks}) for name, masks in found.items()}
    exact, each, first, binomial = found
    assert counts[exact] == counts[first] == {12}
    assert len(counts[each]) > 5
    assert len(counts[binomial]) > 5
    assert places[exact] == 30
    assert places[first] == 1
    for mask in found[first] + found[binomial]:
        assert mask[: int(mask.sum())].all()
    # As many as `EachRow` would choose.
    for mask, other in zip(found[each], found[binomial], strict=True):
        assert mask.sum() == other.sum()


def test_names_are_told_apart():
    assert not torch.equal(EachRow()(draws(40), "equal", 0.5), EachRow()(draws(40), "label", 0.5))
