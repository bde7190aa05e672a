"""CM: the boundary, paired dropout, what is differentiated, fixed points, exact maps, contracts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from consistency_fakes import (
    AsDrawn,
    ConsistencyOf,
    DenoiserOf,
    Gains,
    Recording,
    f64,
    fixed_pairs,
    now,
    quadrature,
    random_batch,
    randomised,
    small_unet,
    stored_batch,
)
from fastflow.closed_forms import (
    cm_fixed_point_gaussian,
    ct_minimum_loss_gaussian,
    ect_fixed_point_gaussian,
    exact_gain_gaussian,
)
from fastflow.consistency import (
    Euler,
    GridPairing,
    Heun,
    InverseGap,
    PseudoHuber,
    RatioPairing,
    TeacherStep,
)
from fastflow.data.batch import Batch
from fastflow.errors import ConfigError
from fastflow.method import Frozen, Networks, Target
from fastflow.oracle import Gaussian, Mixture1D
from fastflow.path import expand
from fastflow.rng import isolated_rng
from fastflow.sampling import renoise
from fastflow.schedules import AdaptiveDecay, ConstantRatio, FixedDecay, SigmoidRatio
from fastflow.teacher import Teacher
from fastflow.times import LogNormal, TruncatedLogNormal, karras_grid
from fastflow.wrappers import EDMDenoiser
from methods.cm import CM
from networks.mlp import ToyMLP

ANY_SOURCE = Frozen(weights="unused: tests hand the teacher over")
RATIO = RatioPairing(times=LogNormal(mean=-1.1, std=2.0), gap=SigmoidRatio(k=8.0, b=1.0))
ECT = CM(pairs=RATIO, distance=PseudoHuber(c=0.03), weight=InverseGap(), boundary=0.0)
CURRICULUM = now(N=18, ratio=0.75)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def images(count: int, seed: int = 0) -> Tensor:
    return 0.5 * normal(count, 1, 8, 8, seed=seed).float()


def classes(count: int, dim: int = 3) -> Tensor:
    return torch.eye(dim)[torch.arange(count) % dim]


# The boundary and the map


@pytest.mark.parametrize("boundary", [0.0, 0.002])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_network_keeps_the_boundary_bitwise(boundary, dtype):
    net = small_unet().to(dtype)
    x = images(4).to(dtype)
    s = torch.full((4,), boundary, dtype=torch.float64)
    out = dataclasses.replace(ECT, boundary=boundary).flow_map(net, x, s, s)
    assert out.dtype == dtype
    assert torch.equal(out, x)


def test_flow_map_knows_one_end_time():
    method, net, x = CM(pairs=GridPairing()), small_unet(), images(2)
    t, end = f64(1.0, 2.0), f64(0.002, 0.002)
    assert method.s_min == 0.002
    assert method.path.t_max == 80
    rows = method.flow_map(net, x.flip(0), t.flip(0), end)
    torch.testing.assert_close(rows.flip(0), method.flow_map(net, x, t, end))
    with pytest.raises(ConfigError, match=r"jumps to s = 0.002 only, \[0.002, 0.5\] given"):
        method.flow_map(net, x, t, f64(0.002, 0.5))


@pytest.mark.parametrize("boundary", [-0.1, 80.0])
def test_impossible_boundaries_are_refused(boundary):
    with pytest.raises(ConfigError, match=f"CM.boundary: {boundary} given, accepted: from 0"):
        CM(pairs=GridPairing(), boundary=boundary)


def test_needs_and_companions():
    assert ECT.needs == {"ratio"}
    assert ECT.companions() == {}
    method = dataclasses.replace(
        ECT, target=AdaptiveDecay(mu0=0.9, s0=2), teacher=Teacher(source=ANY_SOURCE)
    )
    assert method.needs == {"N", "ratio"}
    assert method.companions() == {
        "target": Target(decay=AdaptiveDecay(mu0=0.9, s0=2)),
        "teacher": ANY_SOURCE,
    }


# What the networks see, and what is differentiated


def test_both_points_lie_on_the_line_through_data_and_noise():
    x, eps = images(64), normal(64, 1, 8, 8, seed=5).float()
    t, r = RATIO(random_batch(x).draws, CURRICULUM)
    net = Recording(small_unet())
    method = dataclasses.replace(ECT, pairs=fixed_pairs(t, r))
    method.loss(Networks(net), stored_batch(x, eps), now())
    online, target = net.calls
    for call, times in ((online, t), (target, r)):
        level = expand(times.float(), x)
        exact = x.double() + level.double() * eps.double()
        ulp = 2.0**-23 * (x.abs() + (level * eps).abs()).double()
        assert ((call["x"].double() - exact).abs() <= ulp).all()
        assert torch.equal(call["t"], times)
    # The step along the line that the papers write, from x_t and x0.
    x_t = x.double() + expand(t, x) * eps.double()
    slope = (x_t - x.double()) / expand(t, x)
    moved = x_t + expand(r - t, x) * slope
    torch.testing.assert_close(target["x"].double(), moved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", [None, Euler(), Heun()])
@pytest.mark.parametrize("decay", [None, FixedDecay(mu=0.9)])
def test_only_the_online_pass_is_differentiated(step, decay):
    student, target, teacher = (Recording(small_unet(seed)) for seed in (0, 1, 2))
    method = dataclasses.replace(
        ECT,
        target=decay,
        teacher=None if step is None else Teacher(source=ANY_SOURCE),
        step=step or Heun(),
    )
    batch = random_batch(images(4).requires_grad_())
    nets = Networks(student, {"target": target, "teacher": teacher})
    loss = method.loss(nets, batch, CURRICULUM)
    loss.per_sample.mean().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for net in (target, teacher) for p in net.parameters())
    fixed = (target if decay else student).calls[-1]
    assert not fixed["x"].requires_grad
    assert not fixed["out"].requires_grad
    assert not any(call["out"].requires_grad for call in teacher.calls)
    assert len(teacher.calls) == (0 if step is None else 1 if step == Euler() else 2)
    # The gradient is that of the distance to a constant.
    online = student.calls[0]
    t, r = RATIO(batch.draws, CURRICULUM)
    distance = method.distance(student.net(online["x"], t), fixed["out"])
    by_hand = torch.autograd.grad(
        (method.weight(t, r) * distance).mean(), list(student.parameters())
    )
    for parameter, expected in zip(student.parameters(), by_hand, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decay", [None, FixedDecay(mu=0.9)])
def test_dropout_masks_are_those_of_the_online_pass(decay):
    t = f64(0.5, 1.0, 5.0)
    method = CM(pairs=fixed_pairs(t, t), target=decay)
    student, target = (Recording(small_unet(dropout=0.5).train()) for _ in range(2))
    nets, batch = Networks(student, {"target": target}), random_batch(images(3))
    with isolated_rng(7, "cpu"):
        loss = method.loss(nets, batch, now())
        following = torch.rand(4)
    online = student.calls[0]
    repeated = (target if decay else student).calls[-1]
    assert torch.equal(online["out"], repeated["out"])
    assert (loss.per_sample == 0).all()
    with isolated_rng(7, "cpu"):
        once = student.net(online["x"], t)
        assert torch.equal(torch.rand(4), following)
    assert torch.equal(once, online["out"])
    with isolated_rng(8, "cpu"):
        assert not torch.equal(student.net(online["x"], t), once)  # dropout is at work


def test_teacher_guidance():
    """D_u + w (D_c - D_u); a row without class is left alone."""
    cond = torch.cat([classes(3), torch.zeros(1, 3)])
    batch = random_batch(images(4), cond=cond)
    teacher = small_unet(seed=2, cond_dim=3)
    targets = {}
    for w in (0.0, 1.0, 3.0):
        student = Recording(small_unet(cond_dim=3))
        method = CM(
            pairs=GridPairing(),
            teacher=Teacher(source=ANY_SOURCE, guidance=w),
            step=Euler(),
        )
        method.loss(Networks(student, {"teacher": teacher}), batch, CURRICULUM)
        assert all(torch.equal(call["cond"], cond) for call in student.calls)
        targets[w] = student.calls[1]["x"]
    # Euler's step is linear in D.
    extrapolated = targets[0.0] + 3 * (targets[1.0] - targets[0.0])
    torch.testing.assert_close(targets[3.0], extrapolated, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(targets[3.0][:3], targets[1.0][:3])
    torch.testing.assert_close(targets[3.0][3], targets[1.0][3])


# Fixed points on data N(0, S^2): f(x, t_n) = a_n x on a grid


S = 0.5
MODES: dict[str, TeacherStep | None] = {"ct": None, "euler": Euler(), "heun": Heun()}


def solver(mode: str):
    return "heun" if mode == "heun" else "euler"


def gaussian_cm(mode: str) -> CM:
    step = MODES[mode]
    return CM(
        pairs=GridPairing(),
        teacher=None if step is None else Teacher(source=ANY_SOURCE),
        step=step or Heun(),
    )


def all_intervals(n: int) -> Batch:
    """Each interval of the grid with the four points of the quadrature: 4 (n-1) rows."""
    x, eps = quadrature(S)
    lower = torch.arange(n - 1).repeat_interleave(4)
    return stored_batch(x.repeat(n - 1, 1), eps.repeat(n - 1, 1), (lower + 0.5) / (n - 1))


def population_losses(mode: str, maps: Gains) -> Tensor:
    """The population loss of each interval, [N-1], from the method itself."""
    n = len(maps.times)
    nets = Networks(
        ConsistencyOf(maps, s_min=0.002),
        {"teacher": DenoiserOf(Gaussian.isotropic(S).denoiser)},
    )
    loss = gaussian_cm(mode).loss(nets, all_intervals(n), now(N=n))
    return loss.per_sample.reshape(-1, 4).mean(1)


def relative_gradient(losses: Tensor, maps: Gains) -> Tensor:
    """The gradient by each gain over the two terms, 2 a E[x_t^2], whose difference it is."""
    (gradient,) = torch.autograd.grad(losses.sum(), maps.raw)
    return (gradient / (2 * maps.gains * (S**2 + maps.times**2))).detach()


BIAS = {("euler", 18): 0.846086, ("euler", 40): 0.929727, ("euler", 151): 0.981233} | {
    ("heun", 18): 1.05528,
    ("heun", 40): 1.00978,
    ("heun", 151): 1.00063,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [2, 18, 40, 151])
def test_closed_form_is_stationary(mode, n):
    grid = karras_grid(n)
    a = cm_fixed_point_gaussian(grid, S, solver(mode))
    maps = Gains(grid, a)
    losses = population_losses(mode, maps)
    assert relative_gradient(losses, maps).abs().max() < 1e-12
    minimum = ct_minimum_loss_gaussian(grid, S) if mode == "ct" else torch.zeros(n - 1).double()
    torch.testing.assert_close(losses.detach(), minimum, rtol=1e-10, atol=1e-20)
    if n > 2:
        bias = (a[-1] / exact_gain_gaussian(grid[-1], 0.002, S)).item()
        assert bias == pytest.approx(BIAS[solver(mode), n], abs=1e-5)
    # Elsewhere it is not: the gradient sees one gain that is 1 % too large.
    wrong = a.clone()
    wrong[1] *= 1.01
    maps = Gains(grid, wrong)
    assert relative_gradient(population_losses(mode, maps), maps)[1] > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_training_reaches_the_closed_form(mode):
    """Each step puts every gain where its present target is, so the chain settles in N-1 steps."""
    grid = karras_grid(18)
    maps = Gains(grid, torch.full_like(grid, 0.3), unit=(S**2 + grid**2).rsqrt())
    optimizer = torch.optim.SGD(maps.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        population_losses(mode, maps).sum().backward()
        optimizer.step()
    expected = cm_fixed_point_gaussian(grid, S, solver(mode))
    torch.testing.assert_close(maps.gains[1:].detach(), expected[1:], rtol=1e-12, atol=0)
    exact = exact_gain_gaussian(grid[-1], 0.002, S)
    assert (maps.gains[-1] / exact).item() == pytest.approx(BIAS[solver(mode), 18], abs=1e-5)


# ECT: the same with r(t) down to 0


@pytest.mark.parametrize(
    ("gap", "ratio"), [(SigmoidRatio(), 0.5), (SigmoidRatio(), 0.875), (ConstantRatio(), 0.5)]
)
def test_ect_closed_form_is_stationary(gap, ratio):
    times = [80.0, 7.0, 0.4]
    while (r := gap(f64(times[-1]), ratio).item()) > 0 and len(times) < 40:
        times.append(r)
    t = f64(*times)
    r = gap(t, ratio)
    every = torch.cat([t, r]).unique()
    a = ect_fixed_point_gaussian(every, lambda t: gap(t, ratio), S)
    maps = Gains(every, a)
    method = CM(pairs=RatioPairing(times=AsDrawn(), gap=gap), boundary=0.0)
    x, eps = quadrature(S)
    batch = stored_batch(x.repeat(len(t), 1), eps.repeat(len(t), 1), levels=t.repeat_interleave(4))
    loss = method.loss(Networks(ConsistencyOf(maps, s_min=0.0)), batch, now(ratio=ratio))
    losses = loss.per_sample.reshape(-1, 4).mean(1)
    assert relative_gradient(losses, maps).abs().max() < 1e-12
    a_r = ect_fixed_point_gaussian(r, lambda t: gap(t, ratio), S)
    minimum = a_r**2 * (t - r) ** 2 * S**2 / (S**2 + t**2)
    torch.testing.assert_close(losses.detach(), minimum, rtol=1e-10, atol=1e-20)


def test_pairs_with_r_0_are_denoising():
    x, eps = images(6), normal(6, 1, 8, 8, seed=5).float()
    t = f64(0.01, 0.1, 0.5, 1.0, 1.9, 1.94)
    method = dataclasses.replace(ECT, pairs=RatioPairing(times=AsDrawn(), gap=SigmoidRatio()))
    net = Recording(small_unet(dropout=0.0))
    loss = method.loss(Networks(net), stored_batch(x, eps, levels=t), now(ratio=0.5))
    online, target = net.calls
    assert (target["t"] == 0).all()
    assert torch.equal(target["out"], x)
    loss.per_sample.sum().backward()
    denoised = net.net(online["x"], t)
    c = 0.03
    norms = ((denoised - x).flatten(1).square().sum(1) + c**2).sqrt() - c
    expected = torch.autograd.grad((norms / t).sum(), list(net.parameters()))
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


# The exact flow map, in float64


ROOT = normal(3, 3, seed=1) / 2
ORACLES = {
    "isotropic": Gaussian.isotropic(0.5, mean=0.2),
    "correlated": Gaussian(mean=normal(3, seed=2), cov=ROOT @ ROOT.T),
}
MIXTURE = Mixture1D(f64(0.3, 0.7), f64(-0.5, 0.4), f64(0.4, 0.3))


def exact_net(oracle, s_min: float) -> ConsistencyOf:
    def to_s_min(x: Tensor, t: Tensor) -> Tensor:
        return oracle.flow_map(x, t, torch.full_like(t, s_min))

    return ConsistencyOf(to_s_min, s_min)


@pytest.mark.parametrize("name", [*ORACLES, "mixture"])
@pytest.mark.parametrize("s_min", [0.0, 0.002])
def test_the_exact_map_is_consistent(name, s_min):
    """f(X_{t->r}(x), r) = f(x, t) on every path of the ODE."""
    oracle, tolerance = (MIXTURE, 1e-10) if name == "mixture" else (ORACLES[name], 1e-12)
    method = CM(pairs=GridPairing(), boundary=s_min)
    net = exact_net(oracle, s_min)
    t = f64(80.0, 80.0, 5.0, 1.0, 0.3, 0.02)
    r = f64(79.0, 0.01, 4.9, 0.1, 0.2, 0.01)
    end = torch.full_like(t, s_min)
    x = expand((0.25 + t**2).sqrt(), normal(6, 3)) * normal(6, 3)
    direct = method.flow_map(net, x, t, end)
    through = method.flow_map(net, oracle.flow_map(x, t, r), r, end)
    torch.testing.assert_close(through, direct, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(direct, oracle.flow_map(x, t, end), rtol=tolerance, atol=tolerance)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactStep(TeacherStep):
    """The flow of an oracle in the place of a solver's step."""

    oracle: str

    def __call__(self, denoiser, x, t, r):
        return ORACLES[self.oracle].flow_map(x, t, r)


ABOVE = RatioPairing(
    times=TruncatedLogNormal(mean=-1.1, std=2.0), gap=SigmoidRatio(r_min=0.002), min_gap=1e-6
)


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize(
    ("s_min", "pairs"),
    [(0.0, GridPairing()), (0.0, RATIO), (0.002, GridPairing()), (0.002, ABOVE)],
)
def test_the_exact_map_has_no_distillation_loss(name, s_min, pairs):
    oracle = ORACLES[name]
    method = CM(
        pairs=pairs,
        boundary=s_min,
        teacher=Teacher(source=ANY_SOURCE),
        step=ExactStep(oracle=name),
    )
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    net = exact_net(oracle, s_min)
    exact = net.function
    net.function = lambda x, t: scale * exact(x, t)
    batch = random_batch(oracle.sample((32, 3), torch.Generator().manual_seed(0)))
    nets = Networks(net, {"teacher": DenoiserOf(oracle.denoiser)})
    loss = method.loss(nets, batch, CURRICULUM)
    assert loss.per_sample.dtype == torch.float64
    assert loss.per_sample.sqrt().max() < 1e-12
    loss.per_sample.mean().backward()
    assert abs(scale.grad.item()) < 1e-12


def test_rounds_of_jump_and_noise_keep_the_exact_law():
    """f lands at x_eps, so noise of std sqrt(t^2 - eps^2) brings the variance to S^2 + t^2."""
    for s_min, method in ((0.0, ECT), (0.002, CM(pairs=GridPairing()))):
        net = exact_net(Gaussian.isotropic(S), s_min)
        t, end = f64(80.0), f64(s_min)
        gain = method.flow_map(net, f64(1.0)[:, None], t, end).item()
        landed = gain**2 * (S**2 + 80.0**2)
        assert landed == pytest.approx(S**2 + s_min**2, rel=1e-13)
        zero, one = f64(0.0)[:, None], f64(1.0)[:, None]
        added = renoise(zero, method.s_min, 0.821, one, method.path).item()
        assert landed + added**2 == pytest.approx(S**2 + 0.821**2, rel=1e-13)


# Contracts of every method

VARIANTS = {
    "ct": CM(pairs=GridPairing()),
    "ect": ECT,
    "cd": CM(
        pairs=GridPairing(),
        target=FixedDecay(mu=0.9),
        teacher=Teacher(source=ANY_SOURCE, guidance=2.0),
    ),
}
each_variant = pytest.mark.parametrize("method", VARIANTS.values(), ids=VARIANTS.keys())


def labelled_nets() -> Networks:
    student, target, teacher = (small_unet(seed, cond_dim=3) for seed in range(3))
    return Networks(student, {"target": target, "teacher": teacher})


@each_variant
def test_the_same_draws_give_the_same_loss(method):
    nets, x, cond = labelled_nets(), images(8), classes(8)
    first = method.loss(nets, random_batch(x, cond=cond), CURRICULUM)
    again = method.loss(nets, random_batch(x, cond=cond), CURRICULUM)
    later = method.loss(nets, random_batch(x, step=1, cond=cond), CURRICULUM)
    assert torch.equal(first.per_sample, again.per_sample)
    assert torch.equal(first.times, again.times)
    assert not torch.equal(first.times, later.times)
    assert first.per_sample.shape == first.times.shape == (8,)
    assert first.per_sample.dtype == torch.float32
    assert first.times.dtype == torch.float64
    assert not any(value.requires_grad for value in first.metrics.values())
    assert all(value.ndim == 0 for value in first.metrics.values())


@each_variant
def test_a_loss_depends_on_its_own_sample(method):
    nets, x, cond = labelled_nets(), images(8), classes(8)
    together = method.loss(nets, random_batch(x, cond=cond), CURRICULUM)
    others = images(8, seed=9)
    others[3] = x[3]
    among = method.loss(nets, random_batch(others, cond=cond), CURRICULUM)
    assert torch.equal(among.per_sample[3], together.per_sample[3])
    assert not torch.equal(among.per_sample, together.per_sample)
    alone = [method.loss(nets, part, CURRICULUM) for part in random_batch(x, cond=cond).split(1)]
    assert torch.equal(torch.cat([loss.times for loss in alone]), together.times)
    torch.testing.assert_close(
        torch.cat([loss.per_sample for loss in alone]), together.per_sample, rtol=1e-4, atol=1e-6
    )


@each_variant
def test_autocast_leaves_the_loss_in_float32(method):
    nets, batch = labelled_nets(), random_batch(images(4), cond=classes(4))
    plain = method.loss(nets, batch, CURRICULUM)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(nets, batch, CURRICULUM)
    assert loss.per_sample.dtype == torch.float32
    assert torch.equal(loss.times, plain.times)
    assert not torch.equal(loss.per_sample, plain.per_sample)
    # bfloat16 keeps 8 bits; a step of a noisy time would move the loss much further.
    torch.testing.assert_close(loss.per_sample.mean(), plain.per_sample.mean(), rtol=0.2, atol=0)


def test_vectors_train_too():
    net = randomised(EDMDenoiser(ToyMLP(data_dim=2, width=16, depth=1)))
    loss = ECT.loss(Networks(net), random_batch(normal(6, 2).float()), CURRICULUM)
    loss.per_sample.mean().backward()
    assert loss.per_sample.shape == (6,)
    assert all(p.grad is not None for p in net.parameters())
