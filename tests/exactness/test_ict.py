"""iCT: the law of its pairs, its distance and weight, its target, fixed points."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from consistency_fakes import (
    ConsistencyOf,
    Gains,
    Recording,
    f64,
    now,
    quadrature,
    random_batch,
    small_unet,
    stored_batch,
)
from fastflow.closed_forms import cm_fixed_point_gaussian
from fastflow.consistency import GridPairing, InverseGap, PseudoHuber, SquaredL2, TimePair, Uniform
from fastflow.consistency_model import consistency_loss
from fastflow.errors import ConfigError
from fastflow.generate import generate
from fastflow.method import Networks
from fastflow.oracle import Gaussian
from fastflow.path import expand, scaled
from fastflow.rng import isolated_rng
from fastflow.schedules import DoublingDiscretization
from fastflow.times import LogNormalIndex, UniformIndex, karras_grid
from methods.cm import CM
from methods.ict import ICT

METHOD = ICT()
S = 0.5


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def images(count: int, seed: int = 0) -> Tensor:
    return 0.5 * normal(count, 1, 8, 8, seed=seed).float()


# Times


@pytest.mark.parametrize(
    ("n", "index", "time", "ends"),
    [(11, 2, 0.085087, (0.0626330, 0.0039796)), (1281, 329, 0.186089, None)],
)
def test_probabilities_of_the_intervals(n, index, time, ends):
    grid = karras_grid(n)
    p = METHOD.index.probabilities(grid)
    assert p.shape == (n - 1,)
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    assert p.argmax().item() == index
    assert grid[index].item() == pytest.approx(time, abs=5e-7)
    if ends is not None:
        assert (p[0].item(), p[-1].item()) == pytest.approx(ends, abs=5e-8)


def test_mass_of_the_law_inside_the_grid():
    """The published law leaves 0.8 % outside [0.002, 80], which is put back by normalising."""
    z = (f64(0.002, 80.0).log() + 1.1) / 2
    low, high = torch.special.ndtr(z)
    assert (high - low).item() == pytest.approx(0.99166, abs=5e-6)
    grid = karras_grid(11)
    p = METHOD.index.probabilities(grid)
    inside = torch.special.ndtr((grid.log() + 1.1) / 2).diff() / (high - low)
    torch.testing.assert_close(p, inside, rtol=1e-12, atol=0)


def test_the_curriculum_sets_the_grid():
    assert METHOD.needs == {"N"}
    curriculum = DoublingDiscretization()
    levels = torch.linspace(0.001, 0.999, 256, dtype=torch.float64)
    batch = stored_batch(torch.zeros(256, 1), torch.zeros(256, 1), levels)
    for step, n in ((0, 11), (50_000, 21), (399_999, 1281)):
        moment = dataclasses.replace(now(), step=step, total_steps=400_000)
        values = curriculum(moment)
        assert values == {"N": n}
        t, r = METHOD.pairs(batch.draws, dataclasses.replace(moment, curriculum=values))
        grid = karras_grid(n)
        upper = torch.searchsorted(grid, t)
        assert torch.equal(grid[upper], t)
        assert torch.equal(grid[upper - 1], r)
    with pytest.raises(ConfigError, match="'N'"):
        METHOD.loss(Networks(small_unet()), random_batch(images(2)), now())


# The loss


@pytest.mark.parametrize(("shape", "c"), [((3, 32, 32), 0.0299298), ((3, 64, 64), 0.0598597)])
def test_c_grows_with_the_dimensions(shape, c):
    """The loss is that of CM with this constant."""
    x, eps = normal(2, *shape).float(), normal(2, *shape, seed=1).float()
    net = ConsistencyOf(lambda x, t: scaled((1 + t) ** -0.5, x), s_min=0.002)
    batch = stored_batch(x, eps, f64(0.3, 0.6))
    loss = METHOD.loss(Networks(net), batch, now(N=11))
    explicit = CM(
        pairs=GridPairing(index=LogNormalIndex(mean=-1.1, std=2.0)),
        distance=PseudoHuber(c=c),
        weight=InverseGap(),
    )
    expected = explicit.loss(Networks(net), batch, now(N=11))
    assert torch.equal(loss.times, expected.times)
    torch.testing.assert_close(loss.per_sample, expected.per_sample, rtol=1e-5, atol=0)
    assert 0.00054 * math.sqrt(x[0].numel()) == pytest.approx(c, abs=5e-8)


def test_loss_by_hand():
    x, eps = images(6), normal(6, 1, 8, 8, seed=5).float()
    levels = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    net = Recording(small_unet())
    loss = METHOD.loss(Networks(net), stored_batch(x, eps, levels), now(N=11))
    online, target = net.calls
    t, r = online["t"], target["t"]
    assert torch.equal(online["x"], x + scaled(t, eps))
    assert torch.equal(target["x"], x + scaled(r, eps))

    def f(call):
        gap = call["t"] - 0.002
        skip = 0.25 / (gap**2 + 0.25)
        out = 0.5 * gap / (call["t"] ** 2 + 0.25).sqrt()
        edm_skip = 0.25 / (call["t"] ** 2 + 0.25)
        edm_out = 0.5 * call["t"] / (call["t"] ** 2 + 0.25).sqrt()
        raw = (call["out"] - scaled(edm_skip, call["x"])) / expand(edm_out, x)
        return expand(skip, x) * call["x"] + expand(out, x) * raw

    squared = (f(online) - f(target)).flatten(1).square().sum(1)
    c = 0.00054 * 8
    expected = ((squared + c**2).sqrt() - c) / (t - r)
    torch.testing.assert_close(loss.per_sample.double(), expected.double(), rtol=1e-4, atol=1e-5)
    # The target is the student itself, without a graph.
    assert online["out"].requires_grad
    assert not target["out"].requires_grad
    loss.per_sample.mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert METHOD.companions() == {}


def test_gradient_of_the_distance():
    """e / sqrt(||e||^2 + c^2), shorter than 1; 2 c times the distance tends to the square."""
    e = normal(5, 12) * f64(1e-4, 0.01, 0.1, 1.0, 50.0)[:, None]
    e.requires_grad_()
    distance = PseudoHuber(c=0.03)(e, torch.zeros(5, 12).double())
    (gradient,) = torch.autograd.grad(distance.sum(), e)
    squared = e.detach().square().sum(1, keepdim=True)
    torch.testing.assert_close(gradient, e.detach() / (squared + 0.03**2).sqrt())
    assert (gradient.norm(dim=1) < 1).all()
    c = 1e5
    flat = 2 * c * PseudoHuber(c=c)(e.detach(), torch.zeros(5, 12).double())
    torch.testing.assert_close(flat, squared[:, 0], rtol=1e-4, atol=1e-4)


def test_the_weighted_loss_is_a_difference_quotient():
    """It keeps its size while N doubles; without the weight it falls like 1/N."""
    x, eps = normal(64, 3), normal(64, 3, seed=1)
    net = Networks(ConsistencyOf(lambda x, t: scaled(0.5 * (0.25 + t**2).rsqrt(), x), 0.002))
    levels = (torch.arange(64).double() + 0.5) / 64
    plain = CM(pairs=METHOD.pairs, distance=PseudoHuber(c=0.0), weight=Uniform())
    means = {}
    for n in (161, 321, 641, 1281):
        batch = stored_batch(x, eps, levels)
        losses = [
            m.loss(net, batch, now(N=n)) for m in (dataclasses.replace(METHOD, huber=0), plain)
        ]
        means[n] = [loss.per_sample.mean().item() for loss in losses]
    for n in (161, 321, 641):
        weighted, unweighted = (means[2 * n - 1][k] / means[n][k] for k in (0, 1))
        assert weighted == pytest.approx(1, abs=0.1)
        assert unweighted == pytest.approx(0.5, abs=0.05)


def test_dropout_masks_are_those_of_the_online_pass():
    """Both passes at one point and time: no difference is left."""
    net, x = small_unet(dropout=0.5).train(), images(3)
    t = f64(0.5, 1.0, 5.0)
    f = METHOD.f(net, None)
    point = x + scaled(t, normal(3, 1, 8, 8).float())
    with isolated_rng(7, "cpu"):
        loss = consistency_loss(
            f, f, point, point, TimePair(t=t, r=t), PseudoHuber(c=0.0), Uniform()
        ).per_sample
        following = torch.rand(4)
    assert (loss == 0).all()
    with isolated_rng(7, "cpu"):
        net(point, t)
        assert torch.equal(torch.rand(4), following)


# The boundary, fixed points, sampling


def test_the_boundary_is_kept_bitwise():
    x, s = images(4), torch.full((4,), 0.002, dtype=torch.float64)
    assert METHOD.s_min == 0.002
    assert torch.equal(METHOD.flow_map(small_unet(), x, s, s), x)


@pytest.mark.parametrize("n", [11, 41, 161])
def test_the_fixed_point_is_that_of_consistency_training(n):
    """Weight and distance do not move it: for a squared distance it is CM's closed form."""
    grid = karras_grid(n)
    gains = cm_fixed_point_gaussian(grid, S)
    maps = Gains(grid, gains)
    x, eps = quadrature(S)
    f = METHOD.f(ConsistencyOf(maps, s_min=0.002), None)
    p = METHOD.index.probabilities(grid)
    middles = p.cumsum(0) - p / 2
    count = n - 1
    batch = stored_batch(x.repeat(count, 1), eps.repeat(count, 1), middles.repeat_interleave(4))
    pair = METHOD.pairs(batch.draws, now(N=n))
    assert torch.equal(pair.t[::4], grid[1:])
    x_t, x_r = (batch.x + scaled(time, batch.draws.eps) for time in pair)
    loss = consistency_loss(f, f, x_t, x_r, pair, SquaredL2(), InverseGap())
    (gradient,) = torch.autograd.grad(loss.per_sample.sum(), maps.raw)
    scale = 8 * gains[1:] * (S**2 + grid[1:] ** 2) / (grid[1:] - grid[:-1])
    assert (gradient[1:] / scale).abs().max() < 1e-12


@pytest.mark.parametrize("n", [11, 1281])
def test_the_exact_map_keeps_only_the_noise_of_single_samples(n):
    """f(x_t, t) - f(x_r, r) is linear in (x0, eps) and known in closed form."""
    oracle = Gaussian.isotropic(S)
    net = ConsistencyOf(lambda x, t: oracle.flow_map(x, t, torch.full_like(t, 0.002)), 0.002)
    x, eps = normal(32, 3), normal(32, 3, seed=1)
    levels = (torch.arange(32).double() + 0.5) / 32
    loss = METHOD.loss(Networks(net), stored_batch(x, eps, levels), now(N=n))
    t, r = METHOD.pairs(stored_batch(x, eps, levels).draws, now(N=n))

    def f(time):
        return scaled(((S**2 + 0.002**2) / (S**2 + time**2)).sqrt(), x + scaled(time, eps))

    c = 0.00054 * math.sqrt(3)
    expected = ((f(t) - f(r)).square().sum(1) + c**2).sqrt() - c
    torch.testing.assert_close(loss.per_sample, expected / (t - r), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("between", [0.821, 1.526])
def test_two_steps_with_noise_between(between):
    net = Recording(small_unet())
    generate(METHOD, net, range(2), (1, 8, 8), (80.0, between))
    assert [call["t"][0].item() for call in net.calls] == [80.0, between]


# Contracts and errors


def test_the_same_draws_give_the_same_loss():
    nets, x = Networks(small_unet()), images(8)
    first, again = (METHOD.loss(nets, random_batch(x), now(N=18)) for _ in range(2))
    assert torch.equal(first.per_sample, again.per_sample)
    assert first.per_sample.dtype == torch.float32
    assert first.times.dtype == torch.float64
    alone = [METHOD.loss(nets, part, now(N=18)) for part in random_batch(x).split(3)]
    torch.testing.assert_close(
        torch.cat([loss.per_sample for loss in alone]), first.per_sample, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"huber": -1.0}, "ICT.huber: -1.0 given"),
        ({"sigma_min": 0.0}, "Karras grid"),
        ({"sigma_max": 0.001}, "Karras grid"),
        ({"rho": 0.0}, "Karras grid"),
    ],
)
def test_impossible_numbers_are_refused(change, text):
    with pytest.raises(ConfigError, match=text):
        ICT(**change)


def test_another_law_of_intervals():
    """The CM paper's uniform one, as a part."""
    method = ICT(index=UniformIndex())
    levels = (torch.arange(10).double() + 0.5) / 10
    draws = stored_batch(torch.zeros(10, 1), torch.zeros(10, 1), levels).draws
    assert torch.equal(method.pairs(draws, now(N=11)).r, karras_grid(11)[:-1])
