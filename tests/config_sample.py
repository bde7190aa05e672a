"""A small experiment of every kind of part, to be built, overridden and saved."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pytest
import torch

from fastflow.config import Lazy, lazy, override
from fastflow.errors import ConfigError
from fastflow.parts import Part

HERE = __name__
ALLOW = (__name__,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric(Part, abc.ABC):
    @abc.abstractmethod
    def __call__(self, x: float) -> float: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class L1(Metric):
    def __call__(self, x: float) -> float:
        return abs(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Huber(Metric):
    c: float = 0.03

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.c <= 0:
            raise ConfigError(f"Huber.c: {self.c} given, a number > 0 accepted")

    def __call__(self, x: float) -> float:
        return math.sqrt(x * x + self.c**2) - self.c


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shifted(Metric):
    inner: Metric
    shift: float

    def __call__(self, x: float) -> float:
        return self.inner(x) + self.shift


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span(Part):
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise ConfigError(f"Span: low={self.low}, high={self.high} given, low < high accepted")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Part):
    metric: Metric
    span: Span = dataclasses.field(default_factory=Span)
    gap: int = 8
    mode: Literal["grid", "ratio"] = "grid"
    law: Callable[[float], float] | None = None
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Net(torch.nn.Module):
    def __init__(self, channels: int, channel_mult: tuple[int, ...] = (1, 2), dropout: float = 0.1):
        super().__init__()
        if channels < 1:
            raise ConfigError(f"Net.channels: {channels} given, at least 1 accepted")
        self.args = (channels, channel_mult, dropout)


class Denoiser(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, sigma_data: float = 0.5, label: str | None = None):
        super().__init__()
        self.model, self.sigma_data, self.label = model, sigma_data, label


class Ema:
    def __init__(self, decay: float, every: int = 1, skip: tuple[Lazy, ...] = ()):
        self.decay, self.every, self.skip = decay, every, skip


class Log:
    def __init__(self, keys: list[str] | None = None):
        self.keys = keys


class Suite:
    def __init__(self, members: tuple[Ema, ...], named: dict[str, Ema] | None = None):
        self.members, self.named = members, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Part):
    name: str
    method: Method
    network: Lazy[torch.nn.Module]
    optimizer: Lazy[torch.optim.Optimizer]
    callbacks: tuple[Lazy, ...] = ()
    steps: int = 100
    flip: bool = False
    root: str | None = None


def sample(**changes: Any) -> Run:
    run = Run(
        name="sample",
        method=Method(metric=Huber(c=0.5), weights={"near": 1, "far": 2.5}),
        network=lazy(Denoiser, model=lazy(Net, channels=4)),
        optimizer=lazy(torch.optim.Adam, lr=1e-3),
        callbacks=(lazy(Ema, decay=0.999), lazy(Log)),
    )
    return dataclasses.replace(run, **changes)


def changed(*assignments: str) -> Run:
    return override(sample(), assignments, allow=ALLOW)


def refused(make: Callable[[], object], *texts: str) -> str:
    with pytest.raises(ConfigError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    for text in texts:
        assert text in message
    return message
