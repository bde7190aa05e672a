"""Parts and lazies: what is accepted, what is refused, and how it is said."""

from __future__ import annotations

import abc
import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import pytest
import torch

from fastflow.errors import ConfigError
from fastflow.parts import Lazy, Part, annotations_of, lazy, parameters

if TYPE_CHECKING:
    from decimal import Decimal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape(Part, abc.ABC):
    @abc.abstractmethod
    def area(self) -> float: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square(Shape):
    side: float = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side <= 0:
            raise ConfigError(f"Square.side: {self.side} given, a number > 0 accepted")

    def area(self) -> float:
        return self.side**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disc(Shape):
    radius: float

    def area(self) -> float:
        return 3 * self.radius**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene(Part):
    kind: ClassVar[str] = "flat"
    name: str
    shape: Shape = dataclasses.field(default_factory=Square)
    sizes: tuple[int, ...] = (1, 2)
    net: Lazy[torch.nn.Module] | None = None


class Net(torch.nn.Module):
    def __init__(self, channels: int, mult: Sequence[int] = (1, 2), act: str | None = None):
        super().__init__()
        self.channels, self.mult, self.act = channels, mult, act


class Wrapper(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, scale: float = 1.0):
        super().__init__()
        self.model, self.scale = model, scale


class Loose:
    def __init__(self, a, b=2, c=0.5, d=True, *rest, e=None, **more):
        self.values = (a, b, c, d, e)


@dataclasses.dataclass
class Counter:
    keys: list[str] = dataclasses.field(default_factory=lambda: ["loss"])


class OtherCounter(Counter):
    pass


class Base(abc.ABC):
    @abc.abstractmethod
    def run(self) -> None: ...


class Law(Protocol):
    def __call__(self, t: float) -> float: ...


class Double(Part):
    def __call__(self, t: float) -> float:
        return 2 * t


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unresolved(Part):
    x: Decimal


def refused(make: Callable[[], Any], *texts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    for text in texts:
        assert text in message


def test_part_checks_and_converts_its_fields_and_defaults():
    assert type(Square().side) is float
    assert Scene(name="s", sizes=[3]).sizes == (3,)
    refused(lambda: Scene(name=3), "Scene.name: 3 (int) given, str accepted")
    refused(lambda: Scene(name="s", shape="disc"), "Scene.shape", ":Disc", ":Square")
    refused(lambda: Square(side=-1), "Square.side: -1.0 given, a number > 0 accepted")


def test_part_names_its_arguments_when_one_is_wrong():
    refused(lambda: Square(sid=1), "Square.sid", "did you mean 'side'? accepted: side")
    refused(lambda: Scene(), "Scene needs name (str)")
    refused(lambda: Square(2.0), "Square: 2.0 (float) given without a name", "accepted: side")
    refused(lambda: Shape(), "Shape is abstract", ":Disc", ":Square")
    refused(lambda: dataclasses.replace(Square(), sid=1), "Square.sid")


def test_part_is_an_ordinary_value():
    scene = Scene(name="s", shape=Disc(radius=2), net=lazy(Net, channels=1))
    assert pickle.loads(pickle.dumps(scene)) == scene == copy.deepcopy(scene)
    assert hash(scene) == hash(copy.deepcopy(scene))
    assert list(inspect.signature(Scene).parameters) == ["name", "shape", "sizes", "net"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        scene.name = "t"


def test_part_annotations_must_exist_at_run_time():
    with pytest.raises(TypeError, match=r"Unresolved.*'Decimal'.*TYPE_CHECKING"):
        Unresolved(x=1)
    assert annotations_of(Square) == {"side": float}


def test_part_without_its_decorator_is_told():
    class Bare(Square):
        extra: int = 1

    with pytest.raises(TypeError, match="Bare lacks its @dataclass"):
        Bare()


def test_lazy_fills_defaults_and_reads_them():
    node = lazy(Net, channels=3)
    assert node.target is Net
    assert dict(node.kwargs) == {"channels": 3, "mult": (1, 2), "act": None}
    assert node.mult == (1, 2)
    assert repr(node) == "lazy(Net, channels=3, mult=(1, 2), act=None)"
    assert lazy(Counter).keys == ["loss"]
    with pytest.raises(AttributeError, match="did you mean 'channels'"):
        node.chanels  # noqa: B018
    with pytest.raises(TypeError):
        node.kwargs["channels"] = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        node.channels = 4


def test_lazy_is_an_ordinary_value():
    node = lazy(Wrapper, model=lazy(Net, channels=3))
    assert pickle.loads(pickle.dumps(node)) == node == copy.deepcopy(node)
    assert hash(node) == hash(copy.deepcopy(node))
    assert node != lazy(Wrapper, model=lazy(Net, channels=4))
    assert lazy(Counter) != lazy(OtherCounter)
    assert node.replace(scale=2) == lazy(Wrapper, model=lazy(Net, channels=3), scale=2.0)
    assert node.scale == 1.0


def test_lazy_checks_its_arguments():
    refused(lambda: lazy(Net, chanels=3), "Net.chanels", "did you mean 'channels'?", "act, ch")
    refused(lambda: lazy(Net, channels="a"), "Net.channels: 'a' (str) given, int accepted")
    refused(lambda: lazy(Wrapper, model=lazy(Counter)), "Wrapper.model: lazy(Counter", "Module")
    refused(lambda: lazy(Wrapper, model=Net), "Wrapper.model: the class Net given, Module")
    refused(lambda: lazy(Net, channels=3).replace(channels=None), "Net.channels: None given")
    refused(lambda: Scene(name="s", net=lazy(Counter)), "Scene.net", "lazy(Module, ...) | None")
    assert Scene(name="s", net=lazy(Net)).net == lazy(Net)


def test_lazy_of_optimizers():
    node = lazy(torch.optim.AdamW, lr=1e-4, betas=[0.9, 0.95], weight_decay=0)
    assert (node.lr, node.betas, type(node.weight_decay)) == (1e-4, (0.9, 0.95), float)
    refused(lambda: lazy(torch.optim.Adam, lr="abc"), "Adam.lr: 'abc' (str) given, float")
    refused(lambda: lazy(torch.optim.Adam, betas=(0.9,)), "Adam.betas: 1 values given, 2 accepted")
    refused(lambda: lazy(torch.optim.Adam, betas=(0.9, "x")), "Adam.betas.1: 'x'")


def test_lazy_takes_unannotated_arguments_by_their_defaults():
    assert list(parameters(Loose)) == ["a", "b", "c", "d", "e"]
    node = lazy(Loose, a="any", b=0.5, c=1, e=[1])
    assert (node.b, node.c, node.e) == (0.5, 1.0, (1,))
    refused(lambda: lazy(Loose, b="x"), "Loose.b: 'x' (str) given, int | float accepted")
    refused(lambda: lazy(Loose, d=1), "Loose.d: 1 (int) given, bool accepted")
    refused(lambda: lazy(Loose, f=1), "Loose.f")


def test_lazy_refuses_targets_that_cannot_be_saved():
    class Local:
        pass

    refused(lambda: lazy(Local), "Local", "move it to the top of its module")
    refused(lambda: lazy(lambda: 1), "lazy(<function", "a class accepted")
    refused(lambda: lazy(refused), "function given, a class accepted")
    refused(lambda: lazy(Square), "lazy(Square): a Part is a value; write Square(...)")
    refused(lambda: lazy(Base), "Base is abstract")
