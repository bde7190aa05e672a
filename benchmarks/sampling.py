"""Samples per second and latency of few-step sampling, beside 35 calls of EDM's Heun sampler."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.common import (
    Subject,
    autocast,
    chosen,
    interleaved,
    machine,
    network_parser,
    parsed,
    print_table,
)
from fastflow.generate import default_times, generate
from fastflow.network import Network
from fastflow.sampling import karras_times, ode_heun, velocity_of

STEPS = (1, 2, 4, 8)
HEUN = 18  # of its steps, the last one Euler's: 35 calls


def samplers(
    subject: Subject, options: argparse.Namespace, network: Network, batch: int
) -> dict[str, Callable[[], Tensor]]:
    """Samplers of a batch by name."""
    device = torch.device(options.device)
    method, shape = subject.experiment.method, network.sample_shape

    def flow_map(steps: int) -> Tensor:
        times = default_times(method, steps)
        with autocast(options):
            return generate(method, network, range(batch), shape, times, device=device)

    @torch.no_grad()
    def heun(steps: int) -> Tensor:
        times = (*karras_times(steps), 0.0)
        x = torch.randn(batch, *shape, dtype=torch.float64, device=device) * times[0]
        velocity = velocity_of(lambda x, t: network(x.float(), t).double())
        with autocast(options):
            return ode_heun(velocity, x, times)

    few = {f"CM, {steps} step{'s' * (steps > 1)}": lambda n=steps: flow_map(n) for steps in STEPS}
    return {**few, f"EDM Heun, {2 * HEUN - 1} NFE": lambda: heun(HEUN)}


def main(argv: Sequence[str] | None = None) -> None:
    options = parsed(network_parser(__doc__ or ""), argv)
    rows = [("network", "sampler", "batch", "samples/s", "speed-up", "latency of 1, ms")]
    for subject in chosen(options):
        network = subject.network(torch.device(options.device)).eval()
        many = interleaved(samplers(subject, options, network, subject.batch), options)
        one = interleaved(samplers(subject, options, network, 1), options)
        slowest = statistics.median(list(many.values())[-1])
        for name, seconds in many.items():
            median = statistics.median(seconds)
            rows.append(
                (
                    subject.name,
                    name,
                    str(subject.batch),
                    f"{subject.batch / median:.1f}",
                    f"{slowest / median:.1f}x",
                    f"{1000 * statistics.median(one[name]):.1f}",
                )
            )
    print_table(f"sampling, {options.precision}, {machine(options)}", rows)


if __name__ == "__main__":
    main()
