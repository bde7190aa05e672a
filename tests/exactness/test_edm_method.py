"""EDM: its loss against recorded ones and closed forms, and sampling along the ODE."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from consistency_fakes import (
    AsDrawn,
    DenoiserOf,
    Recording,
    f64,
    now,
    openai_toy,
    quadrature,
    random_batch,
    small_unet,
    stored_batch,
)
from edm2_networks import edm2_denoiser
from edm_networks import edm_denoiser, last_labels
from fastflow.consistency import InverseCout, SnrPlus, Uniform
from fastflow.data.batch import Batch
from fastflow.generate import default_times, generate
from fastflow.method import Networks
from fastflow.oracle import Gaussian
from fastflow.path import expand
from fastflow.rng import SampleNoise
from fastflow.sampling import ddim, ode_euler, velocity_of
from fastflow.times import LogNormal
from fastflow.wrappers import EDMDenoiser
from methods.edm import EDM
from networks.edm2 import LogVariance
from networks.mlp import ToyMLP
from reference_data import reference

OPENAI = reference("openai_consistency_losses")
AT_TIMES = EDM(times=AsDrawn())


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def edm2_classes(ref) -> Tensor | None:
    return ref["class_labels"] if "class_labels" in ref else None  # noqa: SIM401, no get()


# Recorded losses


@pytest.mark.parametrize(
    "case",
    ["edm_net_ddpmpp", "edm_net_ncsnpp", "edm_net_skip", "edm_net_adm", "edm_net_adm_aug"],
)
def test_edm_loss(case):
    ref = reference(case)
    levels = torch.special.ndtr(ref["edmloss.rnd_normal"].flatten().double())
    stored = stored_batch(ref["edmloss.images"], ref["edmloss.noise"], levels)
    batch = dataclasses.replace(stored, **last_labels(ref))
    with torch.no_grad():
        loss = EDM().loss(Networks(edm_denoiser(case)), batch, now())
    expected = ref["edmloss.per_pixel"].flatten(1).mean(1)
    torch.testing.assert_close(loss.per_sample, expected, rtol=1e-4, atol=0)
    times = torch.exp(-1.2 + 1.2 * ref["edmloss.rnd_normal"].flatten().double())
    torch.testing.assert_close(loss.times, times, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("suffix", "dtype"), [("", torch.float32), (".f64", torch.float64)])
@pytest.mark.parametrize(
    ("key", "weight"),
    [
        ("edm.karras.loss", InverseCout()),
        ("edm.snr+1.loss", SnrPlus(offset=1.0)),
        ("edm.karras.xs_mse", Uniform()),
    ],
)
def test_openai_training_losses(key, weight, suffix, dtype):
    method = dataclasses.replace(AT_TIMES, weight=weight)
    batch = stored_batch(
        OPENAI["x_start"].to(dtype), OPENAI["noise"].to(dtype), OPENAI["edm.sigmas"].double()
    )
    loss = method.loss(Networks(openai_toy("online", dtype)), batch, now())
    OPENAI.check(f"{key}{suffix}", loss.per_sample)
    mean_error = OPENAI["edm.karras.xs_mse"].mean()
    torch.testing.assert_close(loss.metrics["mse"].float(), mean_error, rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", ["edm2_net_cond", "edm2_net_uncond"])
def test_edm2_loss(case):
    """Per pixel L/exp(u) + u with the network's own u(t); the method takes the mean of a sample."""
    ref, net = reference(case), edm2_denoiser(case)
    levels = torch.special.ndtr(ref["edm2loss.rnd_normal"].flatten().double())
    stored = stored_batch(ref["edm2loss.images"], ref["edm2loss.noise"], levels)
    batch = dataclasses.replace(stored, cond=edm2_classes(ref))
    method = EDM(times=LogNormal(mean=-0.4, std=1.0), weight=InverseCout(sigma_data=net.sigma_data))
    with torch.no_grad():
        loss = method.loss(Networks(net), batch, now())
    expected = ref["edm2loss.per_pixel"].flatten(1).mean(1)
    torch.testing.assert_close(loss.per_sample, expected, rtol=1e-4, atol=1e-5)
    assert loss.per_sample.mean().item() == pytest.approx(ref.values["edm2loss.mean"], rel=1e-5)
    u = net.logvar(loss.times.float())
    torch.testing.assert_close(loss.metrics["logvar"], u.detach().mean())


# The learned log-variance


class Uncertain(Recording):
    """A network with one free u for each of the given times."""

    has_logvar = True

    def __init__(self, net, times: Tensor) -> None:
        super().__init__(net)
        self.times = times
        self.u = torch.nn.Parameter(torch.zeros(len(times), dtype=torch.float64))

    def logvar(self, t):
        return self.u[(self.times == t[:, None]).long().argmax(1)]


def test_the_log_variance_enters_as_published():
    """L exp(-u) + u: gradients of both parts by hand, and the plain loss at u = 0."""
    times, x, eps = f64(0.1, 2.0), normal(2, 1, 8, 8).float(), normal(2, 1, 8, 8, seed=1).float()
    plain, batch = small_unet(), stored_batch(x, eps, times)
    net = Uncertain(plain, times)
    reduced = AT_TIMES.loss(Networks(plain), batch, now())
    assert torch.equal(AT_TIMES.loss(Networks(net), batch, now()).per_sample, reduced.per_sample)
    assert "logvar" not in reduced.metrics
    with torch.no_grad():
        net.u.copy_(f64(-1.0, 0.7))
    loss = AT_TIMES.loss(Networks(net), batch, now())
    factor = torch.exp(-net.u.detach()).float()
    expected = reduced.per_sample * factor + net.u.float()
    torch.testing.assert_close(loss.per_sample, expected)
    torch.testing.assert_close(loss.metrics["logvar"].double(), net.u.detach().mean())
    torch.testing.assert_close(loss.metrics["mse"], reduced.metrics["mse"])
    loss.per_sample.sum().backward()
    slope = 1 - (reduced.per_sample * factor).double()
    torch.testing.assert_close(net.u.grad, slope.detach(), rtol=1e-5, atol=1e-6)
    found = [p.grad.clone() for p in plain.parameters()]
    wanted = torch.autograd.grad((reduced.per_sample * factor).sum(), list(plain.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_best_log_variance_is_that_of_the_mean_loss():
    """exp(u(t)) = E[L] at every t, where the network's gradient has the same size at every t."""
    std = 0.3
    net = Uncertain(DenoiserOf(Gaussian.isotropic(std).denoiser), TIMES)
    plain = population_losses(net.net, std)
    optimum = plain.log()
    with torch.no_grad():
        net.u.copy_(optimum)
    losses = population_losses(net, std)
    (gradient,) = torch.autograd.grad(losses.sum(), net.u)
    assert gradient.abs().max() < 1e-12
    torch.testing.assert_close(losses.detach(), 1 + optimum, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        net.u.add_(0.1)
    assert (population_losses(net, std) > losses).all()


def test_the_head_is_trained_with_the_network():
    """A head of EDM2 in a network of EDM, which starts at u = 0: the plain loss."""
    head = LogVariance(channels=6)
    net = EDMDenoiser(ToyMLP(data_dim=2, width=16, depth=1), logvar_head=head)
    loss = EDM().loss(Networks(net), random_batch((0.5 * normal(6, 2)).float()), now())
    assert loss.per_sample.dtype == torch.float32
    loss.per_sample.mean().backward()
    assert head.linear.weight.grad is not None
    assert bool((head.linear.weight.grad != 0).any())


# Closed forms

TIMES = f64(0.002, 0.05, 0.5, 3.0, 80.0)


def population(std: float) -> Batch:
    """The four points of the quadrature at each of TIMES."""
    x, eps = quadrature(std)
    count = len(TIMES)
    return stored_batch(x.repeat(count, 1), eps.repeat(count, 1), levels=TIMES.repeat_interleave(4))


def population_losses(net, std: float) -> Tensor:
    loss = AT_TIMES.loss(Networks(net), population(std), now())
    return loss.per_sample.reshape(-1, 4).mean(1)


def test_data_of_the_assumed_std_need_no_network():
    """For N(0, sd^2) the raw output 0 is optimal, and the loss is 1 at every t."""
    raw = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    class Constant(ToyMLP):
        def forward(self, x, c_noise, *conditions):
            return raw * x

    losses = population_losses(EDMDenoiser(Constant(data_dim=1), sigma_data=0.5), 0.5)
    torch.testing.assert_close(losses.detach(), torch.ones(5).double(), rtol=1e-10, atol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), raw)
    assert abs(gradient.item()) < 1e-8


def test_a_fresh_network_starts_at_loss_1():
    net = EDMDenoiser(ToyMLP(data_dim=2, width=16, depth=1))
    batch = random_batch((0.5 * normal(4000, 2)).float())
    loss = EDM().loss(Networks(net), batch, now()).per_sample
    assert abs(loss.mean().item() - 1) < 4 * loss.std().item() / 4000**0.5


@pytest.mark.parametrize("std", [0.1, 0.5, 2.0])
def test_minimum_loss_on_gaussian_data(std):
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)
    oracle = Gaussian.isotropic(std)
    losses = population_losses(DenoiserOf(lambda x, t: gain * oracle.denoiser(x, t)), std)
    s, sd = TIMES, 0.5
    expected = (s**2 + sd**2) * std**2 / (sd**2 * (s**2 + std**2))
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-9, atol=0)
    # Stationary: the gradient vanishes beside the two terms, w E[D x0], whose difference it is.
    (gradient,) = torch.autograd.grad(losses.sum(), gain)
    assert abs(gradient.item()) < 1e-10 * (expected / s**2).sum().item()


# The network's arguments, and contracts


def test_conditions_reach_the_network():
    net = Recording(small_unet(cond_dim=3))
    cond = torch.eye(3)[torch.tensor([0, 2, 1])]
    EDM().loss(Networks(net), random_batch(normal(3, 1, 8, 8).float(), cond=cond), now())
    (call,) = net.calls
    assert torch.equal(call["cond"], cond)


def test_loss_contract():
    nets, x = Networks(small_unet()), normal(8, 1, 8, 8).float()
    method = EDM(times=LogNormal(mean=-0.8, std=1.6))
    first = method.loss(nets, random_batch(x), now())
    again = method.loss(nets, random_batch(x), now())
    assert torch.equal(first.per_sample, again.per_sample)
    assert first.per_sample.dtype == torch.float32
    assert first.times.dtype == torch.float64
    alone = [method.loss(nets, part, now()) for part in random_batch(x).split(1)]
    torch.testing.assert_close(
        torch.cat([loss.per_sample for loss in alone]), first.per_sample, rtol=1e-4, atol=1e-6
    )
    assert method.needs == frozenset()
    assert method.companions() == {}
    first.per_sample.mean().backward()
    assert all(p.grad is not None for p in nets.student.parameters())


# Sampling


def test_flow_map_is_eulers_step():
    oracle, x = Gaussian.isotropic(0.5, mean=0.2), normal(4, 3)
    net, method = DenoiserOf(oracle.denoiser), EDM()
    t, s = f64(80.0, 2.0, 2.0, 0.5), f64(60.0, 0.1, 0.0, 0.5)
    out = method.flow_map(net, x, t, s)
    slope = (x - oracle.denoiser(x, t)) / expand(t, x)
    torch.testing.assert_close(out, x + expand(s - t, x) * slope, rtol=1e-12, atol=1e-12)
    assert torch.equal(out[2], oracle.denoiser(x, t)[2])
    assert torch.equal(out[3], x[3])
    assert method.flow_map(DenoiserOf(lambda x, t: x), x.float(), t, s).dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_generate_follows_the_ode(steps):
    """No noise enters after the start: Euler's method, also known as DDIM."""
    net, method, seeds = small_unet(), EDM(), range(3)
    times = default_times(method, steps)
    samples = generate(method, net, seeds, (1, 8, 8), times)
    start = 80 * SampleNoise(seeds).normal((1, 8, 8))

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return net(x.float(), t).double()

    with torch.no_grad():
        expected = ode_euler(velocity_of(denoiser, method.path), start, (*times, 0.0)).float()
        torch.testing.assert_close(samples, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            samples, ddim(denoiser, start, (*times, 0.0), method.path).float(), rtol=1e-4, atol=1e-4
        )


def test_more_steps_come_nearer_to_the_exact_map():
    oracle, method = Gaussian.isotropic(0.5, mean=0.2), EDM()
    net, seeds = DenoiserOf(lambda x, t: oracle.denoiser(x, t).float()), range(16)
    start, t = 80 * SampleNoise(seeds).normal((3,)), f64(80.0).expand(16)
    exact = oracle.flow_map(start, t, 0 * t).float()
    errors = [
        (generate(method, net, seeds, (3,), default_times(method, n)) - exact).norm().item()
        for n in (8, 16, 32)
    ]
    assert errors[0] > 1.7 * errors[1] > 1.7**2 * errors[2]
