"""What a consistency-training step costs beside a plain denoising step of the same network.

Both are whole optimizer steps with gradient clipping and an EMA. A denoising step is a forward
and a backward pass; consistency training adds the target's forward pass without gradient, so
that about 4/3 of the time at equal memory is the best that can be expected.
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
from fastflow.config import build
from fastflow.data.batch import Batch
from fastflow.ema import EMA, ConstantEMA
from fastflow.method import Networks
from fastflow.network import Network
from fastflow.path import expand
from fastflow.progress import Progress
from fastflow.rng import Draws


def steps(
    subject: Subject, options: argparse.Namespace, network: Network
) -> dict[str, Callable[[], None]]:
    """A denoising step and a step of the subject's method, on one network and optimizer."""
    device = torch.device(options.device)
    method = subject.experiment.method
    optimizer = build(subject.experiment.optimizer, params=list(network.parameters()))
    ema = EMA(network, ConstantEMA(beta=0.999))
    x = torch.rand(subject.batch, *network.sample_shape, device=device) * 2 - 1
    cond = None
    if network.cond_dim:
        cond = torch.eye(network.cond_dim, device=device)[
            torch.arange(subject.batch) % network.cond_dim
        ]
    now = Progress(
        step=0,
        images=0,
        total_steps=1,
        batch_size=subject.batch,
        curriculum={"ratio": 0.9, "N": 18.0},
    )
    count = 0

    def batch() -> Batch:
        nonlocal count
        count += 1
        draws = Draws(0, count, tuple(range(subject.batch)), device, total=subject.batch)
        return Batch(x=x, cond=cond, augment=None, draws=draws)

    def step(loss: Callable[[], Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(options):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        ema.update(network, now)

    return {
        "denoising": lambda: step(lambda: denoising_loss(network, batch())),
        type(method).__name__: lambda: step(
            lambda: method.loss(Networks(network), batch(), now).per_sample.mean()
        ),
    }


def denoising_loss(network: Network, batch: Batch) -> Tensor:
    """EDM's loss (arXiv 2206.00364, table 1), with the draws a method would take."""
    sigma = torch.exp(batch.draws.normal("t", ()) * 1.2 - 1.2)
    eps = batch.draws.normal("eps", batch.x.shape[1:])
    denoised = network(batch.x + expand(sigma, batch.x) * eps, sigma, cond=batch.cond)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    return (weight * (denoised - batch.x).square().flatten(1).mean(1)).mean()


def main(argv: Sequence[str] | None = None) -> None:
    options = parsed(network_parser(__doc__ or ""), argv)
    device = torch.device(options.device)
    rows = [("network", "parameters", "batch", "step", "seconds", "ratio", "peak MiB", "ratio")]
    for subject in chosen(options):
        network = subject.network(device)
        actions = steps(subject, options, network)
        seconds = interleaved(actions, options)
        memory = {name: peak_memory(action, device) for name, action in actions.items()}
        count = sum(p.numel() for p in network.parameters())
        for name in actions:
            rows.append(
                (
                    subject.name,
                    f"{count / 1e6:.2f} M",
                    str(subject.batch),
                    name,
                    f"{statistics.median(seconds[name]):.4f}",
                    f"{median_ratio(seconds[name], seconds['denoising']):.2f}",
                    f"{memory[name]:.0f}",
                    f"{memory[name] / memory['denoising']:.2f}",
                )
            )
    print_table(f"optimizer step, {options.precision}, {machine(options)}", rows)


if __name__ == "__main__":
    main()
