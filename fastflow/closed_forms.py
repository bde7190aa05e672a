"""What training must reach on Gaussian data, and distances between toy distributions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


def cm_fixed_point_gaussian(
    grid: Tensor, std: float, solver: Literal["euler", "heun"] = "euler"
) -> Tensor:
    """The consistency model f(x, t_n) = a_n x that CM training ends at, for data N(0, std^2).

    It is the population optimum of the squared distance on a fixed grid (arXiv 2303.01469,
    Algorithms 2 and 3, target = student), not the exact map: that is `exact_gain_gaussian`, and
    the gap closes as the grid is refined. Training and distillation with Euler's step agree.

    Args:
        grid: times t_1 < .. < t_N [N], the first one the boundary where f(x) = x.
        std: standard deviation of the data.
        solver: the teacher's step; "euler" for consistency training.

    Returns:
        a_1 = 1, .., a_N, float64 [N].
    """
    r, t = grid[:-1].double(), grid[1:].double()
    if solver == "euler":
        factors = (std**2 + r * t) / (std**2 + t**2)
    else:
        gap, k_r, k_t = t - r, r / (std**2 + r**2), t / (std**2 + t**2)
        factors = 1 - gap / 2 * (k_t + k_r * (1 - gap * k_t))
    return torch.cat([torch.ones(1, dtype=torch.float64), factors.cumprod(0)])


def ct_minimum_loss_gaussian(grid: Tensor, std: float) -> Tensor:
    """Squared distance per dimension at the fixed point for each pair (t_n, t_n+1), [N-1].

    Consistency training keeps this much, a_n^2 (t-r)^2 std^2 / (std^2 + t^2), as its target
    point knows the noise; distillation reaches 0.
    """
    a, r, t = cm_fixed_point_gaussian(grid, std)[:-1], grid[:-1].double(), grid[1:].double()
    return a**2 * (t - r) ** 2 * std**2 / (std**2 + t**2)


def ect_fixed_point_gaussian(t: Tensor, gap: Callable[[Tensor], Tensor], std: float) -> Tensor:
    """a(t) of the model f(x, t) = a(t) x that ECT training ends at, for data N(0, std^2).

    a(t) = a(r) (std^2 + r t) / (std^2 + t^2) with r = r(t), followed down to 0 where a = 1
    (arXiv 2406.14548, with target = student and r(t) fixed).

    Args:
        t: times, any shape.
        gap: r(t) < t, for float64 times of any shape.
        std: standard deviation of the data.

    Returns:
        a(t), float64, in the shape of `t`.
    """
    t = t.double()
    gain = torch.ones_like(t)
    # Below this the remaining factors differ from 1 by less than rounding.
    while bool((t > 1e-9 * std).any()):
        r = gap(t)
        gain = gain * (std**2 + r * t) / (std**2 + t**2)
        t = r
    return gain


def exact_gain_gaussian(t: Tensor, s: float, std: float) -> Tensor:
    """X_{t->s}(x) / x for data N(0, std^2) in VE, float64 in the shape of `t`."""
    return torch.sqrt((std**2 + s**2) / (std**2 + t.double() ** 2))


def gaussian_w2_squared(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> Tensor:
    """W2^2 of two Gaussians: |m1-m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2).

    Args:
        mean_1, mean_2: [D].
        cov_1, cov_2: [D, D].

    Returns:
        A float64 scalar >= 0.
    """
    root = _sqrt(cov_1.double())
    product = root @ cov_2.double() @ root
    trace = torch.linalg.eigvalsh(product).clamp_min(0).sqrt().sum()
    shift = (mean_1.double() - mean_2.double()).square().sum()
    distance = shift + cov_1.double().trace() + cov_2.double().trace() - 2 * trace
    return torch.relu(distance)


def _sqrt(cov: Tensor) -> Tensor:
    values, basis = torch.linalg.eigh(cov)
    return torch.einsum("ik,k,jk->ij", basis, values.clamp_min(0).sqrt(), basis)


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """2 E|x-y| - E|x-x'| - E|y-y'| between samples [N, D] and [M, D], without bias.

    Around 0, also slightly below, for samples of one distribution. A float64 scalar.
    """
    x, y = x.double(), y.double()
    within = _distances(x, x).sum() / (len(x) * (len(x) - 1))
    within = within + _distances(y, y).sum() / (len(y) * (len(y) - 1))
    return 2 * _distances(x, y).mean() - within


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # The matrix product that is faster here leaves 1e-8 between a point and itself.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
