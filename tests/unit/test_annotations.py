"""Values against annotations: what is accepted, converted and refused, and how it is said."""

from __future__ import annotations

import abc
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import pytest
import torch
from config_sample import refused

from fastflow.annotations import coerce, describe, item_annotation, wants_component
from fastflow.errors import ConfigError
from fastflow.parts import Lazy, Part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape(Part, abc.ABC):
    @abc.abstractmethod
    def area(self) -> float: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square(Shape):
    side: float = 1

    def area(self) -> float:
        return self.side**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cube(Square):
    pass


class Net(torch.nn.Module):
    pass


class Law(Protocol):
    def __call__(self, t: float) -> float: ...


class Double(Part):
    def __call__(self, t: float) -> float:
        return 2 * t


ACCEPTED = [
    (3, int, 3),
    (3, float, 3.0),
    (True, bool, True),
    (None, int | None, None),
    ([1, 2], tuple[int, ...], (1, 2)),
    ((1, 2), list[int], [1, 2]),
    ([0.9, 1], tuple[float, float], (0.9, 1.0)),
    ([1, 2], Sequence[int], (1, 2)),
    ({"a": 1}, Mapping[str, float], {"a": 1.0}),
    ({"a": [1]}, dict[str, tuple[int, ...]], {"a": (1,)}),
    ("a", Literal["a", "b"], "a"),
    (1, float | int, 1),
    (1.0, int | float, 1.0),
    ("x", pathlib.Path, pathlib.Path("x")),
    ([1, [2]], Any, (1, (2,))),
    ([1, 2], tuple[str, ...] | tuple[int, ...], (1, 2)),
]


@pytest.mark.parametrize(("value", "annotation", "result"), ACCEPTED)
def test_coerce_accepts(value, annotation, result):
    found = coerce(value, annotation, "k")
    assert found == result
    assert type(found) is type(result)


REFUSED = [
    (True, int),
    (True, float),
    (1, bool),
    (1.0, int),
    ("1", int),
    ("abc", float | None),
    (None, int),
    ("ab", tuple[str, ...]),
    ("ab", Sequence[str]),
    ([1, "a"], tuple[int, ...]),
    ([1], tuple[int, int]),
    ("c", Literal["a", "b"]),
    (True, Literal[1]),
    ({1: 1}, dict[str, int]),
    (float("nan"), float),
    (3, Shape),
    (Square, Shape),
    (Net, Lazy[Net]),
    (3, Callable[[float], float]),
    (Double, Callable[[float], float]),
    (3, Law),
    (Double, Law),
    (torch.zeros(2, 40), float),
]


@pytest.mark.parametrize(("value", "annotation"), REFUSED)
def test_coerce_refuses_on_one_line_with_the_key(value, annotation):
    refused(lambda: coerce(value, annotation, "some.key"), "some.key", "accepted")


def test_errors_inside_containers_have_the_item_in_their_key():
    refused(lambda: coerce([1, "a"], tuple[int, ...] | None, "k"), "k.1: 'a' (str) given, int")
    refused(lambda: coerce({"a": {"b": "c"}}, dict[str, dict[str, int]], "k"), "k.a.b: 'c'")


def test_long_values_are_shortened():
    with pytest.raises(ConfigError) as caught:
        coerce("x" * 500, int, "k")
    assert len(str(caught.value)) < 150


def test_protocols_ask_for_their_methods():
    assert coerce(Double(), Law, "k") == Double()
    refused(lambda: coerce(Square(), Law, "k"), "k: Square(side=1.0) (Square) given, Law accepted")


def test_describe():
    assert describe(int | None) == "int | None"
    assert describe(Literal["a", 1]) == "'a' | 1"
    assert describe(tuple[Net, ...]) == "tuple[Net, ...]"
    assert describe(Lazy[Net]) == "lazy(Net, ...)"
    assert describe(Shape) == f"Shape (one of {__name__}:Cube, {__name__}:Square)"
    assert describe(Square) == f"Square (one of {__name__}:Cube, {__name__}:Square)"
    assert describe(Cube) == "Cube"
    assert describe(Mapping) == "Mapping"
    assert describe(Mapping[str, int] | None) == "Mapping[str, int] | None"


def test_annotations_of_items():
    assert item_annotation(tuple[int, ...] | None, 3) is int
    assert [item_annotation(tuple[int, str], i) for i in (0, 1, 2)] == [int, str, str]
    assert item_annotation(Mapping[str, Shape], None) is Shape
    assert item_annotation(list[Lazy[Net]], 0) == Lazy[Net]
    assert item_annotation(Lazy[Net], 0) is item_annotation(Any, 0) is Any


def test_a_component_is_wanted_where_no_text_is():
    for annotation in (Shape, Lazy[Net], Lazy, Callable[[float], float] | None, torch.nn.Module):
        assert wants_component(annotation)
    for annotation in (str, Shape | str, int | None, tuple[Shape, ...], Any, pathlib.Path):
        assert not wants_component(annotation)
