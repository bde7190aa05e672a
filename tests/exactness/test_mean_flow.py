"""MeanFlow against closed forms: its identity, targets, guidance, teachers, sampling."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from consistency_fakes import f64, now, random_batch
from fastflow.data.batch import Batch
from fastflow.errors import ConfigError
from fastflow.guidance import MixedGuidance
from fastflow.method import Frozen, Networks
from fastflow.network import Network
from fastflow.oracle import Gaussian, Mixture
from fastflow.path import VE, Linear, expand, scaled
from fastflow.regression import AdaptiveL2, Regression
from fastflow.rng import Draws
from fastflow.rows import FirstRows
from fastflow.sampling import jumps
from fastflow.schedules import LinearRamp
from fastflow.tangent import (
    DualNumbers,
    FiniteDifference,
    FunctionalJVP,
    Pairs,
    TangentEngine,
    value_and_jvp,
)
from fastflow.teacher import Teacher
from fastflow.time_difference import BoundedDifference
from fastflow.times import LogitNormal, PairLaw, Uniform
from fastflow.wrappers import EDMDenoiser, VelocityNetwork
from mean_flow_fakes import AverageVelocity, GivenTimes, Listening, batch_of, given_times
from methods.mean_flow import MeanFlow, MeanFlowEDM
from networks.dit import DiT
from networks.mlp import ToyMLP

LEAST_SQUARES = AdaptiveL2(power=0.0)
T, R = f64(0.9, 0.6, 0.6, 0.3, 1.0), f64(0.1, 0.6, 0.2, 0.0, 0.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def average(oracle: Gaussian | Mixture, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The exact u; the velocity where r = t."""
    same, gap = expand(t == r, z), expand(t - r, z)
    u = (z - oracle.flow_map(z, t, r)) / torch.where(same, 1.0, gap)
    return torch.where(same, oracle.velocity(z, t), u)


def gaussian_average(std: float, mean: float):
    """The exact u of N(mean, std^2) on the linear path, with derivatives everywhere."""

    def u(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        c_t, c_r = ((1 - k) ** 2 * std**2 + k**2 for k in (t, r))
        # 1 - sqrt(c_r / c_t) = (t - r) * slope, without dividing by t - r.
        slope = ((1 + std**2) * (t + r) - 2 * std**2) / (c_t + (c_t * c_r).sqrt())
        return expand(slope, z) * (z - expand(1 - t, z) * mean) - mean

    return u


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets(Regression):
    """Least squares that keeps the targets."""

    seen: list[Tensor] = dataclasses.field(default_factory=list)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        self.seen.append(target)
        return LEAST_SQUARES(prediction, target)


def target_of(method: MeanFlow, net: Network, batch: Batch, teacher: Network | None = None):
    watch = Targets()
    companions = {} if teacher is None else {"teacher": teacher}
    method = dataclasses.replace(method, regression=watch)
    method.loss(Networks(net, companions), batch, now())
    return watch.seen[0]


def toy(seed: int = 0, **kwargs) -> VelocityNetwork:
    """A random network of two times in float64; no weight is zero."""
    net = VelocityNetwork(ToyMLP(data_dim=2, width=16, depth=2, two_times=True, **kwargs))
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return net.double()


# The identity


@pytest.mark.parametrize("engine", [Pairs(), DualNumbers(), FunctionalJVP()])
def test_exact_gaussian_velocity_satisfies_the_identity(engine):
    """u = v - (t - r) du/dt along the marginal velocity, where r = t too."""
    oracle, u = Gaussian.isotropic(0.5, mean=0.3).on(Linear()), gaussian_average(0.5, 0.3)
    z = normal(5, 4)
    v = oracle.velocity(z, T)
    value, slope = value_and_jvp(u, (z, T, R), (v, torch.ones_like(T), None), engine)
    torch.testing.assert_close(value, average(oracle, z, T, R), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(value, v - scaled(T - R, slope), rtol=1e-12, atol=1e-12)


def test_a_distilled_exact_network_has_no_loss():
    """Along the exact velocity of a teacher, the exact u is the minimum, at loss 0."""
    oracle = Gaussian.isotropic(0.5, mean=0.3).on(Linear())
    net = AverageVelocity(gaussian_average(0.5, 0.3))
    teacher = AverageVelocity(lambda z, t, _: oracle.velocity(z, t))
    teacher.two_times = False
    method = MeanFlow(
        times=given_times(T, R),
        regression=LEAST_SQUARES,
        teacher=Teacher(source=Frozen(weights="unused")),
    )
    batch = batch_of(0.3 + 0.5 * normal(5, 4), normal(5, 4, seed=1))
    loss = method.loss(Networks(net, {"teacher": teacher}), batch, now())
    assert loss.per_sample.max() < 1e-24
    wrong = AverageVelocity(lambda z, t, r: 1.01 * gaussian_average(0.5, 0.3)(z, t, r))
    assert method.loss(Networks(wrong, {"teacher": teacher}), batch, now()).per_sample.min() > 1e-6


def test_teachers_of_any_kind_give_the_same_velocity():
    oracle = Gaussian.isotropic(0.5, mean=0.3)

    class Denoiser(Network):
        def forward(self, x, t, s=None, cond=None, augment=None):
            return oracle.denoiser(x, t)

    method = MeanFlow(
        times=given_times(T[:4], T[:4]), teacher=Teacher(source=Frozen(weights="unused"))
    )
    batch = batch_of(normal(4, 2), normal(4, 2, seed=1))
    target = target_of(method, toy(), batch, Denoiser())
    z = Linear().interpolate(batch.x, normal(4, 2, seed=1), T[:4])
    expected = oracle.on(Linear()).velocity(z, T[:4])
    torch.testing.assert_close(target, expected, rtol=1e-12, atol=1e-12)


def test_conditional_targets_scatter_around_the_exact_velocity():
    """At the exact u: residuals of mean 0 and variance C_r S^2 / C_t^2 per dimension."""
    std, t, r, n = 0.5, 0.7, 0.2, 20_000
    net = AverageVelocity(gaussian_average(std, 0.0))
    method = MeanFlow(times=given_times(f64(t).expand(n), f64(r).expand(n)))
    batch = batch_of(std * normal(n, 1), normal(n, 1, seed=1))
    watch = Targets()
    loss = dataclasses.replace(method, regression=watch).loss(Networks(net), batch, now())
    c_t, c_r = ((1 - k) ** 2 * std**2 + k**2 for k in (t, r))
    variance = c_r * std**2 / c_t**2
    z = Linear().interpolate(batch.x, normal(n, 1, seed=1), f64(t))
    residual = watch.seen[0] - gaussian_average(std, 0.0)(z, f64(t), f64(r))
    assert abs(residual.mean().item()) < 4 * (variance / n) ** 0.5
    assert loss.per_sample.mean().item() == pytest.approx(variance, rel=4 * (2 / n) ** 0.5)
    # The exact u is where the expected gradient vanishes.
    slope = (residual * z).mean().item()
    assert abs(slope) < 4 * (variance * c_t / n) ** 0.5


def test_one_data_point_needs_no_derivative():
    """Delta data: u = v = (z - x0) / t, du/dt = 0 and the loss is 0 for any (t, r)."""
    point = f64(0.4, -0.7)
    net = AverageVelocity(lambda z, t, r: (z - point) / expand(t, z))
    method = MeanFlow(times=given_times(T, R), regression=LEAST_SQUARES)
    loss = method.loss(Networks(net), batch_of(point.expand(5, 2), normal(5, 2)), now())
    assert loss.per_sample.max() < 1e-24
    assert loss.metrics["dudt"] < 1e-12


# Targets


@pytest.mark.parametrize("method", [MeanFlow, MeanFlowEDM])
def test_where_r_is_t_the_target_is_the_velocity_to_the_bit(method):
    x, eps = normal(5, 2).float(), normal(5, 2, seed=1).float()
    net = toy().float()
    if method is MeanFlowEDM:
        net = EDMDenoiser(net.model)
    target = target_of(method(times=given_times(T, T)), net, batch_of(x, eps))
    assert torch.equal(target, eps - x if method is MeanFlow else eps)
    other = target_of(method(times=given_times(T, 0.9 * T)), net, batch_of(x, eps))
    assert not torch.isclose(target, other).any()


def test_the_derivative_is_taken_along_v_1_0():
    """By hand, for u(z, t, r) = a z + b t + c r: du/dt = a v + b."""
    a, b, c = 0.7, -0.4, 5.0

    def u(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return a * z + expand(b * t + c * r, z)

    x, eps = normal(5, 2), normal(5, 2, seed=1)
    target = target_of(MeanFlow(times=given_times(T, R)), AverageVelocity(u), batch_of(x, eps))
    v = eps - x
    torch.testing.assert_close(target, v - expand(T - R, v) * (a * v + b))


def test_least_gap_and_warmup():
    net, batch = toy(), batch_of(normal(5, 2), normal(5, 2, seed=1))
    base = MeanFlow(times=given_times(T, R))
    v = normal(5, 2, seed=1) - normal(5, 2)
    slope = (v - target_of(base, net, batch)) / expand(T - R, v)  # no number where r = t
    raised = target_of(dataclasses.replace(base, least_gap=0.5), net, batch)
    expected = v - expand((T - R).clamp_min(0.5), v) * slope
    torch.testing.assert_close(raised[[0, 2, 3, 4]], expected[[0, 2, 3, 4]])
    assert not torch.isclose(raised[1], v[1]).any()
    watch = Targets()
    warm = dataclasses.replace(base, warmup=LinearRamp(steps=8), regression=watch)
    for step in (0, 4, 8):
        warm.loss(Networks(net), batch, dataclasses.replace(now(), step=step))
    full = target_of(base, net, batch)
    torch.testing.assert_close(watch.seen[0], v, rtol=0, atol=0)
    torch.testing.assert_close(watch.seen[1], (v + full) / 2)
    torch.testing.assert_close(watch.seen[2], full, rtol=0, atol=0)


def test_on_edms_path():
    """u = (x - D) / t has the identity in sigma, and jumps as the exact map does."""
    oracle, std = Gaussian.isotropic(0.5), 0.5
    t, r = f64(60.0, 2.0, 2.0, 0.5), f64(1.0, 2.0, 0.1, 0.002)

    class Denoiser(Network):
        two_times = True

        def forward(self, x, t, s=None, cond=None, augment=None):
            gain = ((s**2 + std**2) / (t**2 + std**2)).sqrt()
            slope = (t + s) / ((t**2 + std**2) * (1 + gain))  # of u = slope x
            return x - expand(t * slope, x) * x

    net, teacher = Denoiser(), AverageVelocity(lambda z, t, _: z)
    teacher.two_times, teacher.predicts = False, "denoiser"
    teacher.function = lambda z, t, _: oracle.denoiser(z, t)
    method = MeanFlowEDM(
        times=given_times(t, r),
        regression=LEAST_SQUARES,
        teacher=Teacher(source=Frozen(weights="unused")),
    )
    batch = batch_of(normal(4, 2), normal(4, 2, seed=1))
    loss = method.loss(Networks(net, {"teacher": teacher}), batch, now())
    assert loss.per_sample.max() < 1e-24
    x = 2 * normal(4, 2)
    torch.testing.assert_close(method.flow_map(net, x, t, r), oracle.flow_map(x, t, r))
    assert isinstance(method.path, VE)
    assert method.path.t_max == 80


# Finite differences


def test_bounded_difference_chooses_a_side():
    """Of a parabola in t the central difference is exact, the others are off by h."""
    h = 0.01
    engine = BoundedDifference(step=h, t_max=0.999)
    t, r = f64(0.5, 0.5, 0.505, 0.995, 0.995, 0.5), f64(0.1, 0.5, 0.5, 0.1, 0.995, 0.5 - h)
    zero = torch.zeros(6, 1, dtype=torch.float64)

    def f(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return expand(t**2, z) + z**2

    value, slope = value_and_jvp(f, (zero, t, r), (zero + 1, torch.ones_like(t), None), engine)
    error = (slope - expand(2 * t, slope)).squeeze(1)
    expected = f64(0, 2 * h, 2 * h, -2 * h, -2 * h, 2 * h)
    torch.testing.assert_close(error, expected, rtol=0, atol=1e-10)
    assert torch.equal(value.squeeze(1), t**2)


def test_bounded_difference_from_t_min():
    """Below t_min + h it looks forward, however small r is."""
    engine = BoundedDifference(step=0.01, t_min=0.02, t_max=80.0)
    t, r = f64(0.025), f64(0.0)
    z = torch.zeros(1, 1, dtype=torch.float64)
    called: list[float] = []

    def f(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        called.append(t.item())
        return expand(t, z) + z

    _, slope = value_and_jvp(f, (z, t, r), (z, torch.ones_like(t), None), engine)
    torch.testing.assert_close(slope, torch.ones_like(z))
    assert min(called) == 0.025


def test_bounded_difference_shares_dropout():
    t, r, z = f64(0.5, 0.7), f64(0.1, 0.7), normal(2, 64)
    drop = torch.nn.Dropout(0.5)

    def f(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return drop(expand(t, z) + 0 * z + 1)

    torch.manual_seed(0)
    value, slope = value_and_jvp(
        f, (z, t, r), (z, torch.ones_like(t), None), BoundedDifference(step=1e-3)
    )
    torch.testing.assert_close(slope, 2.0 * (value > 0).double())
    after = torch.rand(4)
    torch.manual_seed(0)
    drop(z)
    assert torch.equal(after, torch.rand(4))


def test_engines_agree():
    batch, method = batch_of(normal(5, 2), normal(5, 2, seed=1)), MeanFlow(times=given_times(T, R))
    exact = target_of(method, toy(), batch)
    for engine, bound in (
        (DualNumbers(), 1e-12),
        (FunctionalJVP(), 1e-12),
        (FiniteDifference(step=1e-4), 1e-7),
        (BoundedDifference(step=1e-5), 1e-3),
    ):
        other = target_of(dataclasses.replace(method, engine=engine), toy(), batch)
        torch.testing.assert_close(other, exact, rtol=0, atol=bound)


def test_differences_are_named_where_the_method_is():
    for engine in (Pairs(), DualNumbers(), FunctionalJVP()):
        assert MeanFlow(engine=engine).title == "MeanFlow"
    found = MeanFlowEDM(engine=FiniteDifference(step=1e-3, scheme="forward")).title
    assert found == "MeanFlowEDM, finite differences (forward, h=0.001)"
    found = MeanFlow(engine=BoundedDifference(step=1e-4)).title
    assert found == "MeanFlow, finite differences (bounded, h=0.0001)"


def test_bounded_difference_refuses():
    engine: TangentEngine = BoundedDifference(step=0.1)
    x, t = normal(2, 2), f64(0.5, 0.5)
    with pytest.raises(ConfigError, match="use FiniteDifference"):
        value_and_jvp(lambda x, t: x * expand(t, x), (x, t), (x, torch.ones_like(t)), engine)
    with pytest.raises(ConfigError, match="less than half"):
        BoundedDifference(step=0.5)


# Guidance


def conditional(z: Tensor, t: Tensor, r: Tensor, cond: Tensor) -> Tensor:
    """A network whose velocity is 3 for the class and 1 without it."""
    return 0 * z + (1 + 2 * cond.sum(1, keepdim=True))


ONE_CLASS = torch.ones(5, 1, dtype=torch.float64)
NONE_DROPPED = MixedGuidance(omega=1.0, label_dropout=0.0)


def guided_target(guidance: MixedGuidance | None, **uniforms: Tensor) -> Tensor:
    batch = batch_of(normal(5, 2), normal(5, 2, seed=1), cond=ONE_CLASS, **uniforms)
    method = MeanFlow(times=given_times(T, R), guidance=guidance)
    return target_of(method, AverageVelocity(conditional, classes=1), batch)


LEVELS = {"label_dropout": f64(0.9, 0.05, 0.9, 0.9, 0.3)}


def test_omega_1_and_kappa_0_are_no_guidance():
    plain = guided_target(None)
    assert torch.equal(guided_target(NONE_DROPPED, **LEVELS), plain)
    listening = Listening(AverageVelocity(conditional, classes=1))
    batch = batch_of(normal(5, 2), normal(5, 2, seed=1), cond=ONE_CLASS, **LEVELS)
    method = MeanFlow(times=given_times(T, R), guidance=NONE_DROPPED)
    method.loss(Networks(listening), batch, now())
    assert len(listening.calls) == 1


def test_guided_velocity_by_its_formula():
    guidance = MixedGuidance(omega=2.0, kappa=0.25, t_min=0.5, t_max=0.95, label_dropout=0.1)
    v = normal(5, 2, seed=1) - normal(5, 2)
    expected = 2 * v + (1 - 2 - 0.25) * 1 + 0.25 * 3
    found = guided_target(guidance, **LEVELS)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    # A dropped label, t = 0.3 and t = 1 keep v.
    assert torch.equal(found[[1, 3, 4]], v[[1, 3, 4]])


def test_dropped_rows_are_trained_without_their_class():
    batch = batch_of(normal(5, 2), normal(5, 2, seed=1), cond=ONE_CLASS, **LEVELS)
    for rows, expected in ((None, [1, 0, 1, 1, 1]), (FirstRows(count="binomial"), [0, 1, 1, 1, 1])):
        guidance = MixedGuidance(omega=2.0)
        if rows is not None:
            guidance = dataclasses.replace(guidance, dropped=rows)
        net = Listening(AverageVelocity(conditional, classes=1))
        method = MeanFlow(times=given_times(T, R), guidance=guidance)
        method.loss(Networks(net), batch, now())
        assert net.calls[-1]["cond"].flatten().tolist() == expected


@pytest.mark.parametrize(("omega", "kappa"), [(1.0, 0.5), (0.2, 0.92), (2.0, 0.0)])
def test_effective_scale_is_omega_over_1_minus_kappa(omega, kappa):
    """The velocity for the class at which E[v_g] is that velocity itself, on Gaussian classes."""
    mean_c, mean_0, t = 0.7, -0.2, f64(0.6)
    z = normal(3, 1)
    marginal = [
        Gaussian.isotropic(0.5, m).on(Linear()).velocity(z, t.expand(3)) for m in (mean_c, mean_0)
    ]
    scale = omega / (1 - kappa)
    fixed = marginal[1] + scale * (marginal[0] - marginal[1])

    def own(rows: Tensor) -> Tensor:
        return torch.where(rows > 0, fixed, marginal[1])

    guidance = MixedGuidance(omega=omega, kappa=kappa, label_dropout=0.0)
    draws = Draws(seed=0, step=0, indices=(0, 1, 2), total=3)
    one = torch.ones(3, 1, dtype=torch.float64)
    guided, rows = guidance(own, marginal[0], t.expand(3), one, draws)
    torch.testing.assert_close(guided, fixed, rtol=1e-12, atol=1e-12)
    assert torch.equal(rows, one)


def test_guidance_sees_no_dropout_and_leaves_the_mode_alone():
    net = Listening(toy(cond_dim=1))
    batch = batch_of(normal(5, 2), normal(5, 2, seed=1), cond=ONE_CLASS, **LEVELS)
    method = MeanFlow(
        times=given_times(T, R), guidance=MixedGuidance(omega=2.0, kappa=0.5, label_dropout=0.0)
    )
    for training in (True, False):
        net.train(training)
        net.calls.clear()
        method.loss(Networks(net), batch, now())
        assert [call["training"] for call in net.calls] == [False, False, training]
        assert not any(call["out"].requires_grad for call in net.calls[:2])
        assert net.training == net.net.training == training


def test_teachers_guidance_acts_within_its_interval():
    t = f64(0.9, 0.6, 0.1)
    net = AverageVelocity(conditional, classes=1)
    net.two_times = False
    cond = ONE_CLASS[:3]
    for interval, expected in ((None, [7, 7, 7]), ((0.5, 0.7), [3, 7, 3])):
        teacher = Teacher(source=Frozen(weights="unused"), guidance=3.0, interval=interval)
        method = MeanFlow(times=given_times(t, t), teacher=teacher)
        batch = batch_of(normal(3, 1), normal(3, 1, seed=1), cond=cond)
        found = target_of(method, AverageVelocity(conditional, classes=1), batch, net)
        torch.testing.assert_close(found.flatten(), f64(*expected))
    with pytest.raises(ConfigError, match="the smaller one first"):
        Teacher(source=Frozen(weights="unused"), guidance=3.0, interval=(0.7, 0.5))


# Sampling


def test_the_map_lands_exactly_and_composes():
    """A map of two times: s = t stays to the bit; two jumps of the exact map are one."""
    method, t, u, s = MeanFlow(), f64(0.9, 0.6), f64(0.5, 0.4), f64(0.1, 0.0)
    x = normal(2, 2)
    assert torch.equal(method.flow_map(toy(), x, t, t), x)
    net = AverageVelocity(gaussian_average(0.5, 0.3))
    once = method.flow_map(net, x, t, s)
    torch.testing.assert_close(
        method.flow_map(net, method.flow_map(net, x, t, u), u, s), once, rtol=1e-12, atol=1e-12
    )
    exact = Gaussian.isotropic(0.5, mean=0.3).on(Linear()).flow_map(x, t, s)
    torch.testing.assert_close(once, exact, rtol=1e-12, atol=1e-12)
    assert method.flow_map(toy().float(), x.float(), t, s).dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_sampling_jumps_from_time_to_time(steps):
    """x0 = e - u(e, 0, 1) in one step; more jumps end where the sampler says, without noise."""
    net = Listening(AverageVelocity(gaussian_average(0.5, 0.3)))
    method, times = MeanFlow(), (1.0, 0.6, 0.2)[:steps]

    def flow_map(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return method.flow_map(net, x, t, s)

    def no_noise() -> Tensor:
        raise AssertionError("noise was drawn")

    e = normal(4, 2)
    out = method.sample(flow_map, e, times, no_noise)
    assert [(c["t"][0].item(), c["s"][0].item()) for c in net.calls] == list(
        zip(times, (*times[1:], 0.0), strict=True)
    )
    exact = Gaussian.isotropic(0.5, mean=0.3).on(Linear()).flow_map(e, f64(1.0), f64(0.0))
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, jumps(flow_map, e, (*times, 0.0)))


# Times


def test_pairs_are_ordered_and_the_share_is_exact():
    draws = Draws(seed=0, step=0, indices=tuple(range(64)), total=64)
    law = LogitNormal(mean=-0.4, std=1.0)
    t, r = PairLaw(times=law, equal=0.75)(draws)
    assert (r <= t).all()
    assert (t == r).sum() == 48
    none_t, none_r = PairLaw(times=law, equal=0.0)(draws)
    assert torch.equal(none_t, t)
    assert (none_r < none_t).all()
    assert not (t == r)[:48].all()
    front_t, front_r = PairLaw(times=law, equal=0.75, rows=FirstRows())(draws)
    assert (front_t == front_r).tolist() == [True] * 48 + [False] * 16


def test_clip_keeps_t_and_sort_does_not():
    draws = Draws(seed=0, step=0, indices=tuple(range(64)), total=64)
    ends = LogitNormal(mean=-4.0, std=1.6)
    drawn = Uniform()(draws)
    for order in ("clip", "sort"):
        t, r = PairLaw(times=Uniform(), ends=ends, equal=0.0, order=order)(draws)
        low = ends(draws, "r")
        if order == "clip":
            assert torch.equal(t, drawn)
            assert torch.equal(r, torch.minimum(drawn, low))
        else:
            assert torch.equal(t, torch.maximum(drawn, low))
            assert torch.equal(r, torch.minimum(drawn, low))


# Contracts


def test_loss_contract():
    net = toy().float()
    method = MeanFlow(regression=AdaptiveL2(power=1.0))
    x = normal(16, 2).float()
    first, again = (method.loss(Networks(net), random_batch(x), now()) for _ in range(2))
    assert torch.equal(first.per_sample, again.per_sample)
    assert first.per_sample.dtype == torch.float32
    assert first.times.dtype == torch.float64
    assert (first.per_sample < 1).all()
    assert not any(value.requires_grad for value in first.metrics.values())
    alone = [method.loss(Networks(net), part, now()) for part in random_batch(x).split(1)]
    torch.testing.assert_close(
        torch.cat([loss.per_sample for loss in alone]), first.per_sample, rtol=1e-4, atol=1e-6
    )
    first.per_sample.mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert method.needs == frozenset()
    assert method.companions() == {}


def test_conditions_reach_the_network():
    cond = torch.eye(3)[[0, 2, 1]]
    net = Listening(toy(cond_dim=3).float())
    MeanFlow().loss(Networks(net), random_batch(normal(3, 2).float(), cond=cond), now())
    assert torch.equal(net.calls[0]["cond"], cond)


def test_published_times_are_the_default():
    law = MeanFlow().times
    assert law == PairLaw(times=LogitNormal(mean=-0.4, std=1.0), equal=0.75)
    assert MeanFlow().regression == AdaptiveL2(power=1.0, c=1e-3)


def test_refused():
    guidance, teacher = MixedGuidance(omega=2.0), Teacher(source=Frozen(weights="unused"))
    with pytest.raises(ConfigError, match="beside a teacher"):
        MeanFlow(guidance=guidance, teacher=teacher)
    with pytest.raises(ConfigError, match="without classes"):
        MeanFlow(guidance=guidance).check(Networks(toy()))
    MeanFlow(guidance=guidance).check(Networks(toy(cond_dim=2)))
    model = DiT(resolution=4, hidden_size=8, depth=1, num_heads=1, cond_dim=2, label_dropout=0.1)
    dropping = VelocityNetwork(model)
    with pytest.raises(ConfigError, match=r"network.model.label_dropout: 0.1 given, accepted: 0,"):
        MeanFlow(guidance=guidance).check(Networks(dropping))
    MeanFlow().check(Networks(dropping))
    with pytest.raises(ConfigError, match="0 or more"):
        MeanFlow(least_gap=-1.0)
    for wrong in (
        {"omega": 0.0},
        {"omega": 1.0, "kappa": 1.0},
        {"omega": 1.0, "label_dropout": 1.0},
        {"omega": 1.0, "t_min": 0.8, "t_max": 0.2},
    ):
        with pytest.raises(ConfigError, match="MixedGuidance"):
            MixedGuidance(**wrong)
    with pytest.raises(ConfigError, match="from 0 to 1"):
        GivenTimes(t=(1.0,), r=(0.0,), equal=1.5)
