"""The digits: range, labels, halves, and the error when scikit-learn is absent."""

import sys

import pytest
import torch
from sklearn.datasets import load_digits

from fastflow.data.digits import Digits
from fastflow.errors import MissingPackageError


def everything(dataset):
    return dataset.fetch(torch.arange(len(dataset)))


def test_images_are_the_original_levels_in_unit_range():
    digits, source = Digits(), load_digits()
    x, labels = everything(digits)
    assert (len(digits), digits.shape, digits.num_classes) == (1797, (1, 8, 8), 10)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal((x[:, 0].double() + 1) * 8, torch.from_numpy(source.images))
    assert labels.tolist() == source.target.tolist()
    assert not digits.flip


def test_fetch_returns_the_rows_asked_for_in_order():
    digits = Digits()
    x, labels = everything(digits)
    rows = torch.tensor([5, 1796, 0, 5])
    some, some_labels = digits.fetch(rows)
    assert torch.equal(some, x[rows])
    assert torch.equal(some_labels, labels[rows])


def test_halves_are_disjoint_complete_and_stratified():
    halves = [everything(Digits(split=s)) for s in ("first_half", "second_half")]
    x = torch.cat([h[0] for h in halves]).flatten(1)
    whole = everything(Digits())[0].flatten(1)
    # The same images (all distinct but for pixels equal by chance): sort rows to compare.
    assert sorted(map(tuple, x.tolist())) == sorted(map(tuple, whole.tolist()))
    first, second = (torch.bincount(h[1], minlength=10) for h in halves)
    assert set((first - second).tolist()) <= {0, 1}
    assert len(halves[0][0]) + len(halves[1][0]) == 1797


def test_halves_are_the_same_each_time_and_mixed_through_the_source():
    one, two = Digits(split="first_half"), Digits(split="first_half")
    assert one.fingerprint() == two.fingerprint()
    assert one.fingerprint() != Digits(split="second_half").fingerprint()
    whole = {tuple(row): i for i, row in enumerate(everything(Digits())[0].flatten(1).tolist())}
    places = [whole[tuple(row)] for row in everything(one)[0].flatten(1).tolist()]
    assert places == sorted(places)
    assert 800 < sum(places) / len(places) < 1000


def test_fingerprint_depends_on_contents_alone():
    assert Digits(flip=True).fingerprint() == Digits().fingerprint()
    assert len(Digits().fingerprint()) == 64


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        MissingPackageError, match=r"scikit-learn.*pip install 'fastflow\[digits\]'"
    ):
        Digits()
