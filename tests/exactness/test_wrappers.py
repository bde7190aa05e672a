"""Wrappers: what a raw network is handed, and what is made of its answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastflow.errors import ConfigError
from fastflow.network import Network
from fastflow.path import VE, TrigFlow
from fastflow.precond import EDMScaling
from fastflow.raw import RawNetwork
from fastflow.wrappers import (
    EDMDenoiser,
    NoiseDenoiser,
    TrigFlowNetwork,
    VelocityNetwork,
)
from networks.dit import DiT
from networks.edm2 import LogVariance
from reference_data import reference

WRAPPERS: dict[str, Callable[..., Any]] = {
    "edm": EDMDenoiser,
    "trigflow": TrigFlowNetwork,
    "velocity": VelocityNetwork,
    "noise": NoiseDenoiser,
}
every_one = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
S = torch.tensor([0.2, 0.5, 0.0], dtype=torch.float64)


class Seen(NamedTuple):
    x: Tensor
    c_noise: Tensor
    cond: Tensor | None
    augment: Tensor | None
    c_second: Tensor | None
    guidance: Tensor | None


class Recorder(RawNetwork):
    """Answers 2 x + 1 in float64 and a learned variance, and remembers what it was given."""

    sample_shape = (2, 4, 4)
    cond_dim, augment_dim = 3, 5

    def __init__(self, *, two_times: bool = False, takes_guidance: bool = False) -> None:
        super().__init__()
        self.two_times, self.takes_guidance = two_times, takes_guidance
        self.layer = nn.Linear(1, 1)
        self.steps = 0

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Tensor | None = None,
        augment: Tensor | None = None,
        c_second: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        self.seen = Seen(x, c_noise, cond, augment, c_second, guidance)
        return torch.cat([2 * x + 1, torch.full_like(x, math.nan)], dim=1).double()

    def shard_units(self) -> list[nn.Module]:
        return [self.layer]

    def additions(self) -> tuple[str, ...]:
        return ("second.",) * self.two_times + ("guidance.",) * self.takes_guidance

    def after_step(self) -> None:
        self.steps += 1


class Head(nn.Module):
    """u = c_noise + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, c_noise: Tensor) -> Tensor:
        return c_noise + 1

    def after_step(self) -> None:
        self.steps += 1


def seen(net: Network, *args: Any, **kwargs: Any) -> Seen:
    """What the model of `net` is handed when the network is called."""
    net(*args, **kwargs)
    assert isinstance(net.model, Recorder)
    return net.model.seen


def column(t: Tensor) -> Tensor:
    return t[:, None, None, None]


def near(actual: Tensor | None, expected: Tensor, rtol: float = 1e-12) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-13)


# What all wrappers do


@every_one
def test_labels_and_guidance_are_handed_on(wrap: Callable[..., Any]) -> None:
    net = wrap(Recorder(takes_guidance=True))
    cond, augment, guidance = torch.eye(3), torch.ones(3, 5), torch.tensor([1.0, 2.5, 7.0])
    given = seen(net, X, T, cond=cond, augment=augment, guidance=guidance)
    assert given.cond is cond
    assert given.augment is augment
    near(given.guidance, guidance.double())
    assert given.c_second is None
    assert seen(net, X, T).guidance is None  # the model stands in for it
    assert (net.sample_shape, net.cond_dim, net.augment_dim) == ((2, 4, 4), 3, 5)
    assert (net.two_times, net.takes_guidance, net.has_logvar) == (False, True, False)
    assert wrap(Recorder(two_times=True)).two_times
    assert net.shard_units() == [net.model.layer]


@every_one
def test_channels_of_a_learned_variance_are_ignored(wrap: Callable[..., Any]) -> None:
    out = wrap(Recorder())(X, T)
    assert out.shape == X.shape
    assert torch.isfinite(out).all()


@every_one
def test_times_stay_in_single_precision_for_narrow_images(wrap: Callable[..., Any]) -> None:
    net = wrap(Recorder(two_times=True, takes_guidance=True))
    narrow = X.bfloat16()
    given = seen(net, narrow, T, S, guidance=T)
    assert given.x.dtype == torch.bfloat16
    assert net(narrow, T, S).dtype == torch.bfloat16
    wide = seen(net, X, T, S, guidance=T)
    for low, high in zip(given[1:], wide[1:], strict=True):
        if high is not None:
            assert low.dtype == torch.float32
            assert high.dtype == torch.float64
            assert torch.equal(low, high.float())  # rounded once


@every_one
def test_one_time_for_the_whole_batch(wrap: Callable[..., Any]) -> None:
    net = wrap(Recorder(two_times=True))
    by_row = net(X, T[:1].expand(3), S[:1].expand(3))
    near(net(X, T[0], S[0]), by_row)
    assert net.model.seen.c_noise.shape == net.model.seen.c_second.shape == (3,)


@every_one
def test_times_and_guidance_that_do_not_fit_are_refused(wrap: Callable[..., Any]) -> None:
    kind = wrap.__name__
    one, two = wrap(Recorder()), wrap(Recorder(two_times=True))
    with pytest.raises(ConfigError, match=f"{kind} takes one time, but .* two_times=True"):
        one(X, T, S)
    with pytest.raises(ConfigError, match=rf"{kind} takes two times, but no .* \(s = t asks"):
        two(X, T)
    with pytest.raises(ConfigError, match=f"{kind} takes no guidance .* takes_guidance=True"):
        one(X, T, guidance=T)


@every_one
def test_the_log_variance_head_reads_the_time_of_the_model(wrap: Callable[..., Any]) -> None:
    head = Head()
    net = wrap(Recorder(), logvar_head=head)
    assert net.has_logvar
    assert net.logvar(T).dtype == torch.float64
    near(net.logvar(T), seen(net, X, T).c_noise + 1)
    net.after_step()
    assert net.model.steps == head.steps == 1
    plain = wrap(Recorder())
    plain.after_step()
    assert plain.model.steps == 1
    with pytest.raises(ConfigError, match=f"{wrap.__name__} has no log-variance head; .*lazy"):
        plain.logvar(T)


@every_one
def test_names_of_additions(wrap: Callable[..., Any]) -> None:
    assert wrap(Recorder()).additions() == ()
    assert wrap(Recorder(), logvar_head=Head()).additions() == ("logvar_head.",)
    every = wrap(Recorder(two_times=True, takes_guidance=True), logvar_head=Head())
    assert every.additions() == ("model.second.", "model.guidance.", "logvar_head.")


SMALL: dict[str, Any] = {"hidden_size": 16, "depth": 1, "num_heads": 2}


def scrambled_dit(**kwargs: Any) -> DiT:
    net = DiT(resolution=4, in_channels=2, cond_dim=3, **SMALL, **kwargs).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(noise / math.sqrt(p[0].numel() + 3))
    return net


@every_one
def test_weights_without_the_additions_give_the_same_outputs(wrap: Callable[..., Any]) -> None:
    plain = wrap(scrambled_dit())
    model = DiT(
        resolution=4, in_channels=2, cond_dim=3, two_times=True, takes_guidance=True, **SMALL
    )
    net = wrap(model.double(), logvar_head=LogVariance(8))
    missing, unexpected = net.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert missing
    assert all(name.startswith(net.additions()) for name in missing)
    for prefix in net.additions():
        assert any(name.startswith(prefix) for name in missing)
    cond = torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        expected = plain(X, T, cond=cond)
        for s in (T, S, torch.zeros_like(T)):
            assert torch.equal(net(X, T, s, cond=cond), expected)
            assert torch.equal(net(X, T, s, cond=cond, guidance=3 * T), expected)


@every_one
def test_forward_mode_in_all_times(wrap: Callable[..., Any]) -> None:
    net = wrap(scrambled_dit(two_times=True, takes_guidance=True))
    cond = torch.eye(3, dtype=torch.float64)

    def call(x: Tensor, t: Tensor, s: Tensor, guidance: Tensor) -> Tensor:
        out: Tensor = net(x, t, s, cond=cond, guidance=guidance)
        return out

    given = (X, T, torch.tensor([0.21, 0.33, 0.04], dtype=torch.float64), 1 + T)
    h = 1e-6
    with torch.no_grad():
        for i in range(4):
            along = tuple(torch.ones_like(p) * (i == j) for j, p in enumerate(given))
            _, tangent = torch.func.jvp(call, given, along)
            ahead = call(*(p + h * d for p, d in zip(given, along, strict=True)))
            behind = call(*(p - h * d for p, d in zip(given, along, strict=True)))
            assert tangent.abs().max() > 1e-3
            torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-6)


# The velocity


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_velocity_reads_scaled_times(scale: float) -> None:
    gap = VelocityNetwork(Recorder(two_times=True), time_scale=scale)
    given = seen(gap, X, T, S)
    assert given.x is X
    near(given.c_noise, scale * T)
    near(given.c_second, scale * (T - S))
    near(gap(X, T, S), 2 * X + 1)
    end = VelocityNetwork(Recorder(two_times=True), time_scale=scale, second="end")
    near(seen(end, X, T, S).c_noise, scale * T)
    near(seen(end, X, T, S).c_second, scale * S)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_velocity_of_models_with_data_at_one(scale: float) -> None:
    """Their time runs backwards, so they read 1 - t and answer minus our velocity."""
    net = VelocityNetwork(Recorder(two_times=True), time_scale=scale, data_at=1)
    given = seen(net, X, T, S)
    assert given.x is X
    near(given.c_noise, scale * (1 - T))
    near(given.c_second, scale * (T - S))  # a length of time, whichever way it runs
    near(net(X, T, S), -(2 * X + 1))
    end = VelocityNetwork(Recorder(two_times=True), time_scale=scale, data_at=1, second="end")
    near(seen(end, X, T, S).c_second, scale * (1 - S))


def test_both_arrows_of_time_are_one_field() -> None:
    """For data that is all zero the exact velocity is x / t."""

    class Field(Recorder):
        def forward(self, x: Tensor, c_noise: Tensor, *rest: Tensor | None) -> Tensor:
            return -x / column(1 - c_noise)  # dx/dt' with t' = 1 - t

    near(VelocityNetwork(Field(), data_at=1)(X, T), X / column(T))


@pytest.mark.parametrize("data_at", [0, 1])
def test_differences_of_close_times_survive(data_at: Any) -> None:
    t, s = torch.full_like(T, 0.7 + 3e-10), torch.full_like(T, 0.7)
    assert torch.equal(t.float(), s.float())
    net = VelocityNetwork(Recorder(two_times=True), time_scale=1000.0, data_at=data_at)
    second = seen(net, X.float(), t, s).c_second
    assert second is not None
    assert second.dtype == torch.float32
    near(second, torch.full((3,), 3e-7), rtol=1e-5)
    log = seen(EDMDenoiser(Recorder(two_times=True)), X.float(), t, s).c_second
    near(log, torch.full((3,), 3e-10 / 0.7 / 4), rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_impossible_time_scales_are_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match=r"time_scale: .* given, accepted: a finite number above"):
        VelocityNetwork(Recorder(), time_scale=scale)


# The denoiser of EDM


def test_edm_reads_the_logarithm_of_the_noise_level() -> None:
    t = torch.tensor([80.0, 0.5, 0.002], dtype=torch.float64)
    net = EDMDenoiser(Recorder(), sigma_data=0.7)
    given = seen(net, X, t)
    near(given.c_noise, t.log() / 4)
    near(given.x, X / column((t**2 + 0.7**2).sqrt()))
    c_skip, c_out, _, _ = (column(c) for c in EDMScaling(sigma_data=0.7)(t))
    near(net(X, t), c_skip * X + c_out * (2 * given.x + 1))
    assert net.sigma_data == 0.7
    assert torch.equal(net(X, torch.zeros_like(t)), X)


def test_edm_scales_time_as_openai_do() -> None:
    ref = reference("openai_scalings")
    sigma = ref["sigma"]
    net = EDMDenoiser(Recorder(), noise_scale=1000.0)
    ref.check("rescaled_t", seen(net, sigma.new_zeros(len(sigma), 2, 4, 4), sigma).c_noise)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_edm_reads_second_times_in_the_units_of_the_first(scale: float) -> None:
    t = torch.tensor([80.0, 0.5, 0.002], dtype=torch.float64)
    s = torch.tensor([0.5, 0.002, 0.001], dtype=torch.float64)
    least = s.clamp_min(0.002)
    model = Recorder(two_times=True)
    gap = EDMDenoiser(model, noise_scale=scale)
    near(seen(gap, X, t, s).c_second, scale * (t.log() - least.log()) / 4)
    near(seen(gap, X, t, torch.zeros_like(s)).c_second, scale * (t / 0.002).log() / 4)
    near(seen(gap, X, t, t).c_second, torch.zeros_like(t))
    end = EDMDenoiser(model, noise_scale=scale, second="end")
    near(seen(end, X, t, s).c_second, scale * least.log() / 4)
    near(
        seen(end, X, t, torch.zeros_like(s)).c_second,
        torch.full_like(s, scale * math.log(0.002) / 4),
    )
    below = torch.full_like(t, 1e-3)  # both below the floor: no time between them
    near(seen(gap, X, below, torch.zeros_like(s)).c_second, torch.zeros_like(t))
    near(seen(gap, X, below, below).c_noise, scale * below.log() / 4)  # t itself has no floor


# TrigFlow


def test_trigflow_is_edm_with_the_same_model() -> None:
    model = scrambled_dit()
    edm, trig = EDMDenoiser(model), TrigFlowNetwork(model, time="log_sigma")
    sigma = torch.tensor([80.0, 0.5, 0.01], dtype=torch.float64)
    y, t = VE().convert(X, sigma, TrigFlow())
    velocity = 0.5 * trig(y, t)
    near(TrigFlow().denoised_from_velocity(y, velocity, t), edm(X, sigma), rtol=1e-9)


def test_trigflow_reads_angles_or_noise_levels() -> None:
    model = Recorder(two_times=True)
    angle = TrigFlowNetwork(model, sigma_data=0.25)
    given = seen(angle, X, T, S)
    near(given.x, X / 0.25)
    near(given.c_noise, T)
    near(given.c_second, T - S)
    near(angle(X, T, S), -(2 * X / 0.25 + 1))
    near(seen(TrigFlowNetwork(model, second="end"), X, T, S).c_second, S)
    log = TrigFlowNetwork(model, sigma_data=0.25, time="log_sigma", second="end")
    level = (0.25 * T.tan()).log() / 4
    near(seen(log, X, T, S).c_noise, level)
    floored = (0.25 * S.tan()).clamp_min(0.002).log() / 4
    near(seen(log, X, T, S).c_second, floored)
    gap = TrigFlowNetwork(model, sigma_data=0.25, time="log_sigma")
    near(seen(gap, X, T, S).c_second, level - floored)


# The denoiser from a model of the noise


def linear_abar(steps: int) -> Tensor:
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0)


@pytest.mark.parametrize("steps", [1000, 100])
def test_noise_denoiser_inverts_the_diffusion(steps: int) -> None:
    step = torch.tensor([0, steps // 2, steps - 1])
    abar = linear_abar(steps)[step]
    sigma = ((1 - abar) / abar).sqrt()
    net = NoiseDenoiser(Recorder(), steps=steps)
    vp = X * column(abar.sqrt())  # the state at `step` whose noise level is sigma
    given = seen(net, X, sigma)
    near(given.x, vp)
    near(given.c_noise, step.double(), rtol=1e-9)
    noise = 2 * vp + 1
    near(net(X, sigma), (vp - column((1 - abar).sqrt()) * noise) / column(abar.sqrt()))


def test_noise_denoiser_between_and_beyond_its_steps() -> None:
    abar = linear_abar(1000)
    levels = ((1 - abar) / abar).sqrt()
    net = NoiseDenoiser(Recorder(two_times=True))
    half = (levels[499] * levels[500]).sqrt()  # half-way in the logarithm
    beyond = torch.stack([half, levels[0] / 3, levels[-1] * 3])
    low = torch.zeros(3, dtype=torch.float64)
    given = seen(net, X, beyond, low)
    expected = torch.tensor([499.5, 0.0, 999.0], dtype=torch.float64)
    near(given.c_noise, expected, rtol=1e-9)
    near(given.c_second, expected, rtol=1e-9)  # the gap to the first step
    for dtype in (torch.float32, torch.float64):
        x, zero = X.to(dtype), torch.zeros(3, dtype=dtype)
        assert torch.equal(net(x, zero, zero), x)
        assert seen(net, x, zero, zero).c_noise.tolist() == [0.0, 0.0, 0.0]
