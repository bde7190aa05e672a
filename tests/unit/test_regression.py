"""Losses whose weight follows the error: values, gradients, bounds and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastflow.consistency import PseudoHuber
from fastflow.errors import ConfigError
from fastflow.regression import AdaptiveL2, ExponentialL2, NormalisedGradient, Regression

ALL = (AdaptiveL2(), AdaptiveL2(power=0.0), ExponentialL2(), NormalisedGradient())
every_loss = pytest.mark.parametrize("loss", ALL, ids=repr)


def pair(scale: float = 1.0, rows: int = 5) -> tuple[Tensor, Tensor]:
    """A prediction that wants gradients, and a target, [rows, 2, 3] each."""
    generator = torch.Generator().manual_seed(0)
    y, target = scale * torch.randn(2, rows, 2, 3, dtype=torch.float64, generator=generator)
    return y.requires_grad_(), target


def gradient(loss: Regression, y: Tensor, target: Tensor) -> Tensor:
    (out,) = torch.autograd.grad(loss(y, target).sum(), y)
    return out


def norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


@every_loss
def test_no_gradient_to_the_target(loss):
    y, target = pair()
    loss(y, target.requires_grad_()).sum().backward()
    assert target.grad is None
    assert y.grad.any()


@every_loss
def test_rows_are_independent_and_wide(loss):
    y, target = pair()
    alone = torch.cat([loss(y[i : i + 1], target[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(loss(y, target), alone, rtol=1e-14, atol=0)
    assert loss(y.bfloat16(), target.bfloat16()).dtype == torch.float32
    assert loss(y, y.detach()).tolist() == [0] * 5


def test_adaptive_l2_by_its_formula():
    y, target = pair()
    squared = (y - target).square().flatten(1).sum(1).detach()
    for power, c in ((0.0, 1e-3), (0.75, 1e-3), (1.0, 0.01)):
        loss = AdaptiveL2(power=power, c=c)(y, target)
        torch.testing.assert_close(loss, squared / (squared + c) ** power)


def test_power_1_bounds_loss_and_gradient():
    for scale in (1e-3, 0.03, 1.0, 1e4):
        y, target = pair(scale)
        loss = AdaptiveL2(power=1.0, c=0.01)
        assert (loss(y, target) < 1).all()
        error = norms(y - target).detach()
        size = norms(gradient(loss, y, target))
        torch.testing.assert_close(size, 2 * error / (error**2 + 0.01))
        assert (size <= 1 / 0.01**0.5).all()


def test_power_one_half_has_the_gradient_of_a_pseudo_huber_loss():
    y, target = pair()
    c = 0.06
    adaptive = gradient(AdaptiveL2(power=0.5, c=c**2), y, target)
    (huber,) = torch.autograd.grad(2 * PseudoHuber(c=c)(y, target).sum(), y)
    torch.testing.assert_close(adaptive, huber, rtol=1e-12, atol=0)
    assert (norms(huber) < 2).all()


def test_exponential_weight():
    y, target = pair()
    squared = (y - target).square().flatten(1).sum(1).detach()
    weight = torch.exp(0.001 - 0.01 * squared)
    torch.testing.assert_close(ExponentialL2()(y, target), squared * weight)
    expected = 2 * weight[:, None, None] * (y - target).detach()
    torch.testing.assert_close(gradient(ExponentialL2(), y, target), expected)


@pytest.mark.parametrize("per_dimension", [False, True])
def test_normalised_gradient(per_dimension):
    y, target = pair()
    e = (y - target).detach() / (6**0.5 if per_dimension else 1)
    weight = 1 / (norms(e) + 0.1)
    loss = NormalisedGradient(power=1.0, c=0.1, per_dimension=per_dimension)
    torch.testing.assert_close(loss(y, target), (weight * norms(e)) ** 2)
    size = gradient(loss, y, target)
    torch.testing.assert_close(size, 2 * weight[:, None, None] * e)
    assert (norms(size) < 2).all()


@pytest.mark.parametrize("kind", [AdaptiveL2, NormalisedGradient])
@pytest.mark.parametrize("given", [{"power": -0.5}, {"c": 0.0}])
def test_refused(kind, given):
    with pytest.raises(ConfigError, match="accepted: power 0 or more and c above 0"):
        kind(**given)


@pytest.mark.parametrize("given", [{"rate": -0.01}, {"rate": float("inf")}])
def test_a_growing_exponential_weight_is_refused(given):
    with pytest.raises(ConfigError, match="rate"):
        ExponentialL2(**given)
