"""Pairs of times, distances, weights and teacher steps against formulas and closed forms."""

from __future__ import annotations

import math
import sys
import types
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from consistency_fakes import FixedPairs, f64, now, stored_batch
from fastflow import consistency
from fastflow.consistency import (
    L1,
    LPIPS,
    Distance,
    Euler,
    GridPairing,
    Heun,
    InverseCout,
    InverseGap,
    InverseSigma,
    PseudoHuber,
    QuantisedPairing,
    RatioPairing,
    SnrPlus,
    SquaredL2,
    TruncatedSnr,
    Uniform,
)
from fastflow.errors import ConfigError, MissingPackageError
from fastflow.oracle import Gaussian
from fastflow.rng import Draws
from fastflow.sampling import ode_euler, ode_heun, velocity_of
from fastflow.schedules import ConstantRatio, SigmoidRatio
from fastflow.times import LogNormal, LogNormalIndex, karras_grid


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def draws(count: int, seed: int = 0) -> Draws:
    return Draws(seed=seed, step=0, indices=tuple(range(count)))


# Pairs of times


@pytest.mark.parametrize("n", [2, 11, 151])
@pytest.mark.parametrize("index", [None, LogNormalIndex()])
def test_grid_pairs_are_neighbours(n, index):
    pairs = GridPairing() if index is None else GridPairing(index=index)
    t, r = pairs(draws(2000), now(N=n))
    grid = karras_grid(n)
    upper = torch.searchsorted(grid, t)
    assert t.dtype == r.dtype == torch.float64
    torch.testing.assert_close(grid[upper], t, rtol=0, atol=0)
    torch.testing.assert_close(grid[upper - 1], r, rtol=0, atol=0)
    if index is None:
        counts = torch.bincount(upper - 1, minlength=n - 1).double()
        expected = 2000 / (n - 1)
        assert len(counts) == n - 1
        assert ((counts - expected) ** 2 / expected).sum() < n - 2 + 6 * math.sqrt(2 * n)


def test_grid_pairs_follow_the_index_law():
    pairs = GridPairing(index=LogNormalIndex(mean=-1.1, std=2.0))
    t, _ = pairs(draws(20_000), now(N=11))
    counts = torch.bincount(torch.searchsorted(karras_grid(11), t) - 1, minlength=10)
    share = counts / 20_000
    assert int(share.argmax()) == 2
    assert abs(share[0].item() - 0.06263) < 0.006
    assert abs(share[9].item() - 0.00398) < 0.002


def test_pairs_follow_the_curriculum_they_need():
    grid, ratio = GridPairing(), RatioPairing(times=LogNormal(mean=0, std=1), gap=ConstantRatio())
    assert grid.needs == frozenset({"N"})
    assert ratio.needs == QuantisedPairing(pairs=ratio).needs == frozenset({"ratio"})
    with pytest.raises(ConfigError, match="'N' was not provided"):
        grid(draws(2), now(ratio=0.5))
    with pytest.raises(ConfigError, match="'ratio' was not provided"):
        ratio(draws(2), now(N=4))


def test_ratio_pairs():
    times = LogNormal(mean=-1.1, std=2.0)
    pairs = RatioPairing(times=times, gap=SigmoidRatio(k=8.0, b=1.0))
    t, r = pairs(draws(500), now(ratio=0.5))
    torch.testing.assert_close(t, times(draws(500)), rtol=0, atol=0)
    torch.testing.assert_close(r, SigmoidRatio(k=8.0, b=1.0)(t, 0.5), rtol=0, atol=0)
    assert (r < t).all()
    assert ((r == 0) == (t <= math.log(7))).all()


def test_min_gap_moves_only_close_pairs():
    times = LogNormal(mean=-1.1, std=2.0)
    gap = SigmoidRatio(k=8.0, b=1.0, r_min=0.002)
    plain = RatioPairing(times=times, gap=gap)(draws(500), now(ratio=0.999))
    moved = RatioPairing(times=times, gap=gap, min_gap=1e-3)(draws(500), now(ratio=0.999))
    close = plain.t - plain.r < 1e-3
    assert close.any()
    assert not close.all()
    torch.testing.assert_close(moved.r, plain.r, rtol=0, atol=0)
    torch.testing.assert_close(moved.t[~close], plain.t[~close], rtol=0, atol=0)
    torch.testing.assert_close(moved.t[close], plain.r[close] + 1e-3, rtol=1e-15, atol=0)


def test_quantised_pairs_keep_their_order():
    grid = karras_grid(5)
    t = (grid[3].item(), 0.0021, 80.0, 79.0, 0.9 * grid[2].item() + 0.1 * grid[1].item())
    r = (grid[1].item(), 0.0020, 79.9, 78.0, 0.0)
    pairs = QuantisedPairing(pairs=FixedPairs(t=t, r=r), n=5)
    got_t, got_r = pairs(stored_batch(torch.zeros(5, 1), torch.zeros(5, 1)).draws, now())
    torch.testing.assert_close(got_t, grid[torch.tensor([3, 1, 4, 4, 2])], rtol=0, atol=0)
    torch.testing.assert_close(got_r, grid[torch.tensor([1, 0, 3, 3, 0])], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GridPairing(sigma_min=0.0), "sigma_min=0.0"),
        (
            lambda: RatioPairing(
                times=LogNormal(mean=0, std=1), gap=ConstantRatio(), min_gap=-1e-6
            ),
            "RatioPairing.min_gap: -1e-06 given, accepted: 0 or more",
        ),
        (lambda: QuantisedPairing(pairs=GridPairing(), n=1), "n=1"),
        (lambda: PseudoHuber(c=-0.1), "PseudoHuber.c: -0.1 given"),
        (lambda: SquaredL2(resize=0), "SquaredL2.resize: 0 given"),
        (lambda: InverseCout(sigma_data=0.0), "InverseCout.sigma_data: 0.0 given"),
    ],
)
def test_impossible_values_are_refused(make, text):
    with pytest.raises(ConfigError) as error:
        make()
    assert text in str(error.value)


# Distances


def test_distances():
    a, b = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    e = (a - b).flatten(1)
    squared = (e**2).sum(1)
    cases: list[tuple[Distance, Tensor]] = [
        (SquaredL2(), squared / 32),
        (SquaredL2(reduction="sum"), squared),
        (L1(), e.abs().sum(1) / 32),
        (L1(reduction="sum"), e.abs().sum(1)),
        (PseudoHuber(c=0.0), squared.sqrt()),
        (PseudoHuber(c=0.06), (squared + 0.0036).sqrt() - 0.06),
    ]
    for distance, expected in cases:
        torch.testing.assert_close(distance(a, b), expected, rtol=1e-14, atol=0)
        assert (distance(a, a) == 0).all()


def huber_gradient(c: float, e: Tensor) -> tuple[Tensor, Tensor]:
    """Pseudo-Huber losses of the differences e and their gradient."""
    e = e.clone().requires_grad_()
    loss = PseudoHuber(c=c)(e, torch.zeros_like(e))
    (gradient,) = torch.autograd.grad(loss.sum(), e)
    return loss.detach(), gradient


@pytest.mark.parametrize("c", [0.00054 * math.sqrt(3072), 0.06, 2.0])
def test_huber_gradient(c):
    e = normal(16, 3, 4) * 10.0 ** torch.linspace(-4, 1, 16)[:, None, None]
    _, gradient = huber_gradient(c, e)
    squared = e.square().sum((1, 2), keepdim=True)
    torch.testing.assert_close(gradient, e / (squared + c**2).sqrt(), rtol=1e-14, atol=0)
    assert (gradient.flatten(1).norm(dim=1) < 1).all()


@pytest.mark.parametrize("c", [0.03, 0.5])
def test_huber_is_the_adaptive_squared_loss_of_power_one_half(c):
    """||e||^2 / sg(||e||^2 + c^2)^p at p = 1/2 has the gradient of 2 huber_c."""
    e = normal(16, 12)
    _, huber = huber_gradient(c, e)
    adaptive = e.clone().requires_grad_()
    squared = adaptive.square().sum(1)
    (gradient,) = torch.autograd.grad((squared / (squared.detach() + c**2) ** 0.5).sum(), adaptive)
    torch.testing.assert_close(gradient, 2 * huber, rtol=1e-14, atol=0)


def test_huber_becomes_the_squared_distance_for_large_c():
    e = normal(8, 12)
    c = 1e4
    loss, _ = huber_gradient(c, e)
    torch.testing.assert_close(2 * c * loss, e.square().sum(1), rtol=1e-6, atol=0)


def test_huber_at_zero_difference_has_no_gradient():
    for c in (0.0, 1e-8, 0.03):
        loss, gradient = huber_gradient(c, torch.zeros(2, 5))
        assert (loss == 0).all()
        assert (gradient == 0).all()


def test_l2_32_resizes_images_to_32():
    a, b = normal(2, 3, 64, 64), normal(2, 3, 64, 64, seed=1)
    halved = (a - b).unflatten(2, (32, 2)).unflatten(4, (32, 2)).mean((3, 5))
    expected = halved.square().flatten(1).mean(1)
    torch.testing.assert_close(SquaredL2(resize=32)(a, b), expected, rtol=1e-12, atol=0)
    with pytest.raises(ConfigError, match=r"samples of shape \(2,\) given, accepted: images"):
        SquaredL2(resize=32)(normal(4, 2), normal(4, 2))


class FakeLPIPS(torch.nn.Module):
    """Stands for lpips.LPIPS: returns [B, 1, 1, 1], the mean squared difference."""

    made: ClassVar[list[FakeLPIPS]] = []

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        self.backbone = net
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.shapes: list[tuple[int, ...]] = []
        self.made.append(self)

    def forward(self, a, b):
        self.shapes.append(tuple(a.shape))
        return self.scale * (a - b).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def fake_lpips(monkeypatch):
    module = types.ModuleType("lpips")
    module.LPIPS = FakeLPIPS
    monkeypatch.setitem(sys.modules, "lpips", module)
    monkeypatch.setattr(FakeLPIPS, "made", [])
    consistency._lpips_network.cache_clear()
    yield FakeLPIPS
    consistency._lpips_network.cache_clear()


def test_lpips(fake_lpips):
    a, b = normal(3, 3, 32, 32).float(), normal(3, 3, 32, 32, seed=1).float()
    a.requires_grad_()
    distance = LPIPS()(a, b)
    assert distance.shape == (3,)
    LPIPS()(normal(2, 3, 256, 256).float(), normal(2, 3, 256, 256).float())
    (network,) = fake_lpips.made  # loaded once
    assert network.backbone == "vgg"
    assert network.shapes == [(3, 3, 224, 224), (2, 3, 256, 256)]
    assert not network.training
    distance.sum().backward()
    assert a.grad is not None
    assert a.grad.abs().sum() > 0
    assert network.scale.grad is None
    LPIPS(backbone="alex")(b, b)
    assert fake_lpips.made[-1].backbone == "alex"


def test_lpips_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)  # makes the import fail
    consistency._lpips_network.cache_clear()
    with pytest.raises(MissingPackageError, match=r"pip install 'fastflow\[lpips\]'"):
        LPIPS()(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


# Weights


def test_weights():
    t, r = f64(0.01, 0.5, 2.0, 80.0), f64(0.0, 0.4, 1.0, 79.0)
    snr, sd = 1 / t**2, 0.5
    cases = [
        (Uniform(), torch.ones(4, dtype=torch.float64)),
        (InverseGap(), 1 / (t - r)),
        (InverseGap(power=0.5), 1 / (t - r).sqrt()),
        (InverseSigma(), snr),
        (InverseSigma(power=1.0), 1 / t),
        (SnrPlus(), snr + 1),
        (TruncatedSnr(), torch.maximum(snr, torch.ones_like(snr))),
        (InverseCout(), (t**2 + sd**2) / (t * sd) ** 2),
        (InverseCout(), snr + 1 / sd**2),
        (InverseCout(power=1.0, sigma_data=2.0), (t**2 + 4).sqrt() / (2 * t)),
    ]
    for weight, expected in cases:
        torch.testing.assert_close(weight(t, r), expected, rtol=1e-14, atol=0)


# Teacher steps


GAUSSIAN = Gaussian.isotropic(0.5, mean=0.2)


@pytest.mark.parametrize(("step", "solver"), [(Euler(), ode_euler), (Heun(), ode_heun)])
@pytest.mark.parametrize("r", [1.5, 0.2])
def test_teacher_steps_are_those_of_the_samplers(step, solver, r):
    x = 2.0 * normal(6, 3)
    got = step(GAUSSIAN.denoiser, x, f64(2.0).expand(6), f64(r).expand(6))
    expected = solver(velocity_of(GAUSSIAN.denoiser), x, (2.0, r))
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("step", "order"), [(Euler(), 2), (Heun(), 3)])
def test_order_of_the_error_of_one_step(step, order):
    t = f64(1.0).expand(6)
    x = normal(6, 3)
    errors = [
        (step(GAUSSIAN.denoiser, x, t, t - h) - GAUSSIAN.flow_map(x, t, t - h)).norm().item()
        for h in (0.02, 0.01)
    ]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.1


@pytest.mark.parametrize("step", [Euler(), Heun()])
def test_steps_to_zero_return_the_denoised_state(step):
    x, t = normal(4, 3), f64(0.002, 0.5, 2.0, 80.0)
    r = f64(0.0, 0.1, 0.0, 0.0)
    got = step(GAUSSIAN.denoiser, x, t, r)
    done = r == 0
    assert torch.equal(got[done], GAUSSIAN.denoiser(x, t)[done])
    alone = step(GAUSSIAN.denoiser, x[1:2], t[1:2], r[1:2])
    torch.testing.assert_close(got[1:2], alone, rtol=1e-14, atol=0)
    asked: list[Tensor] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return GAUSSIAN.denoiser(x, t)

    step(denoiser, x, t, r)
    assert all((times > 0).all() for times in asked)  # there is no slope at t = 0


@pytest.mark.parametrize("step", [Euler(), Heun()])
def test_steps_are_exact_where_the_denoiser_is_constant(step):
    x, t, r = normal(4, 3), f64(0.01, 0.5, 2.0, 80.0), f64(0.002, 0.1, 1.9, 0.0)
    point = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)
    got = step(lambda x, t: point.expand_as(x), x, t, r)
    torch.testing.assert_close(got, point + (r / t)[:, None] * (x - point), rtol=1e-12, atol=1e-13)
