"""Samplers as plain functions of callables: few-step flow maps, ODE and SDE solvers, guidance.

A flow map is `flow_map(x, t, s) -> x_s`, a denoiser `denoiser(x, t) -> D`, a velocity
`velocity(x, t) -> dx/dt`; x is [B, ...] and times reach them as float64 tensors [B]. Step times
are plain numbers, decreasing, so nothing is read back from a device. The state keeps the type it
starts with: start from float64 to sample as EDM does. `noise()` returns fresh unit-variance noise
of the state's shape, e.g. `lambda: sample_noise.normal(shape)` with `fastflow.rng.SampleNoise`;
a sampler draws from nothing else. No sampler clamps its result: wrap the denoiser or the flow map
in `clamped` for OpenAI's `clip_denoised`.

NFE below counts calls of the function given; guidance with scale != 1 doubles it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fastflow.errors import ConfigError
from fastflow.parts import Part
from fastflow.path import VE, Path, scaled
from fastflow.times import karras_grid

Denoiser: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
FlowMap: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
Noise: TypeAlias = Callable[[], Tensor]

_VE = VE()


# Times and starting states


def karras_times(
    n: int, t_min: float = 0.002, t_max: float = 80.0, rho: float = 7.0
) -> tuple[float, ...]:
    """The n times of a Karras grid, t_max first.

    EDM's solvers run on `(*karras_times(18), 0.0)`: 18 steps, of which the last is to 0.
    """
    return tuple(karras_grid(n, t_min, t_max, rho).flip(0).tolist())


def prior(noise: Tensor, path: Path, t: float) -> Tensor:
    """Where sampling starts: b(t) eps, which forgets the data's (tiny) share of x_t."""
    return scaled(path.b(_at(t, noise)), noise)


def renoise(x: Tensor, s: float, t: float, noise: Tensor, path: Path) -> Tensor:
    """Add the noise that takes a state at time s to the law of time t >= s.

    x_t = (a_t/a_s) x_s + sqrt(b_t^2 - (a_t/a_s)^2 b_s^2) eps. From s = 0 this is a_t x + b_t eps;
    in VE from s = eps the standard deviation is sqrt(t^2 - eps^2).
    """
    low, high = _at(s, x), _at(t, x)
    ratio = path.a(high) / path.a(low)
    std = torch.sqrt(path.b(high) ** 2 - (ratio * path.b(low)) ** 2)
    return scaled(ratio, x) + scaled(std, noise)


# Flow maps


def one_step(flow_map: FlowMap, x: Tensor, t_max: float, s_min: float = 0.0) -> Tensor:
    """Jump from a state at t_max to s_min. NFE 1."""
    return flow_map(x, _at(t_max, x), _at(s_min, x))


def multistep(
    flow_map: FlowMap,
    x: Tensor,
    times: Sequence[float],
    noise: Noise,
    path: Path,
    s_min: float = 0.0,
) -> Tensor:
    """Stochastic consistency sampling (arXiv 2303.01469, Algorithm 1). NFE len(times).

    From each time, jump to s_min; between jumps, re-noise to the next time. `s_min` is where the
    map truly lands and sets how much noise is added: OpenAI's models stop at x_eps (s_min=0.002,
    std sqrt(t^2 - eps^2)), ECT's at x_0 (s_min=0, std t).

    Args:
        flow_map: the map, called with s = s_min.
        x: state [B, ...] at times[0].
        times: start of each jump, decreasing and above s_min.
        noise: called between jumps.
        path: the map's interpolant.
        s_min: time of the result.
    """
    _check_falling((*times, s_min))
    x = one_step(flow_map, x, times[0], s_min)
    for t in times[1:]:
        x = one_step(flow_map, renoise(x, s_min, t, noise(), path), t, s_min)
    return x


def jumps(flow_map: FlowMap, x: Tensor, times: Sequence[float]) -> Tensor:
    """Deterministic jumps times[0] -> times[1] -> ... of a map of two times. NFE len(times)-1."""
    for t, s in _intervals(times):
        x = flow_map(x, _at(t, x), _at(s, x))
    return x


# Probability-flow ODE, in the native time of any path


def velocity_of(denoiser: Denoiser, path: Path = _VE) -> Velocity:
    """The ODE's dx/dt = a' D + b' E on `path`, from D in that path's own x and t. For t > 0."""
    return lambda x, t: path.velocity_from_denoised(x, denoiser(x, t), t)


def on_path(denoiser: Denoiser, path: Path) -> Denoiser:
    """A VE denoiser (of x0 + sigma eps, at sigma) in the x and t of another path, where a > 0."""
    return lambda x, t: denoiser(*path.convert(x, t, _VE))


def ode_euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Euler's method. NFE len(times)-1.

    On `(*karras_times(n), 0.0)` it is OpenAI's "euler"; on `karras_times(n + 1)`, without the 0,
    its "progdist".
    """
    for t, s in _intervals(times):
        x = x + (s - t) * velocity(x, _at(t, x))
    return x


def ode_heun(velocity: Velocity, x: Tensor, times: Sequence[float], alpha: float = 1.0) -> Tensor:
    """Second-order solver (arXiv 2206.00364, Algorithm 3). NFE 2 (len(times)-1).

    One call less when the last time is 0: there a velocity made from a denoiser is undefined and
    the step is Euler's, so EDM's 18 steps cost 35 calls.

    Args:
        velocity: dx/dt.
        x: state [B, ...] at times[0].
        times: decreasing.
        alpha: where in the step the second call is made; 1 is Heun, 1/2 the midpoint rule.
    """
    for t, s in _intervals(times):
        x = _heun_step(velocity, x, t, s, alpha)
    return x


def _heun_step(velocity: Velocity, x: Tensor, t: float, s: float, alpha: float = 1.0) -> Tensor:
    h = s - t
    first = velocity(x, _at(t, x))
    if s == 0:
        return x + h * first
    inner = t + alpha * h
    second = velocity(x + alpha * h * first, _at(inner, x))
    weight = 1 / (2 * alpha)
    return x + h * ((1 - weight) * first + weight * second)


def ddim(denoiser: Denoiser, x: Tensor, times: Sequence[float], path: Path) -> Tensor:
    """DDIM (arXiv 2010.02502): exact while D is constant, in any path. NFE len(times)-1.

    The denoiser takes the path's own x and t. In VE and on the linear path this is Euler's method.
    """
    for t, s in _intervals(times):
        start = _at(t, x)
        x = path.ddim(x, denoiser(x, start), start, _at(s, x))
    return x


def dpm2(denoiser: Denoiser, x: Tensor, times: Sequence[float]) -> Tensor:
    """A midpoint rule in VE whose midpoint lies halfway in t^(1/3). NFE 2 (len(times)-1).

    OpenAI's "dpm" (DPM-Solver-2 of k-diffusion) on `(*karras_times(n), 0.0)`.
    """
    velocity = velocity_of(denoiser)
    for t, s in _intervals(times):
        middle = ((t ** (1 / 3) + s ** (1 / 3)) / 2) ** 3
        inner = x + (middle - t) * velocity(x, _at(t, x))
        x = x + (s - t) * velocity(inner, _at(middle, x))
    return x


# Stochastic samplers, in VE


@dataclass(frozen=True, kw_only=True)
class Churn(Part):
    """Noise added before each step of `edm_stochastic`, by the names of arXiv 2206.00364.

    Attributes:
        s_churn: total amount, spread evenly over the steps.
        s_tmin: lowest time at which noise is added.
        s_tmax: highest.
        s_noise: standard deviation of what is added, slightly above 1 against lost detail.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.s_churn < 0 or self.s_noise <= 0 or not 0 <= self.s_tmin <= self.s_tmax:
            raise ConfigError(
                f"{self} given; s_churn >= 0, s_noise > 0 and 0 <= s_tmin <= s_tmax accepted"
            )

    def raised(self, t: float, steps: int) -> float:
        """The time t (1 + gamma) to which a state at t is re-noised."""
        if not self.s_tmin <= t <= self.s_tmax:
            return t
        return t + min(self.s_churn / steps, math.sqrt(2) - 1) * t


def edm_stochastic(
    denoiser: Denoiser, x: Tensor, times: Sequence[float], noise: Noise, churn: Churn
) -> Tensor:
    """EDM's stochastic sampler (arXiv 2206.00364, Algorithm 2). NFE as `ode_heun`.

    Noise is drawn once per step whether or not it is used, as EDM's and OpenAI's code do (EDM2's
    draws only where it is used).
    """
    velocity = velocity_of(denoiser)
    for t, s in _intervals(times):
        higher = churn.raised(t, len(times) - 1)
        x = x + math.sqrt(higher**2 - t**2) * churn.s_noise * noise()
        x = _heun_step(velocity, x, higher, s)
    return x


def euler_ancestral(denoiser: Denoiser, x: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
    """Euler to below each time, then noise back up to it. NFE len(times)-1.

    From t the ODE is followed to s^2/t and noise of std s sqrt(1 - s^2/t^2) is added: OpenAI's
    "ancestral". Noise is drawn once per step, unused in a step to 0.
    """
    velocity = velocity_of(denoiser)
    for t, s in _intervals(times):
        x = x + (s**2 / t - t) * velocity(x, _at(t, x))
        x = x + s * math.sqrt(1 - (s / t) ** 2) * noise()
    return x


# Wrappers


def guided(
    network: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    scale: float,
    cond: Tensor | None,
    null_cond: Tensor | None,
) -> Denoiser:
    """Classifier-free guidance, D_w = D_u + w (D_c - D_u): w = 1 means none.

    Args:
        network: `(x, t, cond)` to a denoised state; a velocity or a noise will do as well, since
            the combination is linear.
        scale: w. At 1 the network is called once, with `cond`; otherwise twice.
        cond: class rows [B, cond_dim].
        null_cond: the unconditional rows, or None if that is how the network takes them.
    """
    if scale == 1:
        return lambda x, t: network(x, t, cond)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        unconditional = network(x, t, null_cond)
        return unconditional + scale * (network(x, t, cond) - unconditional)

    return denoise


def clamped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same denoiser or flow map, its result clamped to the data's range [-1, 1]."""
    return lambda *args: function(*args).clamp(-1, 1)


class Counting:
    """The same function, counting its calls: the NFE of whatever sampler it is handed to."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *args: Tensor | None) -> Tensor:
        self.calls += 1
        return self.function(*args)


def _at(t: float, x: Tensor) -> Tensor:
    """The time of every row, [B] in float64."""
    return torch.full((x.shape[0],), t, dtype=torch.float64, device=x.device)


def _intervals(times: Sequence[float]) -> list[tuple[float, float]]:
    _check_falling(times)
    return list(itertools.pairwise(times))


def _check_falling(times: Sequence[float]) -> None:
    falling = all(t > s for t, s in itertools.pairwise(times))
    if len(times) < 2 or not falling or times[-1] < 0:
        raise ConfigError(
            f"step times {', '.join(f'{t:g}' for t in times)} given (the last is where sampling "
            f"ends); at least two strictly decreasing values >= 0 accepted"
        )
