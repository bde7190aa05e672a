"""What a tangent costs beside an ordinary step of the same network, by engine.

A step is a forward and a backward pass; with a tangent, `value_and_jvp` takes the forward pass's
place. Pairs do the forward pass's work once more for the tangents; in a network of matrix products
and convolutions alone that is 4/3 of the time, with the memory of an ordinary step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.common import (
    COSTS,
    Subject,
    a_batch,
    autocast,
    chosen,
    costs,
    machine,
    network_parser,
    parsed,
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
    x, cond = a_batch(network, subject.batch, device)
    t = torch.rand(subject.batch, device=device) + 0.1
    dx = torch.randn_like(x)

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
    rows: list[tuple[str, ...]] = [("network", "parameters", "batch", "tangent", *COSTS)]
    for subject in chosen(options):
        network = subject.network(device)
        count = sum(p.numel() for p in network.parameters())
        about = (subject.name, f"{count / 1e6:.2f} M", str(subject.batch))
        for name, cells in costs(steps(subject, options, network), options).items():
            rows.append((*about, name, *cells))
    print_table(f"forward and backward, {options.precision}, {machine(options)}", rows)


if __name__ == "__main__":
    main()
