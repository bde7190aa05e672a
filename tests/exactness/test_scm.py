"""sCM: exact maps, the tangent, gradients, dropout, limits, the log-variance head, contracts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from consistency_fakes import (
    AsDrawn,
    DenoiserOf,
    f64,
    now,
    random_batch,
    randomised,
    small_unet,
    stored_batch,
)
from edm2_networks import small as small_edm2
from fastflow.consistency import InverseSigma
from fastflow.errors import ConfigError
from fastflow.method import Frozen, Networks
from fastflow.network import Network
from fastflow.oracle import Gaussian, Mixture, Mixture1D
from fastflow.path import TrigFlow, expand, scaled
from fastflow.path_difference import PathDifference
from fastflow.precond import consistency_from_denoiser
from fastflow.rng import SampleNoise, isolated_rng
from fastflow.sampling import multistep, prior
from fastflow.schedules import LinearRamp
from fastflow.tangent import DualNumbers, FunctionalJVP, Pairs, value_and_jvp
from fastflow.teacher import Teacher
from fastflow.times import LogNormal
from fastflow.wrappers import EDMDenoiser, TrigFlowNetwork
from methods.scm import SCM
from networks.edm2 import LogVariance
from networks.mlp import ToyMLP
from networks.song_unet import SongUNet

PATH, SD = TrigFlow(), 0.5
ANY_SOURCE = Frozen(weights="unused: tests hand the teacher over")
SCT = SCM(warmup=LinearRamp(steps=0))
SCD = dataclasses.replace(SCT, teacher=Teacher(source=ANY_SOURCE))
AT_TIMES = dataclasses.replace(SCT, times=AsDrawn())
ENGINES = [Pairs(), DualNumbers(), FunctionalJVP()]
each_engine = pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)
SIGMAS = f64(0.002, 0.05, 0.3, 0.8, 3.0, 80.0)

Function = Callable[[Tensor, Tensor], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def images(count: int, seed: int = 0) -> Tensor:
    return 0.5 * normal(count, 1, 8, 8, seed=seed).float()


def classes(count: int, dim: int = 3) -> Tensor:
    return torch.eye(dim)[torch.arange(count) % dim]


def trig_unet(seed: int = 0, head: bool = False, **kwargs) -> TrigFlowNetwork:
    """A small DDPM++ on the TrigFlow path, with random weights."""
    edm = small_unet(seed, **kwargs)
    logvar = randomised(LogVariance(channels=8), seed) if head else None
    return TrigFlowNetwork(edm.model, logvar_head=logvar)


class TrigOf(Network):
    """A function (x, t) -> F as a network, times a weight of 1."""

    predicts, sigma_data = "trigflow", SD

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t, s=None, cond=None, augment=None, guidance=None):
        return self.scale * self.function(x, t)


# The exact map: g vanishes


def f_star_of_assumed_std(x: Tensor, t: Tensor) -> Tensor:
    """For N(0, sd^2), whose map is the identity."""
    return -expand(torch.tan(t / 2), x) * x / SD


def f_star_of_gaussian(mean: float, std: float) -> Function:
    """F of f(x, t) = mean + S C^(-1/2) (x - cos(t) mean), C = cos^2 S^2 + sin^2 sd^2."""

    def f_star(x: Tensor, t: Tensor) -> Tensor:
        cos, sin = expand(torch.cos(t), x), expand(torch.sin(t), x)
        gain = std * (cos**2 * std**2 + sin**2 * SD**2) ** -0.5
        f = mean + gain * (x - cos * mean)
        return (cos * x - f) / (sin * SD)

    return f_star


EXACT = {
    "assumed std": (Gaussian.isotropic(SD), f_star_of_assumed_std),
    "narrow": (Gaussian.isotropic(0.2, mean=0.3), f_star_of_gaussian(0.3, 0.2)),
    "wide": (Gaussian.isotropic(1.5, mean=-0.4), f_star_of_gaussian(-0.4, 1.5)),
}
each_exact = pytest.mark.parametrize("name", EXACT)


def states(oracle: Gaussian, seed: int = 0) -> tuple[Tensor, Tensor]:
    """States [6, 3] at the noise levels SIGMAS, and their times."""
    t = PATH.t_of_nsr(SIGMAS)
    x0 = oracle.sample((len(t), 3), torch.Generator().manual_seed(seed))
    return PATH.interpolate(x0, normal(len(t), 3, seed=1), t), t


@each_exact
@each_engine
@pytest.mark.parametrize("r", [0.0, 0.4, 1.0])
def test_tangent_of_the_exact_map(name, engine, r):
    """With the marginal velocity, g = 0 at full warm-up."""
    oracle, f_star = EXACT[name]
    x, t = states(oracle)
    v = oracle.on(PATH).velocity(x, t)
    method = dataclasses.replace(SCT, engine=engine)
    out, change = method.derivative(f_star, x, t, v, v)
    g = method.tangent(out, change, x, t, v, r)
    if r == 1:
        assert g.abs().max() < 1e-12
    elif name == "assumed std":  # v = 0, and what is left of -cos^2 sd F is no 0
        expected = -(1 - r) * scaled(torch.cos(t) ** 2, SD * out)
        torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-12)


@each_exact
def test_distillation_of_the_exact_map_has_no_loss(name):
    oracle, f_star = EXACT[name]
    net, teacher = TrigOf(f_star), DenoiserOf(oracle.denoiser)
    batch = random_batch(oracle.sample((64, 3), torch.Generator().manual_seed(0)))
    loss = SCD.loss(Networks(net, {"teacher": teacher}), batch, now())
    assert loss.per_sample.dtype == torch.float64
    assert loss.per_sample.sqrt().max() < 1e-10
    loss.per_sample.mean().backward()
    assert abs(net.scale.grad.item()) < 1e-10
    # A map that is 1 % off has a loss.
    with torch.no_grad():
        net.scale.mul_(1.01)
    off = SCD.loss(Networks(net, {"teacher": teacher}), batch, now())
    assert off.per_sample.min() > 1e-12


@each_exact
def test_training_on_samples_is_unbiased(name):
    """Given x, g is affine in the sample's own velocity, so it is 0 on average."""
    oracle, f_star = EXACT[name]
    x, t = states(oracle)
    mean = oracle.on(PATH).denoiser(x, t)
    s2, sigma2 = oracle.cov, SIGMAS**2
    spread = expand((s2 * sigma2 / (s2 + sigma2)).sqrt(), x)  # of x0 given x
    tangents = []
    for x0 in (mean + spread, mean - spread):
        eps = PATH.noise_from_denoised(x, x0, t)
        v = PATH.velocity(x0, eps, t)
        out, change = SCT.derivative(f_star, x, t, v, v)
        tangents.append(SCT.tangent(out, change, x, t, v, 1.0))
    assert tangents[0].abs().max() > 0.01
    assert (tangents[0] + tangents[1]).abs().max() < 1e-11


def test_tangent_of_the_exact_map_of_correlated_data():
    root = normal(3, 3, seed=1) / 2
    oracle = Gaussian(mean=normal(3, seed=2), cov=root @ root.T)
    variances, basis = torch.linalg.eigh(oracle.cov)

    def f_star(x: Tensor, t: Tensor) -> Tensor:
        cos, sin = expand(torch.cos(t), x), expand(torch.sin(t), x)
        gain = (variances / (cos**2 * variances + sin**2 * SD**2)) ** 0.5
        f = oracle.mean + (gain * ((x - cos * oracle.mean) @ basis)) @ basis.T
        return (cos * x - f) / (sin * SD)

    x, t = states(oracle)
    v = oracle.on(PATH).velocity(x, t)
    out, change = SCT.derivative(f_star, x, t, v, v)
    assert SCT.tangent(out, change, x, t, v, 1.0).abs().max() < 1e-11


def test_tangent_of_the_exact_map_of_a_mixture():
    """By finite differences along the path: its map has no formula."""
    weights, means, stds = f64(0.3, 0.7), f64(-0.5, 0.4), f64(0.4, 0.3)
    exact = Mixture1D(weights, means, stds, PATH)
    velocity = Mixture.isotropic(weights, means[:, None], stds).on(PATH).velocity

    def f_star(x: Tensor, t: Tensor) -> Tensor:
        f = exact.flow_map(x, t, 0 * t)
        return (expand(torch.cos(t), x) * x - f) / expand(SD * torch.sin(t), x)

    t = PATH.t_of_nsr(f64(0.05, 0.3, 0.8, 3.0, 20.0))
    x = 0.6 * normal(5, 1)
    v = velocity(x, t)
    sizes = []
    for step in (2e-2, 1e-2):
        method = dataclasses.replace(SCT, engine=PathDifference(step=step))
        out, change = method.derivative(f_star, x, t, v, v)
        sizes.append(method.tangent(out, change, x, t, v, 1.0).abs().max().item())
    assert sizes[1] < 1e-4
    assert sizes[0] / sizes[1] == pytest.approx(4, rel=0.1)


# The map and the path


@pytest.mark.parametrize("time", ["angle", "log_sigma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_network_keeps_the_boundary_bitwise(time, dtype):
    net = TrigFlowNetwork(trig_unet().model, time=time).to(dtype)
    x, zero = images(4).to(dtype), torch.zeros(4, dtype=torch.float64)
    out = SCT.flow_map(net, x, zero, zero)
    assert out.dtype == dtype
    assert torch.equal(out, x)


def test_the_path_ends_at_sigma_80():
    assert SCT.path == PATH
    assert SCT.path.t_max == pytest.approx(1.5645464, abs=5e-8)
    assert SCT.path.t_max == math.atan(160)
    assert SCT.s_min == 0
    assert SCT.needs == frozenset()
    assert SCT.expects == "trigflow"


def test_the_map_is_edm_with_the_same_model():
    """f_EDM(x, sigma) = f(x cos t, t), with F minus the raw output of EDM."""
    edm = small_unet().double()
    trig = TrigFlowNetwork(edm.model, time="log_sigma")
    t, x = PATH.t_of_nsr(SIGMAS), expand(1 + SIGMAS, images(6)) * images(6).double()
    with torch.no_grad():
        wanted = consistency_from_denoiser(x, edm(x, SIGMAS), SIGMAS, 0.0, SD)
        found = SCT.flow_map(trig, scaled(torch.cos(t), x), t, 0 * t)
        raw = edm.raw(scaled((SIGMAS**2 + SD**2).rsqrt(), x), SIGMAS, None, None, None, None)
        torch.testing.assert_close(trig(scaled(torch.cos(t), x), t), -raw, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_flow_map_knows_one_end_time():
    with pytest.raises(ConfigError, match=r"jumps to s = 0 only, \[0.0, 0.5\] given"):
        SCT.flow_map(trig_unet(), images(2), f64(1.0, 1.0), f64(0.0, 0.5))


def test_rounds_of_jump_and_noise_keep_the_exact_law():
    """Two steps through t = 1.1 as in the paper: data of N(0, S^2) again, whatever S."""
    std, seeds = 0.2, range(4000)
    net, noise = TrigOf(f_star_of_gaussian(0.0, std)), SampleNoise(seeds)

    def draw() -> Tensor:
        return noise.normal((1,))

    def flow_map(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        with torch.no_grad():
            return SCT.flow_map(net, x, t, s)

    start = prior(draw(), SCT.path, SCT.path.t_max)
    one = multistep(flow_map, start, (SCT.path.t_max,), draw, SCT.path, 0.0)
    again = draw()
    two = flow_map(math.cos(1.1) * one + math.sin(1.1) * SD * again, f64(1.1).expand(4000), f64(0))
    noise = SampleNoise(seeds)
    start = prior(draw(), SCT.path, SCT.path.t_max)
    both = SCT.sample(flow_map, start, (SCT.path.t_max, 1.1), draw)
    torch.testing.assert_close(both, two, rtol=1e-12, atol=1e-12)
    for sample in (one, two):
        assert sample.std().item() == pytest.approx(std, rel=0.04)


# The tangent


@each_engine
@pytest.mark.parametrize("time", ["angle", "log_sigma"])
def test_scaled_derivative(engine, time):
    """Scaling the direction by cos sin scales the derivative, and spares a division."""
    net = TrigFlowNetwork(trig_unet().model, time=time).double()
    x, t, v = images(6).double(), PATH.t_of_nsr(SIGMAS), normal(6, 1, 8, 8)

    def f(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = net(x, t)
        return out

    out, change = dataclasses.replace(SCT, engine=engine).derivative(f, x, t, v, v)
    _, plain = value_and_jvp(f, (x, t), (v, torch.ones_like(t)), engine)
    both = torch.cos(t) * torch.sin(t)
    torch.testing.assert_close(change, scaled(both, plain), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out, f(x, t), rtol=1e-12, atol=1e-12)
    assert out.requires_grad
    assert not change.requires_grad


def derivatives(method: SCM, dtype: torch.dtype = torch.float64) -> Tensor:
    net = trig_unet(dropout=0.5).train().to(dtype)
    x, t, v = images(5).to(dtype), PATH.t_of_nsr(SIGMAS[1:]), normal(5, 1, 8, 8).to(dtype)

    def f(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = net(x, t)
        return out

    with isolated_rng(7, "cpu"):
        out, change = method.derivative(f, x, t, v, v)
        following = torch.rand(4)
    with isolated_rng(7, "cpu"):
        assert torch.allclose(f(x, t), out, rtol=1e-5, atol=1e-6)
        assert torch.equal(torch.rand(4), following)  # the stream went on as after one pass
    with isolated_rng(8, "cpu"):
        assert not torch.allclose(f(x, t), out, rtol=1e-2)  # dropout is at work
    return change.double()


DIFFERENCES = {
    torch.float64: (1e-4, 1e-7),
    torch.float32: (1e-2, 1e-3),
}


@each_engine
@pytest.mark.parametrize("dtype", DIFFERENCES)
def test_derivative_with_dropout_is_that_of_the_masked_network(engine, dtype):
    """The same masks in value and derivative, and in each pass of finite differences."""
    step, tolerance = DIFFERENCES[dtype]
    exact = derivatives(dataclasses.replace(SCT, engine=engine), dtype)
    central = dataclasses.replace(SCT, engine=PathDifference(step=step))
    assert (derivatives(central, dtype) - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize(("scheme", "order"), [("central", 2), ("backward", 1)])
def test_order_of_differences(scheme, order):
    exact = derivatives(SCT)
    errors = []
    for step in (2e-2, 1e-2):
        engine = PathDifference(step=step, scheme=scheme)
        change = derivatives(dataclasses.replace(SCT, engine=engine))
        errors.append((change - exact).norm() / exact.norm())
    assert errors[1] < 0.02
    assert (errors[0] / errors[1]).item() == pytest.approx(2**order, rel=0.15)


def test_differences_are_named_where_the_method_is():
    assert SCT.title == "SCM"
    named = {
        PathDifference(): "SCM, finite differences (central, h=0.001 t)",
        PathDifference(scheme="backward", step=1e-4, follow="sample"): (
            "SCM, finite differences (backward, along the sample, h=0.0001 t)"
        ),
    }
    for engine, title in named.items():
        assert dataclasses.replace(SCT, engine=engine).title == title


def test_differences_follow_the_velocity_or_the_sample():
    net = trig_unet().double()
    x, t = images(6).double(), PATH.t_of_nsr(SIGMAS)
    v, line = normal(6, 1, 8, 8), normal(6, 1, 8, 8, seed=1)

    def change(engine, v: Tensor) -> Tensor:
        def f(x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = net(x, t)
            return out

        return dataclasses.replace(SCT, engine=engine).derivative(f, x, t, v, line)[1]

    for follow, direction in (("velocity", v), ("sample", line)):
        found = change(PathDifference(step=1e-4, follow=follow), v)
        wanted = change(Pairs(), direction)
        assert (found - wanted).norm() < 1e-6 * wanted.norm()
    assert (change(Pairs(), v) - change(Pairs(), line)).norm() > 0.1 * change(Pairs(), v).norm()


def test_differences_move_along_the_samples_line():
    """x(t + h) has the same x0 and z, and t + h stays inside the path's range."""
    x0, eps = images(7).double(), normal(7, 1, 8, 8)
    t = PATH.t_of_nsr(torch.cat([SIGMAS, f64(1e6)]))
    x, v = PATH.interpolate(x0, eps, t), PATH.velocity(x0, eps, t)
    seen = []

    def f(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return x

    PathDifference(step=1e-2)(f, x, t, v, v)
    assert len(seen) == 3
    for at, u in seen:
        torch.testing.assert_close(at, PATH.interpolate(x0, eps, u), rtol=1e-12, atol=1e-12)
        assert (u > 0).all()
        assert (u < math.pi / 2).all()
    seen.clear()
    PathDifference(step=1e-2, scheme="backward")(f, x, t, v, v)
    assert [bool((u <= t).all()) for _, u in seen] == [True, True]


@pytest.mark.parametrize("step", [0.0, 1.0, -1e-3])
def test_impossible_steps_are_refused(step):
    with pytest.raises(ConfigError, match=f"PathDifference.step: {step} given, accepted: between"):
        PathDifference(step=step)


def test_without_the_warm_up_it_denoises():
    """r = 0: F is pulled to the velocity, dx/dt = sd F at rest; r rises linearly."""
    net = trig_unet().double()
    x0, eps = images(6).double(), normal(6, 1, 8, 8)
    t = PATH.t_of_nsr(SIGMAS)
    x, v = PATH.interpolate(x0, eps, t), PATH.velocity(x0, eps, t)
    with torch.no_grad():
        out = net(x, t)
    change = normal(6, 1, 8, 8, seed=3)
    g = [SCT.tangent(out, change, x, t, v, r) for r in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(g[0], -scaled(torch.cos(t) ** 2, SD * out - v))
    torch.testing.assert_close(g[1], (g[0] + g[2]) / 2)
    assert SCT.tangent(v / SD, change, x, t, v, 0.0).abs().max() < 1e-15
    warm = dataclasses.replace(AT_TIMES, warmup=LinearRamp(steps=4))
    batch = stored_batch(x0, eps, levels=SIGMAS)
    for step, r in ((0, 0.0), (2, 0.5), (4, 1.0), (9, 1.0)):
        loss = warm.loss(Networks(net), batch, dataclasses.replace(now(), step=step))
        exact = SCT.derivative(lambda x, t: net(x, t), x, t, v, v)
        wanted = SCT.limited(SCT.tangent(*exact, x, t, v, r)).flatten(1).square().mean(1)
        torch.testing.assert_close(loss.per_sample, wanted, rtol=1e-9, atol=1e-12)
    assert SCM().warmup == LinearRamp(steps=10_000)


# The limit of g, and the loss


def test_limits():
    g = 10.0 ** torch.arange(-3, 4)[:, None] * normal(7, 12)
    norms = g.norm(dim=1, keepdim=True)
    limited = SCT.limited(g)
    torch.testing.assert_close(limited, g / (norms + 0.1))
    assert (limited.norm(dim=1) < 1).all()
    rms = dataclasses.replace(SCT, limit="rms", c=0.3).limited(g)
    torch.testing.assert_close(rms, g / (norms / 12**0.5 + 0.3))
    clamped = dataclasses.replace(SCT, limit="clamp").limited(g)
    assert torch.equal(clamped, g.clip(-1, 1))
    assert torch.isfinite(SCT.limited(torch.zeros(1, 12))).all()


def unet_batch(count: int = 6):
    return stored_batch(
        images(count).double(), normal(count, 1, 8, 8, seed=4), levels=SIGMAS[:count]
    )


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("average", ["mean", "mean/d"])
def test_loss_and_its_gradient(head, average):
    """At F = sg(F): dL/dF = -2 w e^-u g / d and L = w e^-u ||g||^2 / d + u."""
    net, batch = trig_unet(head=head).double(), unet_batch()
    outputs: list[Tensor] = []

    class Output(TrigFlowNetwork):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            if isinstance(out, Tensor) and out.requires_grad and type(out) is Tensor:
                out.retain_grad()
                outputs.append(out)
            return out

    net = Output(net.model, logvar_head=net.logvar_head)
    method = dataclasses.replace(
        AT_TIMES, weight=InverseSigma(power=1.0), average=average, engine=PathDifference()
    )
    loss = method.loss(Networks(net), batch, now())
    loss.per_sample.sum().backward()
    (out,) = outputs
    t = PATH.t_of_nsr(SIGMAS)
    x, v = (
        PATH.interpolate(batch.x, batch.draws.eps, t),
        PATH.velocity(batch.x, batch.draws.eps, t),
    )
    with torch.no_grad():
        _, change = method.derivative(lambda x, t: net(x, t), x, t, v, v)
        g = method.limited(method.tangent(out, change, x, t, v, 1.0))
        u = net.logvar(t).double() if head else torch.zeros_like(t)
    weight = torch.exp(-u) / SIGMAS / (64 if average == "mean/d" else 1)
    torch.testing.assert_close(out.grad, scaled(-2 * weight / 64, g), rtol=1e-9, atol=1e-15)
    wanted = weight * g.flatten(1).square().mean(1) + u
    torch.testing.assert_close(loss.per_sample, wanted, rtol=1e-9, atol=1e-15)


@each_engine
def test_gradient_is_that_of_a_regression(engine):
    """Only the ordinary pass is differentiated, towards the constant F + g."""
    net, batch = trig_unet().double(), unet_batch()
    method = dataclasses.replace(AT_TIMES, engine=engine)
    method.loss(Networks(net), batch, now()).per_sample.mean().backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters()}
    t = PATH.t_of_nsr(SIGMAS)
    x, v = (
        PATH.interpolate(batch.x, batch.draws.eps, t),
        PATH.velocity(batch.x, batch.draws.eps, t),
    )
    out, change = method.derivative(lambda x, t: net(x, t), x, t, v, v)
    target = (out + method.limited(method.tangent(out, change, x, t, v, 1.0))).detach()
    net.zero_grad()
    (net(x, t) - target).flatten(1).square().mean(1).mean().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-8, atol=1e-12)


def test_log_variance_head():
    """Its optimum is the logarithm of the weighted mean square, where the loss is 1 + u."""
    net, batch = trig_unet(), unet_batch()

    class Level(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u = nn.Parameter(torch.zeros(6, dtype=torch.float64))

        def forward(self, c_noise: Tensor) -> Tensor:
            return self.u + 0 * c_noise

        def after_step(self) -> None:
            pass

    plain = AT_TIMES.loss(Networks(net.double()), batch, now()).per_sample.detach()
    head = Level()
    student = TrigFlowNetwork(net.model, logvar_head=head)
    loss = AT_TIMES.loss(Networks(student), batch, now())
    torch.testing.assert_close(loss.per_sample, plain, rtol=1e-12, atol=0)
    loss.per_sample.sum().backward()
    torch.testing.assert_close(head.u.grad, 1 - plain)
    with torch.no_grad():
        head.u.copy_(plain.log())
    head.zero_grad()
    loss = AT_TIMES.loss(Networks(student), batch, now())
    torch.testing.assert_close(loss.per_sample, 1 + plain.log())
    loss.per_sample.sum().backward()
    assert head.u.grad.abs().max() < 1e-12
    torch.testing.assert_close(loss.metrics["logvar"], plain.log().mean())


def test_weight_multiplies_the_square_alone():
    net, batch = trig_unet(head=True).double(), unet_batch()
    weighted = dataclasses.replace(AT_TIMES, weight=InverseSigma(power=1.0))
    with torch.no_grad():
        u = net.logvar(PATH.t_of_nsr(SIGMAS)).double()
        one = AT_TIMES.loss(Networks(net), batch, now()).per_sample - u
        other = weighted.loss(Networks(net), batch, now()).per_sample - u
    torch.testing.assert_close(other, one / SIGMAS, rtol=1e-8, atol=1e-12)


# Teachers


def velocity_seen(method: SCM, nets: Networks, batch) -> Tensor:
    """The direction that the derivative is taken in, over cos sin."""
    seen: list[Tensor] = []

    class Spy(SCM):
        def derivative(self, f, x, t, dxdt, line):
            seen.append(dxdt)
            return super().derivative(f, x, t, dxdt, line)

    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(SCM)}
    Spy(**fields).loss(nets, batch, now())
    return seen[0]


def test_velocity_of_each_kind_of_teacher():
    """sd F of a TrigFlow network, and the same of an EDM denoiser with the same model."""
    trig = TrigFlowNetwork(trig_unet(seed=2).model, time="log_sigma").double()
    edm = EDMDenoiser(trig.model)
    batch, method = unet_batch(), dataclasses.replace(SCD, times=AsDrawn())
    t = PATH.t_of_nsr(SIGMAS)
    x = PATH.interpolate(batch.x, batch.draws.eps, t)
    with torch.no_grad():
        wanted = SD * trig(x, t)
    for teacher in (trig, edm):
        nets = Networks(trig_unet().double(), {"teacher": teacher})
        found = velocity_seen(method, nets, batch)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    none = velocity_seen(AT_TIMES, Networks(trig_unet().double()), batch)
    torch.testing.assert_close(none, PATH.velocity(batch.x, batch.draws.eps, t))


def test_teacher_guidance():
    """v_u + w (v_c - v_u); a row without class is left alone."""
    cond = torch.cat([classes(5), torch.zeros(1, 3)]).double()
    batch = dataclasses.replace(unet_batch(), cond=cond)
    teacher = trig_unet(seed=2, cond_dim=3).double()
    seen = {}
    for w in (0.0, 1.0, 3.0):
        method = dataclasses.replace(SCD, times=AsDrawn())
        method = dataclasses.replace(method, teacher=Teacher(source=ANY_SOURCE, guidance=w))
        nets = Networks(trig_unet(cond_dim=3).double(), {"teacher": teacher})
        seen[w] = velocity_seen(method, nets, batch)
    torch.testing.assert_close(seen[3.0], seen[0.0] + 3 * (seen[1.0] - seen[0.0]))
    assert not torch.allclose(seen[3.0][:5], seen[1.0][:5])
    torch.testing.assert_close(seen[3.0][5], seen[1.0][5])


def test_only_the_student_is_differentiated():
    student, teacher = trig_unet(head=True), small_unet(seed=2)
    batch = random_batch(images(4).requires_grad_())
    nets = Networks(student, {"teacher": teacher})
    SCD.loss(nets, batch, now()).per_sample.mean().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert SCT.companions() == {}
    assert SCD.companions() == {"teacher": ANY_SOURCE}


def test_networks_that_do_not_fit_are_refused():
    other = TrigFlowNetwork(trig_unet().model, sigma_data=1.0)
    with pytest.raises(ConfigError, match=r"method.sigma_data: 0.5 given, accepted: 1.0"):
        SCT.check(Networks(other))
    SCT.check(Networks(trig_unet()))
    with pytest.raises(ConfigError, match="cond_dim 0 given, accepted: 3"):
        SCD.check(Networks(trig_unet(cond_dim=3), {"teacher": small_unet()}))
    SCD.check(Networks(trig_unet(), {"teacher": small_unet()}))
    with pytest.raises(ConfigError, match="SCM.c: 0.0 given"):
        SCM(c=0.0)
    with pytest.raises(ConfigError, match="sigma_max=-1.0 given"):
        SCM(sigma_max=-1.0)


# Networks and precisions


def test_edm2_with_forced_weight_normalisation():
    """The loss reads the weights as they are; after_step() puts them back."""
    net = TrigFlowNetwork(
        randomised(small_edm2(dropout=0.3), std=1.0), time="log_sigma", logvar_head=LogVariance(6)
    ).train()
    net.after_step()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    loss = SCT.loss(Networks(net), random_batch(normal(4, 2, 8, 8).float()), now())
    loss.per_sample.mean().backward()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert all(p.grad is not None for p in net.parameters())
    torch.optim.SGD(net.parameters(), lr=1e5).step()
    weight, wanted = net.model.out_conv.weight, before["model.out_conv.weight"]
    assert not torch.allclose(weight.norm(), wanted.norm(), rtol=0.1)
    net.after_step()
    torch.testing.assert_close(weight.norm(), wanted.norm(), rtol=1e-3, atol=0)
    assert not torch.allclose(weight, wanted, rtol=0.1)


@pytest.mark.parametrize("time", ["angle", "log_sigma"])
@pytest.mark.parametrize("method", [SCT, SCD], ids=["sct", "scd"])
def test_nothing_overflows_near_the_ends(time, method):
    levels = f64(1e-4, 1e-3, 1.0, 1e3, 1e6)
    method = dataclasses.replace(method, times=AsDrawn())
    batch = stored_batch(images(5), normal(5, 1, 8, 8).float(), levels=levels)
    student = TrigFlowNetwork(trig_unet().model, time=time)
    loss = method.loss(Networks(student, {"teacher": small_unet(2)}), batch, now())
    assert torch.isfinite(loss.per_sample).all()
    loss.per_sample.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())
    double = stored_batch(batch.x.double(), batch.draws.eps.double(), levels=levels)
    nets = Networks(student.double(), {"teacher": small_unet(2).double()})
    exact = method.loss(nets, double, now())
    torch.testing.assert_close(loss.per_sample.double(), exact.per_sample, rtol=2e-3, atol=1e-6)


def labelled_nets(dropout: float = 0.0) -> Networks:
    student = trig_unet(head=True, cond_dim=3, dropout=dropout)
    return Networks(student, {"teacher": small_unet(2, cond_dim=3)})


GUIDED = dataclasses.replace(SCD, teacher=Teacher(source=ANY_SOURCE, guidance=2.0))
VARIANTS = {
    "sct": SCT,
    "scd": GUIDED,
    "fastgen": dataclasses.replace(
        SCT, limit="rms", average="mean/d", weight=InverseSigma(power=1.0), engine=PathDifference()
    ),
}
each_variant = pytest.mark.parametrize("method", VARIANTS.values(), ids=VARIANTS.keys())


@each_variant
def test_autocast_and_dropout_run_through(method):
    nets, batch = labelled_nets(dropout=0.2), random_batch(images(8), cond=classes(8))
    if isinstance(method.engine, PathDifference):  # no difference of bfloat16 numbers is that fine
        method = dataclasses.replace(method, engine=PathDifference(step=0.1))
    nets.student.train()
    with isolated_rng(3, "cpu"):
        plain = method.loss(nets, batch, now())
    with isolated_rng(3, "cpu"), torch.autocast("cpu", torch.bfloat16):
        loss = method.loss(nets, batch, now())
    assert loss.per_sample.dtype == torch.float32
    assert torch.equal(loss.times, plain.times)
    assert not torch.equal(loss.per_sample, plain.per_sample)
    torch.testing.assert_close(loss.per_sample, plain.per_sample, rtol=0.2, atol=1e-3)
    loss.per_sample.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in nets.student.parameters())


@each_variant
def test_the_same_draws_give_the_same_loss(method):
    nets, x, cond = labelled_nets(), images(8), classes(8)
    first = method.loss(nets, random_batch(x, cond=cond), now())
    again = method.loss(nets, random_batch(x, cond=cond), now())
    later = method.loss(nets, random_batch(x, step=1, cond=cond), now())
    assert torch.equal(first.per_sample, again.per_sample)
    assert not torch.equal(first.times, later.times)
    assert first.per_sample.shape == first.times.shape == (8,)
    assert first.per_sample.dtype == torch.float32
    assert first.times.dtype == torch.float64
    assert ((first.times > 0) & (first.times < math.pi / 2)).all()
    assert set(first.metrics) == {"tangent", "logvar"}
    assert not any(value.requires_grad for value in first.metrics.values())
    assert all(value.ndim == 0 for value in first.metrics.values())


@each_variant
def test_a_loss_depends_on_its_own_sample(method):
    nets, x, cond = labelled_nets(), images(4), classes(4)
    together = method.loss(nets, random_batch(x, cond=cond), now())
    alone = [method.loss(nets, part, now()) for part in random_batch(x, cond=cond).split(1)]
    assert torch.equal(torch.cat([loss.times for loss in alone]), together.times)
    # PathDifference divides the rounding of float32 by its step.
    tolerance = 1e-2 if isinstance(method.engine, PathDifference) else 1e-4
    torch.testing.assert_close(
        torch.cat([loss.per_sample for loss in alone]),
        together.per_sample,
        rtol=tolerance,
        atol=1e-5,
    )


def test_conditions_reach_the_student():
    net, cond = trig_unet(cond_dim=3), classes(3)
    given = SCT.loss(Networks(net), random_batch(images(3), cond=cond), now())
    without = SCT.loss(Networks(net), random_batch(images(3)), now())
    assert not torch.allclose(given.per_sample, without.per_sample)
    model = SongUNet(
        resolution=8,
        in_channels=1,
        out_channels=1,
        channels=8,
        channel_mult=(1,),
        num_blocks=1,
        attn_resolutions=(),
        augment_dim=2,
    )
    net = randomised(TrigFlowNetwork(model))
    batch = random_batch(images(3))
    augmented = dataclasses.replace(batch, augment=torch.ones(3, 2))
    losses = [SCT.loss(Networks(net), b, now()).per_sample for b in (batch, augmented)]
    assert not torch.allclose(*losses)


# Training


@pytest.mark.parametrize("teacher", [False, True], ids=["sct", "scd"])
def test_training_comes_near_the_exact_map(teacher):
    """The one-step map from noise, on data N((0.3, -0.2), diag(0.5, 0.25)^2)."""
    oracle = Gaussian(mean=f64(0.3, -0.2), cov=torch.diag(f64(0.5, 0.25) ** 2))
    torch.manual_seed(0)
    net = TrigFlowNetwork(ToyMLP(width=32, depth=1), logvar_head=LogVariance(8))
    net.after_step()
    steps, size, lr = 250, 256, 3e-3
    method = SCM(
        times=LogNormal(mean=-0.6, std=1.4),
        warmup=LinearRamp(steps=50),
        teacher=Teacher(source=ANY_SOURCE) if teacher else None,
    )
    nets = Networks(net, {"teacher": DenoiserOf(lambda x, t: oracle.denoiser(x, t).float())})
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    x0, eps = normal(steps, size, 2), normal(steps, size, 2, seed=1).float()
    x0 = (oracle.mean + x0 * f64(0.5, 0.25)).float()
    levels = torch.special.ndtr(normal(steps, size, seed=2))
    t = torch.full((256,), PATH.t_max, dtype=torch.float64)
    x = scaled(PATH.b(t), normal(256, 2, seed=3))
    exact = oracle.on(PATH).flow_map(x, t, 0 * t)

    def error() -> float:
        with torch.no_grad():
            found = method.flow_map(net, x.float(), t, 0 * t)
        return (found - exact).square().mean().item()

    untrained, losses = error(), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        batch = stored_batch(x0[step], eps[step], levels=levels[step])
        moment = dataclasses.replace(now(), step=step, total_steps=steps)
        loss = method.loss(nets, batch, moment).per_sample.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.after_step()
        losses.append(loss.item())
    assert untrained > 0.1
    assert error() < 0.02
    assert sum(losses[-20:]) < sum(losses[:20])
