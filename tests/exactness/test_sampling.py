"""Samplers against official numbers, closed forms and their documented costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastflow.errors import ConfigError
from fastflow.path import VE, Linear, Path, TrigFlow, expand
from fastflow.rng import SampleNoise
from fastflow.sampling import (
    Churn,
    Counting,
    clamped,
    ddim,
    dpm2,
    edm_stochastic,
    euler_ancestral,
    guided,
    jumps,
    karras_times,
    multistep,
    ode_euler,
    ode_heun,
    on_path,
    one_step,
    prior,
    renoise,
    velocity_of,
)
from fastflow.wrappers import EDMDenoiser
from networks.song_unet import SongUNet
from reference_data import reference

EDM_TIMES = (*karras_times(18), 0.0)


def toy_denoiser(a: Tensor, b: Tensor, d: Tensor, eps: float = 0.0) -> Callable[..., Tensor]:
    """The toy network of the reference cases in EDM's scalings; eps > 0 is OpenAI's boundary."""
    a, b, d = (v.double()[:, None, None] for v in (a, b, d))

    def denoise(x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        t = expand(t, x)
        skip = 0.25 / ((t - eps) ** 2 + 0.25)
        out = 0.5 * (t - eps) / (t**2 + 0.25).sqrt()
        raw = d * torch.tanh(a * x / (t**2 + 0.25).sqrt() + b * torch.sin(2.5 * torch.log(t)))
        return skip * x + out * raw

    return denoise


def in_turn(noise: Tensor) -> Callable[[], Tensor]:
    rows: Iterator[Tensor] = iter(noise)
    return lambda: next(rows)


class TestAgainstOpenAI:
    """openai/consistency_models, cm/karras_diffusion.py; its final clamp is ours to add."""

    ref = reference("openai_samplers")
    parameters = ref["online.a"], ref["online.b"], ref["online.d"]
    consistency = staticmethod(toy_denoiser(*parameters, eps=0.002))
    plain = staticmethod(toy_denoiser(*parameters))
    noise = ref["noise"].double()
    x = 80 * noise[0]
    grid = karras_times(40)

    def check(self, key, x):
        self.ref.check(f"{key}.f64", x.clamp(-1, 1))

    def test_onestep(self):
        self.check("onestep.clip0", one_step(self.consistency, self.x, 80.0, 0.002))

    def test_multistep(self):
        times, path = (80.0, self.grid[22]), VE()
        x = multistep(self.consistency, self.x, times, in_turn(self.noise[1:]), path, 0.002)
        self.check("multistep.clip0", x)
        f = clamped(self.consistency)
        x = multistep(f, self.x, times, in_turn(self.noise[1:]), path, 0.002)
        self.check("multistep.clip1", x)

    def test_multistep_that_ends_in_noise(self):
        # OpenAI's list of times ends with the level to which the result is noised again.
        draw = in_turn(self.noise[1:])
        x = multistep(self.consistency, self.x, (80.0, self.grid[20]), draw, VE(), 0.002)
        self.check("multistep3.clip0", renoise(x, 0.002, self.grid[35], draw(), VE()))
        x = one_step(self.consistency, self.x, 80.0, 0.002)
        x = renoise(x, 0.002, self.grid[22], self.noise[1], VE())
        self.ref.check("stochastic_iterative.raw.f64", x)

    def test_heun(self):
        self.check("heun.clip0", ode_heun(velocity_of(self.plain), self.x, EDM_TIMES))
        self.check("heun.clip1", ode_heun(velocity_of(clamped(self.plain)), self.x, EDM_TIMES))

    def test_heun_with_churn(self):
        churn = Churn(s_churn=10.0, s_tmin=0.05, s_tmax=20.0, s_noise=1.003)
        x = edm_stochastic(self.plain, self.x, EDM_TIMES, in_turn(self.noise[1:]), churn)
        self.check("heun_churn.clip0", x)

    def test_dpm(self):
        self.check("dpm.clip0", dpm2(self.plain, self.x, (*karras_times(7), 0.0)))

    def test_euler(self):
        self.check("euler.clip0", ode_euler(velocity_of(self.plain), self.x, EDM_TIMES))

    def test_ancestral(self):
        x = euler_ancestral(self.plain, self.x, EDM_TIMES, in_turn(self.noise[1:]))
        self.check("ancestral.clip0", x)

    def test_progdist(self):
        self.check("progdist.clip0", ode_euler(velocity_of(self.plain), self.x, karras_times(9)))


@dataclass(frozen=True, kw_only=True)
class Stretched(VE):
    """A path by its scale s(t) and its sigma(t), as EDM's ablations describe theirs."""

    scale: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]

    def a(self, t: Tensor) -> Tensor:
        return self.scale(t)

    def b(self, t: Tensor) -> Tensor:
        return self.scale(t) * self.sigma(t)

    def nsr(self, t: Tensor) -> Tensor:
        return self.sigma(t)

    def da(self, t: Tensor) -> Tensor:
        return torch.func.jvp(self.a, (t,), (torch.ones_like(t),))[1]

    def db(self, t: Tensor) -> Tensor:
        return torch.func.jvp(self.b, (t,), (torch.ones_like(t),))[1]

    def wronskian(self, t: Tensor) -> Tensor:
        return self.a(t) * self.db(t) - self.da(t) * self.b(t)


class TestAgainstEDM:
    """NVlabs/edm, generate.py: edm_sampler and ablation_sampler."""

    ref = reference("edm_sampler")
    denoise = staticmethod(toy_denoiser(ref["a"], ref["b"], ref["d"]))
    latents, noise = ref["latents"], ref["noise"]

    @pytest.mark.parametrize(
        ("key", "low", "high", "n"),
        [("heun", 0.002, 80.0, 18), ("limits", 0.02, 30.0, 18), ("steps2", 0.002, 80.0, 2)],
    )
    def test_deterministic(self, key, low, high, n):
        times = (*karras_times(n, low, high), 0.0)
        x = ode_heun(velocity_of(self.denoise), high * self.latents, times)
        self.ref.check(f"{key}.x", x)

    @pytest.mark.parametrize(
        ("key", "churn"),
        [
            ("churn", Churn(s_churn=40.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003)),
            ("churn_max", Churn(s_churn=1e6)),
        ],
    )
    def test_stochastic(self, key, churn):
        x = 80 * self.latents
        called = []

        def denoise(x, t):
            called.append(t[0].item())
            return self.denoise(x, t)

        x = edm_stochastic(denoise, x, EDM_TIMES, in_turn(self.noise), churn)
        self.ref.check(f"{key}.x", x)
        assert called == pytest.approx(self.ref.values[f"{key}.sigmas_called"], rel=1e-12)

    def test_vp_ablation(self):
        beta_d, beta_min, steps = 19.9, 0.1, 18

        def sigma(t):
            return torch.sqrt(torch.expm1(0.5 * beta_d * t**2 + beta_min * t))

        path = Stretched(scale=lambda t: torch.rsqrt(1 + sigma(t) ** 2), sigma=sigma)
        times = [1 + i / (steps - 1) * (1e-3 - 1) for i in range(steps)]
        velocity = velocity_of(on_path(self.denoise, path), path)
        x = ode_heun(velocity, prior(self.latents, path, 1.0), (*times, 0.0))
        self.ref.check("ablation.0.x", x)

    def test_ve_ablation(self):
        path = Stretched(scale=torch.ones_like, sigma=torch.sqrt)
        times = [100.0**2 * (0.02**2 / 100.0**2) ** (i / 17) for i in range(18)]
        velocity = velocity_of(on_path(self.denoise, path), path)
        x = ode_euler(velocity, 100 * self.latents, (*times, 0.0))
        self.ref.check("ablation.1.x", x)

    def test_midpoint_ablation(self):
        x = ode_heun(velocity_of(self.denoise), 80 * self.latents, EDM_TIMES, alpha=0.5)
        self.ref.check("ablation.2.x", x)


class TestAgainstEDMNetwork:
    """The whole chain with a network: float64 loop around a float32 network, class labels."""

    ref = reference("edm_sampler_net")
    times = (*karras_times(8), 0.0)

    @pytest.fixture(scope="class")
    def denoise(self):
        unet = SongUNet(
            resolution=16,
            cond_dim=10,
            augment_dim=9,
            channels=16,
            channel_mult=(1, 2),
            num_blocks=2,
            attn_resolutions=(8,),
            dropout=0.0,
        )
        net = EDMDenoiser(unet).eval()
        net.load_state_dict(reference("edm_net_ddpmpp").weights("net."))
        labels = self.ref["class_labels"]
        return lambda x, t: net(x.float(), t.float(), cond=labels).double()

    @torch.no_grad()
    def test_heun(self, denoise):
        x = ode_heun(velocity_of(denoise), 80 * self.ref["latents"], self.times)
        self.ref.check("heun.x", x)

    @torch.no_grad()
    def test_churn(self, denoise):
        churn = Churn(s_churn=4.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003)
        draw = in_turn(self.ref["noise"])
        x = edm_stochastic(denoise, 80 * self.ref["latents"], self.times, draw, churn)
        self.ref.check("churn.x", x)


@pytest.mark.parametrize(("key", "between"), [("0", ()), ("1", (0.821,)), ("2", (10.0, 1.5, 0.3))])
def test_against_ect(key, between):
    """locuslab/ect lands on x0 and re-noises with the full standard deviation t."""
    ref = reference("ect_sampler")
    f = toy_denoiser(ref["a"], ref["b"], ref["d"])
    draw = in_turn(ref["noise"])
    x = multistep(f, 80 * ref["latents"], (80.0, *between), draw, VE(), s_min=0.0)
    ref.check(f"{key}.x", x)


def test_edm_times():
    expected = [80, 57.586, 40.786, 28.375, 19.353, 12.910, 8.4009, 5.3152, 3.2568, 1.9233]
    expected += [1.0882, 0.5853, 0.2964, 0.1395, 0.0599, 0.0229, 0.0075280, 0.002]
    assert karras_times(18) == pytest.approx(expected, rel=3e-3)
    assert karras_times(18)[0] == 80.0
    assert karras_times(18)[-1] == 0.002


STD = 0.5
SHAPE = (3, 2, 2)


def gaussian_denoiser(x: Tensor, t: Tensor) -> Tensor:
    """D for data N(0, STD^2), in VE."""
    return STD**2 / (STD**2 + expand(t, x) ** 2) * x


def gaussian_map(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return x * expand(torch.sqrt((STD**2 + s**2) / (STD**2 + t**2)), x)


def states(count: int = 4, scale: float = 80.0) -> Tensor:
    return scale * SampleNoise(range(count)).normal(SHAPE)


def fresh(count: int = 4) -> Callable[[], Tensor]:
    noise = SampleNoise(range(100, 100 + count))
    return lambda: noise.normal(SHAPE)


SAMPLERS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "euler": (lambda d, x, draw: ode_euler(velocity_of(d), x, EDM_TIMES), 18),
    "heun": (lambda d, x, draw: ode_heun(velocity_of(d), x, EDM_TIMES), 35),
    "heun40": (lambda d, x, draw: ode_heun(velocity_of(d), x, (*karras_times(40), 0.0)), 79),
    "heun_above_0": (lambda d, x, draw: ode_heun(velocity_of(d), x, EDM_TIMES[:-1]), 34),
    "midpoint": (lambda d, x, draw: ode_heun(velocity_of(d), x, EDM_TIMES, alpha=0.5), 35),
    "ddim": (lambda d, x, draw: ddim(d, x, EDM_TIMES, VE()), 18),
    "dpm2": (lambda d, x, draw: dpm2(d, x, EDM_TIMES), 36),
    "churn": (lambda d, x, draw: edm_stochastic(d, x, EDM_TIMES, draw, Churn(s_churn=40.0)), 35),
    "ancestral": (lambda d, x, draw: euler_ancestral(d, x, EDM_TIMES, draw), 18),
    "one_step": (lambda d, x, draw: one_step(lambda x, t, s: d(x, t), x, 80.0), 1),
    "multistep": (
        lambda d, x, draw: multistep(lambda x, t, s: d(x, t), x, (80.0, 5.0, 0.8), draw, VE()),
        3,
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_cost_is_as_documented(name):
    sample, nfe = SAMPLERS[name]
    counted = Counting(gaussian_denoiser)
    sample(counted, states(), fresh())
    assert counted.calls == nfe


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(name):
    sample, _ = SAMPLERS[name]
    ref = reference("edm_sampler")
    d = toy_denoiser(ref["a"], ref["b"], ref["d"])
    together = sample(d, states(5), fresh(5))
    alone = sample(d, states(5)[:1], fresh(1))
    assert torch.equal(together[:1], alone)
    assert together.shape == (5, *SHAPE)


@pytest.mark.parametrize("name", SAMPLERS)
def test_vectors_are_sampled_like_images(name):
    sample, _ = SAMPLERS[name]
    noise = SampleNoise(range(100, 104))
    flat = sample(gaussian_denoiser, states().flatten(1), lambda: noise.normal(SHAPE).flatten(1))
    torch.testing.assert_close(
        flat, sample(gaussian_denoiser, states(), fresh()).flatten(1), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_data_point_is_found_exactly(name):
    """D is constant, so every solver ends at the data (to 0.002 of it where it stops above 0)."""
    sample, _ = SAMPLERS[name]
    point = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(SHAPE)
    x = sample(lambda x, t: point.expand_as(x), states(), fresh())
    tolerance = 0.02 if name == "heun_above_0" else 1e-13
    assert (x - point).abs().max() < tolerance


@pytest.mark.parametrize("path", [VE(), Linear(), TrigFlow()], ids=lambda p: type(p).__name__)
def test_one_data_point_takes_one_ddim_step(path: Path):
    point = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(SHAPE)
    x = prior(states(scale=1.0), path, path.t_max)
    x = x + path.a(torch.tensor(path.t_max, dtype=torch.float64)) * point
    end = ddim(lambda x, t: point.expand_as(x), x, (path.t_max, 0.0), path)
    torch.testing.assert_close(end, point.expand_as(end), rtol=0, atol=1e-13)


def order(sample: Callable[[tuple[float, ...]], Tensor], exact: Tensor) -> float:
    """Empirical order: log2 of the error's fall when the number of steps doubles."""

    def error(n: int) -> float:
        return (sample(karras_times(n + 1, 0.02, 10.0)) - exact).abs().max().item()

    return math.log2(error(256) / error(512))


def test_orders_of_convergence():
    x = states(scale=10.0)
    t, s = torch.tensor([10.0], dtype=torch.float64), torch.tensor([0.02], dtype=torch.float64)
    exact = gaussian_map(x, t, s)
    v = velocity_of(gaussian_denoiser)
    assert order(lambda times: ode_euler(v, x, times), exact) == pytest.approx(1, abs=0.02)
    assert order(lambda times: ode_heun(v, x, times), exact) == pytest.approx(2, abs=0.03)
    assert order(lambda times: dpm2(gaussian_denoiser, x, times), exact) == pytest.approx(
        2, abs=0.03
    )
    # The midpoint rule happens to be of order 3 on the Gaussian's ODE: take dx/dt = -x/5 instead.
    exact = x * math.exp((10.0 - 0.02) / 5)
    decay = order(lambda times: ode_heun(lambda x, t: -x / 5, x, times, alpha=0.5), exact)
    assert decay == pytest.approx(2, abs=0.03)


@pytest.mark.parametrize("path", [Linear(), TrigFlow()], ids=lambda p: type(p).__name__)
def test_solvers_follow_the_ode_of_any_path(path: Path):
    """The ODE of another path is the same flow after a change of time and scale."""
    high, low = 20.0, 0.05
    x = states(scale=20.0)
    ends = torch.tensor([high, low], dtype=torch.float64)
    t, s = path.t_of_nsr(ends)
    start, _ = VE().convert(x, ends[:1], path)
    times = tuple(torch.linspace(t.item(), s.item(), 2001, dtype=torch.float64).tolist())
    denoiser = on_path(gaussian_denoiser, path)
    exact, _ = VE().convert(gaussian_map(x, ends[:1], ends[1:]), ends[1:], path)
    heun = ode_heun(velocity_of(denoiser, path), start, times)
    torch.testing.assert_close(heun, exact, rtol=1e-4, atol=1e-6)
    euler = ddim(denoiser, start, times, path)
    torch.testing.assert_close(euler, exact, rtol=2e-2, atol=1e-3)


def test_one_step_is_the_jump_itself():
    x = states()
    t, s = (torch.full((4,), v, dtype=torch.float64) for v in (80.0, 0.002))
    jump = gaussian_map(x, t, s)
    assert torch.equal(one_step(gaussian_map, x, 80.0, 0.002), jump)
    assert torch.equal(multistep(gaussian_map, x, (80.0,), fresh(), VE(), 0.002), jump)
    assert torch.equal(jumps(gaussian_map, x, (80.0, 0.002)), jump)


def test_times_reach_the_map_exactly_in_float64():
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(x, t, s):
        seen.append((t, s))
        return x

    multistep(spy, states(), (80.0, 0.821), fresh(), VE(), 0.002)
    jumps(spy, states(), (80.0, 0.1, 0.0))
    pairs = [(t[0].item(), s[0].item()) for t, s in seen]
    assert pairs == [(80.0, 0.002), (0.821, 0.002), (80.0, 0.1), (0.1, 0.0)]
    assert all(t.dtype == s.dtype == torch.float64 and t.shape == (4,) for t, s in seen)


def test_jumps_compose_an_exact_map():
    x = states()
    through = jumps(gaussian_map, x, (80.0, 7.0, 0.3, 0.0))
    direct = one_step(gaussian_map, x, 80.0)
    torch.testing.assert_close(through, direct, rtol=1e-13, atol=0)


@pytest.mark.parametrize("path", [VE(), Linear(), TrigFlow()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("s", [0.0, 0.1])
def test_renoising_restores_the_law_of_its_time(path: Path, s: float):
    """Data of variance STD^2 has variance a^2 STD^2 + b^2 at each t, whatever it started from."""
    t = 0.7
    now, then = (torch.tensor([v], dtype=torch.float64) for v in (s, t))

    def variance(time: Tensor) -> Tensor:
        return path.a(time) ** 2 * STD**2 + path.b(time) ** 2

    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    gain = renoise(one, s, t, zero, path) ** 2
    added = renoise(zero, s, t, one, path) ** 2
    torch.testing.assert_close(
        (gain * variance(now) + added)[0], variance(then), rtol=1e-13, atol=0
    )


def test_renoising_by_name():
    x, eps = states(scale=1.0), fresh()()
    assert torch.allclose(renoise(x, 0.0, 0.821, eps, VE()), x + 0.821 * eps, rtol=1e-14)
    std = math.sqrt(0.821**2 - 0.002**2)
    assert torch.allclose(renoise(x, 0.002, 0.821, eps, VE()), x + std * eps, rtol=1e-14)
    assert torch.allclose(renoise(x, 0.0, 0.3, eps, Linear()), 0.7 * x + 0.3 * eps, rtol=1e-14)
    assert torch.equal(renoise(x, 0.0, 0.0, eps, VE()), x)


def test_the_state_keeps_its_type():
    single = [states().float(), lambda: fresh()().float()]
    for sample, _ in SAMPLERS.values():
        assert sample(gaussian_denoiser_any, *single).dtype == torch.float32


def gaussian_denoiser_any(x: Tensor, t: Tensor) -> Tensor:
    return gaussian_denoiser(x, t).to(x.dtype)


class TestGuidance:
    cond, null = torch.ones(4, 2, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)

    @staticmethod
    def network(x, t, cond):
        shift = cond.sum(1) if cond is not None else torch.zeros(len(x), dtype=torch.float64)
        return torch.sin(x) + expand(shift, x) / 3

    def test_scale_1_is_the_conditional_network_called_once(self):
        counted = Counting(self.network)
        x, t = states(), torch.ones(4, dtype=torch.float64)
        plain = guided(counted, 1.0, self.cond, self.null)(x, t)
        assert torch.equal(plain, self.network(x, t, self.cond))
        assert counted.calls == 1

    @pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
    def test_it_extrapolates_from_the_unconditional(self, scale):
        counted = Counting(self.network)
        x, t = states(), torch.ones(4, dtype=torch.float64)
        low, high = self.network(x, t, self.null), self.network(x, t, self.cond)
        expected = (1 - scale) * low + scale * high
        for null in (self.null, None):
            out = guided(counted, scale, self.cond, null)(x, t)
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        assert counted.calls == 4

    def test_guiding_denoisers_is_guiding_velocities(self):
        x, t = states(scale=1.0), torch.full((4,), 0.6, dtype=torch.float64)
        path = TrigFlow()

        def velocity(x, t, cond):
            return path.velocity_from_denoised(x, self.network(x, t, cond), t)

        of_d = velocity_of(guided(self.network, 2.5, self.cond, self.null), path)(x, t)
        of_v = guided(velocity, 2.5, self.cond, self.null)(x, t)
        torch.testing.assert_close(of_d, of_v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("times", [(), (80.0,), (1.0, 1.0), (1.0, 2.0), (1.0, -0.5)])
def test_times_must_fall(times):
    for sample in (
        lambda: jumps(gaussian_map, states(), times),
        lambda: ode_euler(velocity_of(gaussian_denoiser), states(), times),
    ):
        with pytest.raises(ConfigError, match="strictly decreasing"):
            sample()


def test_multistep_times_stay_above_the_end():
    with pytest.raises(ConfigError, match=r"80, 0\.001, 0\.002 given"):
        multistep(gaussian_map, states(), (80.0, 0.001), fresh(), VE(), s_min=0.002)


@pytest.mark.parametrize(
    "bad", [{"s_churn": -1.0}, {"s_noise": 0.0}, {"s_tmin": 2.0, "s_tmax": 1.0}]
)
def test_churn_is_checked(bad):
    with pytest.raises(ConfigError, match="accepted"):
        Churn(**bad)


def test_noise_is_drawn_once_per_step():
    for sample in (
        lambda draw: edm_stochastic(gaussian_denoiser, states(), EDM_TIMES, draw, Churn()),
        lambda draw: euler_ancestral(gaussian_denoiser, states(), EDM_TIMES, draw),
    ):
        drawn = itertools.count()
        draw = fresh()
        sample(lambda draw=draw, drawn=drawn: (next(drawn), draw())[1])
        assert next(drawn) == 18


def test_no_churn_is_heun():
    x = edm_stochastic(gaussian_denoiser, states(), EDM_TIMES, fresh(), Churn())
    assert torch.equal(x, ode_heun(velocity_of(gaussian_denoiser), states(), EDM_TIMES))
