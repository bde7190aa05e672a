"""What samples cost: few steps of a flow map beside the same network run as a diffusion model."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastflow.build import build_network
from fastflow.config import Lazy
from fastflow.distributed import prepare
from fastflow.experiment import Experiment
from fastflow.generate import default_times, generate
from fastflow.method import FlowMapMethod, Frozen, Networks
from fastflow.network import Network
from fastflow.path import VE
from fastflow.sampling import euler_ancestral, karras_times, ode_heun, velocity_of
from fastflow.tables import Format, aligned, as_csv, as_json, as_markdown, widths
from fastflow.teacher import denoised_by
from fastflow.timing import Stopwatch

STEPS = (1, 2, 4, 8)
HEUN = 18  # EDM's steps (arXiv 2206.00364), the last one Euler's: 35 calls
ANCESTRAL = 1000  # steps, a call each


@dataclasses.dataclass(frozen=True)
class Run:
    """A sampler of a batch, or the beginning of one.

    Attributes:
        nfe: network calls of the whole sampler for a sample.
        timed: calls that `action` makes, the first ones; all steps cost the same.
        action: runs them.
    """

    nfe: int
    timed: int
    action: Callable[[], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """What one sampler takes.

    Attributes:
        sampler: its name.
        nfe, timed: network calls of a sample, and those of them that were timed.
        batch: samples at once.
        images_per_second: of a batch, from the median over the turns.
        speed_up: over the whole of Heun's 35 calls.
        latency: seconds for one sample alone.
    """

    sampler: str
    nfe: int
    timed: int
    batch: int
    images_per_second: float
    speed_up: float
    latency: float


def network_of(
    experiment: Experiment,
    device: torch.device,
    *,
    precision: str = "fp32",
    compile: bool = False,
) -> Network:
    """What an experiment's method samples with, with random weights: speed is that of trained ones.

    Args:
        experiment: gives network and method.
        device: where it goes.
        precision: "fp32" or "bf16", in which the network then computes by autocast.
        compile: compile each block.

    Raises:
        ConfigError: it cannot be compiled.
    """
    narrow = torch.bfloat16 if precision == "bf16" else None

    def ready(key: str, node: Lazy) -> Network:
        network = build_network(experiment, key, node)
        prepare(network, device, compile=compile, narrow=narrow)
        return network.to(device).eval().requires_grad_(False)

    student = ready("network", experiment.network)
    method, companions = experiment.method, {}
    for name in sorted(method.sampling_companions):
        spec = method.companions()[name]
        node = (spec.network if isinstance(spec, Frozen) else None) or experiment.network
        companions[name] = ready(name, node)
    return method.for_sampling(Networks(student, companions)).eval()


def samplers(
    method: FlowMapMethod, network: Network, batch: int, timed: int = 2 * HEUN - 1
) -> dict[str, Run]:
    """Samplers of a batch by name: flow maps of a few steps, EDM's Heun, and an ancestral one.

    All run without guidance; the classes of a conditional network are given in turn. Noise of the
    flow maps is drawn for each seed by itself, as in evaluation, and that of the other two at
    once, which is in their favour.

    Args:
        method: how the network maps.
        network: on its device.
        batch: samples.
        timed: steps of the ancestral sampler that are run, of 1,000.
    """
    device = next(network.parameters()).device
    shape, cond = network.sample_shape, None
    if network.cond_dim:
        cond = torch.eye(network.cond_dim, device=device)[torch.arange(batch) % network.cond_dim]
    path = VE()
    by_network = denoised_by(network, path, cond)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return by_network(x.float(), t).double()

    def start(t: float) -> Tensor:
        return torch.randn(batch, *shape, dtype=torch.float64, device=device) * t

    def few(steps: int) -> Tensor:
        times = default_times(method, steps)
        return generate(method, network, range(batch), shape, times, cond, device)

    @torch.no_grad()
    def heun() -> Tensor:
        times = (*karras_times(HEUN), 0.0)
        return ode_heun(velocity_of(denoiser), start(times[0]), times)

    @torch.no_grad()
    def ancestral() -> Tensor:
        times = (*karras_times(ANCESTRAL), 0.0)[: timed + 1]
        x = start(times[0])
        return euler_ancestral(denoiser, x, times, lambda: torch.randn_like(x))

    name = type(method).__name__
    found = {
        f"{name}, {steps} step{'s' * (steps > 1)}": Run(steps, steps, functools.partial(few, steps))
        for steps in STEPS
    }
    found["EDM Heun"] = Run(2 * HEUN - 1, 2 * HEUN - 1, heun)
    found["ancestral"] = Run(ANCESTRAL, timed, ancestral)
    return found


def speeds(
    method: FlowMapMethod,
    network: Network,
    batch: int,
    watch: Stopwatch,
    timed: int = 2 * HEUN - 1,
) -> list[Speed]:
    """Measure all samplers, taking turns, in batches and one sample at a time.

    Arguments are those of `samplers`.
    """
    many, one = (samplers(method, network, size, timed) for size in (batch, 1))
    of_batch, of_one = _medians(many, watch), _medians(one, watch)
    return [
        Speed(
            sampler=name,
            nfe=run.nfe,
            timed=run.timed,
            batch=batch,
            images_per_second=batch / of_batch[name],
            speed_up=of_batch["EDM Heun"] / of_batch[name],
            latency=of_one[name],
        )
        for name, run in many.items()
    ]


def _medians(runs: Mapping[str, Run], watch: Stopwatch) -> dict[str, float]:
    """Seconds of each whole sampler."""
    seconds = watch.interleaved({name: run.action for name, run in runs.items()})
    return {
        name: statistics.median(seconds[name]) * run.nfe / run.timed for name, run in runs.items()
    }


HEAD = ("sampler", "NFE", "timed", "images/s", "speed-up", "latency of 1, ms")


def cells(speed: Speed) -> tuple[str, ...]:
    """A row under `HEAD`."""
    part = "all" if speed.timed == speed.nfe else f"{speed.timed} of {speed.nfe:,}"
    return (
        speed.sampler,
        f"{speed.nfe:,}",
        part,
        f"{speed.images_per_second:,.4g}",
        f"{speed.speed_up:.3g}x",
        f"{1000 * speed.latency:,.4g}",
    )


def render(title: str, found: list[Speed], format: Format) -> str:
    """The measurements as a table."""
    records = [dataclasses.asdict(speed) for speed in found]
    if format == "json":
        return as_json(records)
    if format == "csv":
        return as_csv(tuple(records[0]), records)
    rows = [cells(speed) for speed in found]
    if format == "markdown":
        return as_markdown(HEAD, rows)
    columns = widths(HEAD, rows)
    return "\n".join([title, *(aligned(row, columns) for row in (HEAD, *rows))])
