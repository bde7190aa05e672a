"""Regression losses whose weight follows the error, for methods that fit a moving target."""

from __future__ import annotations

import abc
import dataclasses
import math

import torch
from torch import Tensor

from fastflow.errors import ConfigError
from fastflow.parts import Part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression(Part, abc.ABC):
    """The loss of each sample: prediction and target [B, ...] to [B]; no gradient to the target."""

    @abc.abstractmethod
    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveL2(Regression):
    """||e||^2 / sg(||e||^2 + c)^power, summed over dimensions (MeanFlow, arXiv 2505.13447, eq. 22).

    Power 0 is least squares, 0.5 has the gradient of a pseudo-Huber loss, 1 bounds the loss by 1.
    """

    power: float = 1.0
    c: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, self.power, self.c)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = _squared(prediction, target)
        return error / (error.detach() + self.c) ** self.power


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExponentialL2(Regression):
    """||e||^2 sg(exp(c - rate ||e||^2)): FastGen's `exp` weight.

    Its gradient dies out for large errors; the others' stays or falls by a power.
    """

    rate: float = 0.01
    c: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rate < math.inf:
            raise ConfigError(
                f"ExponentialL2.rate: {self.rate} given, accepted: a finite number, 0 or more"
            )

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = _squared(prediction, target)
        return error * torch.exp(self.c - self.rate * error.detach())


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalisedGradient(Regression):
    """||y - sg(y - w e)||^2 with w = 1 / (||e|| + c)^power: FastGen's `opt_grad`.

    The gradient in y is 2 w e: for power 1 shorter than 2, whatever the error.

    Attributes:
        power, c: of the weight.
        per_dimension: whether e is first divided by the square root of its dimensions.
    """

    power: float = 1.0
    c: float = 0.1
    per_dimension: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, self.power, self.c)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        y = _wide(prediction).flatten(1)
        e = (y - _wide(target).flatten(1)).detach()
        if self.per_dimension:
            e = e / e.shape[1] ** 0.5
        norm: Tensor = torch.linalg.vector_norm(e, dim=1, keepdim=True)
        moved = y.detach() - e / (norm + self.c) ** self.power
        return (y - moved).square().sum(1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _squared(prediction: Tensor, target: Tensor) -> Tensor:
    return (_wide(prediction) - _wide(target.detach())).flatten(1).square().sum(1)


def _require(part: Regression, power: float, c: float) -> None:
    if power < 0 or c <= 0:
        raise ConfigError(
            f"{type(part).__name__}: power={power}, c={c} given, accepted: power 0 or more and c "
            f"above 0"
        )
