"""Teachers: guidance formulas, any network on any path, flow matching, what does not fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from consistency_fakes import (
    AsDrawn,
    Recording,
    f64,
    now,
    quadrature,
    random_batch,
    randomised,
    small_unet,
    stored_batch,
)
from fastflow.consistency import Euler, Heun, RatioPairing
from fastflow.errors import ConfigError
from fastflow.generate import default_times, generate
from fastflow.method import FlowMapMethod, Frozen, Networks
from fastflow.network import Network
from fastflow.oracle import Gaussian
from fastflow.path import VE, Linear, Path, TrigFlow, scaled
from fastflow.rng import SampleNoise
from fastflow.sampling import ode_euler
from fastflow.schedules import ConstantRatio, LinearRamp
from fastflow.tangent import Pairs, TangentEngine
from fastflow.teacher import Teacher, denoised_by, native_path
from fastflow.times import LogitNormal, Uniform
from fastflow.wrappers import EDMDenoiser, TrigFlowNetwork, VelocityNetwork
from mean_flow_fakes import given_times
from methods.cm import CM
from methods.ect import ECT
from methods.flow_matching import FlowMatching
from methods.mean_flow import MeanFlow
from methods.scm import SCM
from networks.mlp import ToyMLP

ANY_SOURCE = Frozen(weights="unused: tests hand the teacher over")
WEAKER = Frozen(weights="unused: tests hand the guide over")


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


# Guidance


def class_nets() -> Networks:
    student, teacher, guide = (small_unet(seed, cond_dim=3).double() for seed in range(3))
    return Networks(student, {"teacher": teacher, "guide": guide})


NETS = class_nets()
X = normal(4, 1, 8, 8)
T = f64(0.05, 0.7, 4.0, 60.0)
COND = torch.cat([torch.eye(3), torch.zeros(1, 3)]).double()


@torch.no_grad()
def asked(name: str, cond: Tensor | None = COND) -> Tensor:
    return NETS[name](X, T, cond=cond)


@pytest.mark.parametrize("w", [0.0, 0.5, 2.0, 7.5])
def test_classifier_free_guidance(w):
    """D_u + w (D_c - D_u); a row without a class is left alone."""
    out = Teacher(source=ANY_SOURCE, guidance=w).denoiser(NETS, VE(), COND)(X, T)
    without, given = asked("teacher", torch.zeros_like(COND)), asked("teacher")
    torch.testing.assert_close(out, without + w * (given - without), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[3], given[3], rtol=1e-12, atol=1e-12)
    if w == 0:
        torch.testing.assert_close(out, without, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("w", [0.0, 0.5, 2.0])
def test_autoguidance(w):
    """D_weak + w (D - D_weak), both with the class."""
    teacher = Teacher(source=ANY_SOURCE, guidance=w, guide=WEAKER)
    out = teacher.denoiser(NETS, VE(), COND)(X, T)
    weak, strong = asked("guide"), asked("teacher")
    torch.testing.assert_close(out, weak + w * (strong - weak), rtol=1e-12, atol=1e-12)
    unconditional = teacher.denoiser(NETS, VE(), None)(X, T)
    weak, strong = asked("guide", None), asked("teacher", None)
    torch.testing.assert_close(unconditional, weak + w * (strong - weak), rtol=1e-12, atol=1e-12)


def test_guidance_1_is_the_conditional_model_itself():
    teacher = Recording(NETS["teacher"])
    nets = Networks(NETS.student, {"teacher": teacher})
    out = Teacher(source=ANY_SOURCE).denoiser(nets, VE(), COND)(X, T)
    assert torch.equal(out, asked("teacher"))
    (call,) = teacher.calls
    assert torch.equal(call["cond"], COND)
    assert not out.requires_grad


@pytest.mark.parametrize("teacher", [{}, {"guidance": 3.0}, {"guidance": 3.0, "guide": WEAKER}])
def test_a_teacher_leaves_no_graph(teacher):
    x = X.clone().requires_grad_()
    out = Teacher(source=ANY_SOURCE, **teacher).denoiser(NETS, VE(), COND)(x, T)
    assert not out.requires_grad


@pytest.mark.parametrize("path", [Linear(), TrigFlow(sigma_data=0.5), TrigFlow(sigma_data=1.0)])
def test_guidance_is_linear_on_every_path(path):
    """Guided D, v and E agree, as they are linear in each other."""
    w, t = 3.0, path.t_of_nsr(T)
    x, _ = VE().convert(X, T, path)
    ones = [Teacher(source=ANY_SOURCE, guidance=g).denoiser(NETS, path, COND) for g in (0, 1, w)]
    v = [path.velocity_from_denoised(x, d(x, t), t) for d in ones]
    torch.testing.assert_close(v[2], v[0] + w * (v[1] - v[0]), rtol=1e-10, atol=1e-10)


# Any network on any path


ORACLE = Gaussian.isotropic(0.5, mean=0.2)
PATHS: list[Path] = [VE(), Linear(), TrigFlow(sigma_data=0.5), TrigFlow(sigma_data=1.3)]


class OnPath(Network):
    """The exact model of Gaussian data, predicting what its path calls for."""

    sample_shape = (3,)

    def __init__(self, predicts: str, path: Path, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.predicts, self.path, self.sigma_data = predicts, path, sigma_data

    def forward(self, x, t, s=None, cond=None, augment=None, guidance=None):
        u, sigma = self.path.convert(x, t, VE())
        denoised = ORACLE.denoiser(u, sigma)
        if self.predicts == "denoiser":
            return denoised
        velocity = self.path.velocity_from_denoised(x, denoised, t)
        return velocity if self.predicts == "velocity" else velocity / self.sigma_data


KINDS = {
    "denoiser": OnPath("denoiser", VE()),
    "velocity": OnPath("velocity", Linear()),
    "trigflow": OnPath("trigflow", TrigFlow(sigma_data=0.5)),
    "trigflow 1.3": OnPath("trigflow", TrigFlow(sigma_data=1.3), sigma_data=1.3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "path", PATHS, ids=lambda p: f"{type(p).__name__}{p.nsr(f64(0.5)).item():.2f}"
)
def test_every_kind_denoises_on_every_path(kind, path):
    """To float64 precision the denoiser of the data, whatever it predicts and where it is asked."""
    sigma = f64(0.004, 0.3, 2.0, 40.0)
    x_ve = ORACLE.sample((4, 3), torch.Generator().manual_seed(0)) + scaled(sigma, normal(4, 3))
    x, t = VE().convert(x_ve, sigma, path)
    nets = Networks(KINDS[kind], {"teacher": KINDS[kind]})
    out = Teacher(source=ANY_SOURCE).denoiser(nets, path, None)(x, t)
    torch.testing.assert_close(out, ORACLE.denoiser(x_ve, sigma), rtol=1e-12, atol=1e-12)


def mlp(wrapper, **kwargs) -> Network:
    return randomised(wrapper(ToyMLP(data_dim=2, width=16, depth=1), **kwargs), std=0.5).double()


def test_a_velocity_teacher_on_the_ve_path():
    """sigma -> t = sigma/(1 + sigma), x -> x/(1 + sigma), D = x - t v there."""
    net, x, sigma = mlp(VelocityNetwork), normal(5, 2) * 3, f64(0.002, 0.1, 1.0, 9.0, 80.0)
    out = denoised_by(net, VE())(x, sigma)
    t = sigma / (1 + sigma)
    linear = x / (1 + sigma)[:, None]
    expected = linear - t[:, None] * net(linear, t)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_a_denoiser_teacher_on_the_linear_path():
    """t -> sigma = t/(1 - t), x -> x/(1 - t)."""
    net, x, t = mlp(EDMDenoiser), normal(5, 2), f64(0.002, 0.1, 0.5, 0.9, 0.9876543)
    out = denoised_by(net, Linear())(x, t)
    expected = net(x / (1 - t)[:, None], t / (1 - t))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    # The velocity it teaches there is (x - D)/t.
    velocity = Linear().velocity_from_denoised(x, out, t)
    torch.testing.assert_close(velocity, (x - expected) / t[:, None], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sd", [0.5, 1.0])
def test_a_denoiser_teacher_on_the_trigflow_path(sd):
    """t -> sigma = sd tan t, x -> x/cos t."""
    net, x, t = mlp(EDMDenoiser), normal(5, 2), f64(0.004, 0.3, 0.8, 1.3, 1.5645464)
    out = denoised_by(net, TrigFlow(sigma_data=sd))(x, t)
    expected = net(x / t.cos()[:, None], sd * t.tan())
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


def test_a_velocity_teacher_on_the_trigflow_path():
    """tan t = u/((1 - u) sd) and x_trig = x_fm sd/sqrt(sd^2 (1 - u)^2 + u^2)."""
    net, sd, u = mlp(VelocityNetwork), 0.5, f64(0.01, 0.4, 0.7, 0.99)
    x_fm = normal(4, 2)
    t = torch.atan(u / ((1 - u) * sd))
    x = x_fm * (sd / (sd**2 * (1 - u) ** 2 + u**2).sqrt())[:, None]
    out = denoised_by(net, TrigFlow(sigma_data=sd))(x, t)
    torch.testing.assert_close(out, x_fm - u[:, None] * net(x_fm, u), rtol=1e-11, atol=1e-11)


def test_a_trigflow_teacher_is_the_denoiser_of_the_same_model():
    """F = -model in TrigFlow, D = c_skip x + c_out model in EDM's units."""
    model = randomised(ToyMLP(data_dim=2, width=16, depth=1), std=0.5).double()
    trig = TrigFlowNetwork(model, sigma_data=0.5, time="log_sigma")
    plain = EDMDenoiser(model, sigma_data=0.5)
    x, sigma = normal(4, 2) * 2, f64(0.01, 0.5, 3.0, 70.0)
    torch.testing.assert_close(
        denoised_by(trig, VE())(x, sigma), plain(x, sigma), rtol=1e-11, atol=1e-11
    )


def test_a_network_on_its_own_path_is_asked_as_it_is():
    """Nothing is rounded on the way, and classes arrive."""
    net = Recording(small_unet(cond_dim=3))
    x, cond = normal(3, 1, 8, 8).float(), torch.eye(3)
    t = f64(0.3, 2.0, 20.0)
    out = denoised_by(net, VE(sigma_min=0.1, sigma_max=50.0), cond)(x, t)
    (call,) = net.calls
    assert call["x"] is x
    assert call["t"] is t
    assert torch.equal(call["cond"], cond)
    assert torch.equal(out, call["out"])


def test_paths_of_predictions():
    assert native_path(KINDS["denoiser"]) == VE()
    assert native_path(KINDS["velocity"]) == Linear()
    assert native_path(KINDS["trigflow 1.3"]) == TrigFlow(sigma_data=1.3)
    with pytest.raises(ConfigError, match="guide: predicts 'score', accepted: 'denoiser'"):
        native_path(OnPath("score", VE()), "guide")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("step", "error"), [(Euler(), 2e-2), (Heun(), 1e-3)])
def test_distillation_takes_any_kind_of_teacher(kind, step, error):
    """The step from t to r follows the ODE of the data, in EDM's units."""
    method = ECT(times=AsDrawn(), teacher=Teacher(source=ANY_SOURCE), step=step)
    student = Recording(KINDS["denoiser"])
    t = f64(2.0, 5.0, 50.0)
    batch = stored_batch(normal(3, 3), normal(3, 3, seed=1), t)
    method.loss(Networks(student, {"teacher": KINDS[kind]}), batch, now(ratio=0.99))
    online, target = student.calls
    exact = ORACLE.flow_map(online["x"], t, target["t"])
    moved = (exact - online["x"]).norm()
    assert (target["x"] - exact).norm() < error * moved


# Each kind of teacher with each kind of guidance, in each method that distils


LABELS, W = torch.eye(3, dtype=torch.float64)[[0, 2, 1, 0]], 2.5
WRAPPERS = {"EDM": EDMDenoiser, "flow matching": VelocityNetwork, "TrigFlow": TrigFlowNetwork}


def class_mlp(wrapper: Callable[..., Network], seed: int, **kwargs) -> Network:
    model = ToyMLP(data_dim=2, width=16, depth=1, cond_dim=3, **kwargs)
    return randomised(wrapper(model), seed, std=0.5).double()


def denoised_by_hand(net: Network, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
    """D of x0 + sigma eps by the formulas of each path, all written out."""
    if net.predicts == "denoiser":
        return net(x, sigma, cond=cond)
    if net.predicts == "velocity":
        t = sigma / (1 + sigma)
        linear = scaled(1 - t, x)
        return linear - scaled(t, net(linear, t, cond=cond))
    t = torch.atan(sigma / 0.5)
    turned = scaled(torch.cos(t), x)
    return scaled(torch.cos(t), turned) - scaled(torch.sin(t), 0.5 * net(turned, t, cond=cond))


def guided_by_hand(nets: Networks, auto: bool, x: Tensor, sigma: Tensor) -> Tensor:
    strong = denoised_by_hand(nets["teacher"], x, sigma, LABELS)
    if auto:
        weak = denoised_by_hand(nets["guide"], x, sigma, LABELS)
    else:
        weak = denoised_by_hand(nets["teacher"], x, sigma, torch.zeros_like(LABELS))
    return weak + W * (strong - weak)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Along(TangentEngine):
    """The exact derivative, whose direction is kept."""

    seen: list[Tensor] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        return "along"

    def __call__(self, f, primals, tangents):
        self.seen.append(tangents[0])
        return Pairs()(f, primals, tangents)


@pytest.mark.parametrize("auto", [False, True], ids=["classifier-free", "autoguidance"])
@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("name", ["CD", "ECD", "sCD", "MeanFlow"])
def test_guided_teachers_of_each_kind_in_each_distillation(name, kind, auto):
    """What the student follows is the guided model's path, computed by hand."""
    companions = {n: class_mlp(WRAPPERS[kind], i) for i, n in enumerate(("teacher", "guide"))}
    spec = Teacher(source=ANY_SOURCE, guidance=W, guide=WEAKER if auto else None)
    sigma, x0, eps = f64(0.05, 0.4, 2.0, 30.0), normal(4, 2), normal(4, 2, seed=1)
    engine = Along()

    def run(method: FlowMapMethod, student: Network, t: Tensor) -> Networks:
        nets = Networks(student, companions)
        method.check(nets)
        batch = stored_batch(x0, eps, t, cond=LABELS)
        method.loss(nets, batch, now(ratio=0.99)).per_sample.mean().backward()
        assert all(p.grad is None for net in companions.values() for p in net.parameters())
        return nets

    if name in ("CD", "ECD"):
        parts = {"times": AsDrawn(), "gap": ConstantRatio()}
        pairs = RatioPairing(**parts)
        cd = CM(pairs=pairs, teacher=spec, step=Euler(), boundary=0.0)
        ecd = ECT(**parts, teacher=spec, step=Euler())
        student = Recording(class_mlp(EDMDenoiser, 7))
        student.cond_dim, student.sigma_data = 3, 0.5
        nets = run(cd if name == "CD" else ecd, student, sigma)
        x, t = x0 + scaled(sigma, eps), sigma
        denoised = guided_by_hand(nets, auto, x, sigma)
        expected = denoised + scaled(f64(0.99).expand(4), x - denoised)
        found = student.calls[1]["x"]
    elif name == "sCD":
        t = torch.atan(sigma / 0.5)
        scd = SCM(times=AsDrawn(), teacher=spec, warmup=LinearRamp(steps=0), engine=engine)
        nets = run(scd, class_mlp(TrigFlowNetwork, 7), sigma)
        x = TrigFlow().interpolate(x0, eps, t)
        denoised = guided_by_hand(nets, auto, scaled(1 / torch.cos(t), x), sigma)
        expected = scaled(1 / torch.sin(t), scaled(torch.cos(t), x) - denoised)
        found = scaled(1 / (torch.cos(t) * torch.sin(t)), engine.seen[0])
    else:
        t = sigma / (1 + sigma)
        mean_flow = MeanFlow(times=given_times(t, t / 2), teacher=spec, engine=engine)
        nets = run(mean_flow, class_mlp(VelocityNetwork, 7, two_times=True), t)
        x = Linear().interpolate(x0, eps, t)
        denoised = guided_by_hand(nets, auto, scaled(1 / (1 - t), x), sigma)
        expected = scaled(1 / t, x - denoised)
        found = engine.seen[0]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-9)


def test_augmented_samples_keep_their_labels_for_teachers_that_know_them():
    """x_t comes from an augmented sample, which a teacher without its label would undo."""
    labels, batch = torch.eye(2)[[0, 1, 1]], random_batch(normal(3, 1, 8, 8).float())
    batch = dataclasses.replace(batch, augment=labels)
    methods: list[FlowMapMethod] = [
        CM(pairs=RatioPairing(times=Uniform(t_min=0.1), gap=ConstantRatio()), boundary=0.0),
        ECT(),
        SCM(),
        MeanFlow(),
    ]
    for method in methods:
        spec = Teacher(source=ANY_SOURCE, guidance=2.0, guide=WEAKER)
        distilled = dataclasses.replace(method, teacher=spec)
        knows, plain = (Recording(small_unet(i, augment_dim=2 * i)) for i in (1, 0))
        knows.augment_dim = 2
        model = small_unet(2, augment_dim=2, two_times=method.two_times).model
        student = {"trigflow": TrigFlowNetwork, "velocity": VelocityNetwork}.get(
            method.expects, EDMDenoiser
        )(model)
        nets = Networks(student, {"teacher": knows, "guide": plain})
        distilled.check(nets)
        distilled.loss(nets, batch, now(ratio=0.9))
        assert all(torch.equal(call["augment"], labels) for call in knows.calls)
        assert all(call["augment"] is None for call in plain.calls)
        assert len(knows.calls) == len(plain.calls) > 0


# What does not fit


def refused(text: str, student: Network, teacher: Network, guide: Network | None = None, **kw):
    companions = {"teacher": teacher} | ({} if guide is None else {"guide": guide})
    spec = Teacher(source=ANY_SOURCE, guide=None if guide is None else WEAKER, **kw)
    with pytest.raises(ConfigError, match=text):
        spec.check(Networks(student, companions))


def augmented(width: int) -> Network:
    return small_unet(augment_dim=width)


def test_teachers_that_do_not_fit_are_refused():
    plain, classes = small_unet(), small_unet(cond_dim=3)
    refused("teacher: cond_dim 0 given, accepted: 3, that of the student", classes, plain)
    refused("guide: cond_dim 0 given, accepted: 3", classes, classes, plain, guidance=2.0)
    refused("guidance: 2.0 given without classes, accepted: 1", plain, plain, guidance=2.0)
    refused("guidance: 2.0 given without classes", plain, classes, guidance=2.0)
    refused("teacher: predicts 'score'", plain, OnPath("score", VE()))
    refused("guide: predicts 'score'", plain, plain, OnPath("score", VE()), guidance=2.0)
    refused("teacher: augment_dim 3 given, accepted: 0 or 2", augmented(2), augmented(3))
    two_times = EDMDenoiser(ToyMLP(data_dim=2, width=16, depth=1, two_times=True))
    refused("teacher: a network of two times given, accepted: of one time", plain, two_times)


def test_teachers_that_fit():
    plain, classes = small_unet(), small_unet(cond_dim=3)
    Teacher(source=ANY_SOURCE).check(Networks(plain, {"teacher": classes}))
    for student, teacher in ((0, 2), (2, 0), (2, 2)):
        nets = Networks(augmented(student), {"teacher": augmented(teacher)})
        Teacher(source=ANY_SOURCE).check(nets)
    Teacher(source=ANY_SOURCE, guidance=2.0).check(Networks(classes, {"teacher": classes}))
    auto = Teacher(source=ANY_SOURCE, guidance=2.0, guide=WEAKER)
    auto.check(Networks(plain, {"teacher": plain, "guide": plain}))
    assert auto.companions() == {"teacher": ANY_SOURCE, "guide": WEAKER}
    assert Teacher(source=ANY_SOURCE).companions() == {"teacher": ANY_SOURCE}


def test_a_guide_that_is_never_asked_is_refused():
    with pytest.raises(ConfigError, match=r"Teacher.guide: given with guidance 1, which never"):
        Teacher(source=ANY_SOURCE, guide=WEAKER)


# Flow matching


FLOW = FlowMatching()
LEVELS = f64(0.001, 0.1, 0.5, 0.9, 0.999)


class Velocity(Network):
    """A function (x, t) -> v as a network."""

    predicts = "velocity"

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x, t, s=None, cond=None, augment=None, guidance=None):
        return self.function(x, t)


def test_flow_matching_loss_by_hand():
    x, eps = normal(4, 2), normal(4, 2, seed=1)
    t = f64(0.1, 0.4, 0.8, 0.95)
    net = Recording(mlp(VelocityNetwork))
    method = FlowMatching(times=AsDrawn())
    loss = method.loss(Networks(net), stored_batch(x, eps, t), now())
    (call,) = net.calls
    torch.testing.assert_close(call["x"], (1 - t)[:, None] * x + t[:, None] * eps)
    expected = (call["out"] - (eps - x)).square().mean(1)
    torch.testing.assert_close(loss.per_sample, expected, rtol=1e-12, atol=0)
    assert torch.equal(loss.times, t)
    torch.testing.assert_close(loss.metrics["mse"], expected.mean())
    loss.per_sample.mean().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_minimum_of_flow_matching_on_gaussian_data(std):
    """S^2 / ((1 - t)^2 S^2 + t^2) at each t, and the exact velocity is stationary."""
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)

    def exact(x, t):
        variance = (1 - t) ** 2 * std**2 + t**2
        return gain * scaled((t - (1 - t) * std**2) / variance, x)

    x, eps = quadrature(std)
    count = len(LEVELS)
    batch = stored_batch(x.repeat(count, 1), eps.repeat(count, 1), LEVELS.repeat_interleave(4))
    loss = FlowMatching(times=AsDrawn()).loss(Networks(Velocity(exact)), batch, now())
    losses = loss.per_sample.reshape(-1, 4).mean(1)
    expected = std**2 / ((1 - LEVELS) ** 2 * std**2 + LEVELS**2)
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-10, atol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), gain)
    assert abs(gradient.item()) < 1e-10


def test_the_mean_minimum_for_unit_data_is_half_of_pi():
    """The integral of 1/((1 - t)^2 + t^2) over [0, 1]."""
    u = (torch.arange(2000).double() + 0.5) / 2000
    x, eps = quadrature(1.0)
    batch = stored_batch(x.repeat(2000, 1), eps.repeat(2000, 1), u.repeat_interleave(4))

    def exact(x, t):
        return scaled((2 * t - 1) / ((1 - t) ** 2 + t**2), x)

    loss = FLOW.loss(Networks(Velocity(exact)), batch, now())
    assert torch.equal(loss.times[::4], u)
    assert loss.per_sample.mean().item() == pytest.approx(math.pi / 2, rel=1e-6)


def test_laws_of_t():
    assert FLOW.times == Uniform()
    nets, batch = Networks(mlp(VelocityNetwork)), random_batch(normal(512, 2))
    uniform = FLOW.loss(nets, batch, now()).times
    assert abs(uniform.mean().item() - 0.5) < 0.05
    inner = FlowMatching(times=LogitNormal(mean=0.0, std=1.0)).loss(nets, batch, now()).times
    assert inner.std() < uniform.std()


def test_flow_map_is_eulers_step_and_sampling_follows_the_ode():
    net, x = mlp(VelocityNetwork), normal(3, 2)
    t, s = f64(1.0, 0.6, 0.3), f64(0.5, 0.6, 0.0)
    expected = x + (s - t)[:, None] * net(x, t)
    torch.testing.assert_close(FLOW.flow_map(net, x, t, s), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(FLOW.flow_map(net, x, t, t), x)
    net.float()
    times = default_times(FLOW, 4)
    assert times[0] == 1.0
    samples = generate(FLOW, net, range(3), (2,), times)
    start = SampleNoise(range(3)).normal((2,))
    with torch.no_grad():
        end = ode_euler(lambda x, t: net(x.float(), t).double(), start, (*times, 0.0))
    torch.testing.assert_close(samples, end.float(), rtol=1e-4, atol=1e-4)
    assert FLOW.expects == "velocity"
    assert not FLOW.two_times


def test_flow_matching_contract():
    x, cond = normal(8, 1, 8, 8).float(), torch.eye(3)[torch.arange(8) % 3]
    net = Recording(VelocityNetwork(small_unet(cond_dim=3).model))
    first = FLOW.loss(Networks(net), random_batch(x, cond=cond), now())
    assert torch.equal(net.calls[0]["cond"], cond)
    again = FLOW.loss(Networks(net), random_batch(x, cond=cond), now())
    assert torch.equal(first.per_sample, again.per_sample)
    assert first.per_sample.dtype == torch.float32
    assert first.times.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        narrow = FLOW.loss(Networks(net), random_batch(x, cond=cond), now())
    assert narrow.per_sample.dtype == torch.float32
    assert torch.equal(narrow.times, first.times)
    later = random_batch(x, cond=cond, step=1)
    assert not torch.equal(FLOW.loss(Networks(net), later, now()).times, first.times)
