"""What a tangent costs beside an ordinary step of the same network, by engine.

A step is a forward and a backward pass; with a tangent, `value_and_jvp` takes the forward pass's
place. Pairs do the forward pass's work once more for the tangents; in a network of matrix products
and convolutions alone that is 4/3 of the time, with the memory of an ordinary step.
"""

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
    median_ratio,
    network_parser,
    parsed,
    peak_memory,
    print_table,
)
from fastflow.network import Network
from fastflow.tangent import (
    DualNumbers,
    FiniteDifference,
    FunctionalJVP,
    Pairs,
    TangentEngine,
    value_and_jvp,
)

ENGINES: tuple[TangentEngine, ...] = (
    Pairs(),
    DualNumbers(),
    FiniteDifference(step=5e-3),
    FunctionalJVP(),
)


def steps(
    subject: Subject, options: argparse.Namespace, network: Network
) -> dict[str, Callable[[], None]]:
    """Forward and backward without a tangent, and with each engine's."""
    device = torch.device(options.device)
    x = torch.randn(subject.batch, *network.sample_shape, device=device)
    t = torch.rand(subject.batch, device=device) + 0.1
    dx = torch.randn_like(x)
    cond = None
    if network.cond_dim:
        rows = torch.arange(subject.batch) % network.cond_dim
        cond = torch.eye(network.cond_dim, device=device)[rows]

    def f(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = network(x, t, cond=cond)
        return out

    def step(value: Callable[[], Tensor]) -> None:
        network.zero_grad(set_to_none=True)
        with autocast(options):
            loss = value().square().mean()
        loss.backward()

    def along(engine: TangentEngine) -> Tensor:
        value, tangent = value_and_jvp(f, (x, t), (dx, torch.ones_like(t)), engine)
        return value + tangent

    actions = {"no tangent": lambda: step(lambda: f(x, t))}
    for engine in ENGINES:
        actions[engine.name] = lambda engine=engine: step(lambda: along(engine))
    return actions


def main(argv: Sequence[str] | None = None) -> None:
    options = parsed(network_parser(__doc__ or ""), argv)
    device = torch.device(options.device)
    rows = [("network", "parameters", "batch", "tangent", "seconds", "ratio", "peak MiB", "ratio")]
    for subject in chosen(options):
        network = subject.network(device)
        actions = steps(subject, options, network)
        # First: the process keeps memory that the last engine frees.
        memory = {name: peak_memory(action, device) for name, action in actions.items()}
        seconds = interleaved(actions, options)
        count = sum(p.numel() for p in network.parameters())
        for name in actions:
            rows.append(
                (
                    subject.name,
                    f"{count / 1e6:.2f} M",
                    str(subject.batch),
                    name,
                    f"{statistics.median(seconds[name]):.4f}",
                    f"{median_ratio(seconds[name], seconds['no tangent']):.2f}",
                    f"{memory[name]:.0f}",
                    f"{memory[name] / memory['no tangent']:.2f}",
                )
            )
    print_table(f"forward and backward, {options.precision}, {machine(options)}", rows)


if __name__ == "__main__":
    main()
