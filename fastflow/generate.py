"""Samples from a trained flow map: seeds in, samples out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow.distributed import reshard
from fastflow.errors import ConfigError
from fastflow.method import FlowMapMethod
from fastflow.network import Network
from fastflow.rng import SampleNoise
from fastflow.sampling import prior
from fastflow.times import karras_grid


def default_times(method: FlowMapMethod, steps: int) -> tuple[float, ...]:
    """Start times of `steps` jumps where a configuration names none: a Karras grid, rho = 7.

    The grid is taken in the noise-to-signal ratio from the path's `t_max` down, so that it means
    the same on every path; its last point, where the last jump would start from almost no noise,
    is left out. Pure noise and pure data count as ratios of 80 and 0.002.
    """
    path = method.path
    if steps == 1:
        return (path.t_max,)
    bounds = torch.tensor([max(path.t_min, method.s_min), path.t_max], dtype=torch.float64)
    low, high = path.nsr(bounds).tolist()
    low, high = low if low > 0 else 0.002, high if math.isfinite(high) else 80.0
    ratios = karras_grid(steps + 1, low, high, rho=7.0).flip(0)[1:-1]
    return (path.t_max, *path.t_of_nsr(ratios).tolist())


def step_times(
    method: FlowMapMethod, steps: int, between: Sequence[float] | None = None
) -> tuple[float, ...]:
    """All start times of a `steps`-step sampler: `t_max`, then the intermediate times.

    Args:
        method: gives the path.
        steps: number of network calls without guidance.
        between: the `steps - 1` intermediate times, decreasing; None takes `default_times`.

    Raises:
        ConfigError: a wrong number of times, or times that do not decrease from t_max to s_min.
    """
    if steps < 1:
        raise ConfigError(f"steps: {steps} given, a whole number from 1 up is accepted")
    if between is None:
        return default_times(method, steps)
    times = (method.path.t_max, *between)
    falling = all(a > b for a, b in zip(times, (*between, method.s_min), strict=True))
    if len(times) != steps or not falling:
        raise ConfigError(
            f"times: {tuple(between)} given for {steps} steps; accepted: {steps - 1} decreasing "
            f"values between {method.path.t_max:g} and {method.s_min:g}"
        )
    return times


@torch.no_grad()
def generate(
    method: FlowMapMethod,
    network: Network,
    seeds: Sequence[int],
    shape: tuple[int, ...],
    times: Sequence[float],
    cond: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Samples [B, *shape], float32; sample i depends on seeds[i] (and cond[i]) alone.

    The network is evaluated in eval mode; the state is kept in float64 between the jumps.

    Args:
        method: how the network maps.
        network: trained weights, on `device`.
        seeds: one per sample.
        shape: of one sample.
        times: start time of each step of `method.sample`, decreasing from t_max.
        cond: class rows [B, cond_dim], or None.
    """
    noise = SampleNoise(seeds, torch.device(device))
    was_training = network.training
    network.eval()

    def flow_map(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return method.flow_map(network, x.float(), t, s, cond).double()

    def draw() -> Tensor:
        return noise.normal(shape, dtype=torch.float64)

    try:
        x = prior(draw(), method.path, times[0])
        return method.sample(flow_map, x, times, draw).float()
    finally:
        network.train(was_training)
        reshard(network)
