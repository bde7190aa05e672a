"""What a step of each method costs beside a plain denoising step of the same network.

All are whole optimizer steps with gradient clipping and an EMA, on the same weights. A denoising
step is a forward and a backward pass, and a backward pass costs about two forward ones, so the best
to be expected is 4/3 of its time with one forward pass more (a target; the tangents that `Pairs`
carry along) and 5/3 with two (finite differences).

The methods are those of the CIFAR-10 configurations, on every network. For CIFAR-10's, "at most"
is what each should keep to, and "FastGen" what NVIDIA FastGen took, on two CPU cores by the wall
clock in batches of 4, without clipping and EMA on either side.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from benchmarks.common import (
    CIFAR10,
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
from configs.experiments.EDM import (
    config_cm_cifar10,
    config_ect_cifar10,
    config_ict_cifar10,
    config_mf_cifar10,
    config_sct_cifar10,
    config_tcm_cifar10,
)
from fastflow.config import build
from fastflow.data.batch import Batch
from fastflow.ema import EMA, ConstantEMA
from fastflow.method import FlowMapMethod, Networks
from fastflow.network import Network
from fastflow.path import expand
from fastflow.path_difference import PathDifference
from fastflow.progress import Progress
from fastflow.rng import Draws
from fastflow.time_difference import BoundedDifference
from fastflow.wrappers import EDMDenoiser, TrigFlowNetwork, VelocityNetwork
from networks.edm2 import LogVariance

BASE = "denoising"
REFERENCES = {
    BASE: ("-", "1.00"),
    "CM": ("1.40", "1.52"),
    "iCT": ("1.40", "-"),
    "ECT": ("1.40", "-"),
    "sCM, exact": ("1.55", "2.37"),
    "sCM, finite differences": ("-", "1.98"),
    "MeanFlow, exact": ("1.55", "2.20"),
    "MeanFlow, finite differences": ("-", "1.82"),
    "TCM": ("1.60", "1.85"),
}
"""What to keep to, and what FastGen took, relative to a denoising step of CIFAR-10's network."""


def methods() -> dict[str, FlowMapMethod]:
    """The methods by the names of their rows; TCM, which needs a second network, is the last."""
    sct = config_sct_cifar10.experiment().method
    mf = config_mf_cifar10.experiment().method
    return {
        "CM": config_cm_cifar10.experiment().method,
        "iCT": config_ict_cifar10.experiment().method,
        "ECT": config_ect_cifar10.experiment().method,
        "sCM, exact": sct,
        "sCM, finite differences": dataclasses.replace(sct, engine=PathDifference()),
        "MeanFlow, exact": mf,
        "MeanFlow, finite differences": dataclasses.replace(
            mf, engine=BoundedDifference(step=1e-4)
        ),
        "TCM": config_tcm_cifar10.experiment().method,
    }


def students(subject: Subject, device: torch.device) -> dict[str, Network]:
    """One raw network as each method expects it, by `expects`; they share its weights."""
    torch.manual_seed(0)
    model = subject.experiment.network.model
    with device:
        raw, of_two_times = build(model), build(model.replace(two_times=True))
        # With `assign` the parameters are the same ones, not copies.
        of_two_times.load_state_dict(raw.state_dict(keep_vars=True), strict=False, assign=True)
        return {
            "denoiser": EDMDenoiser(raw),
            "trigflow": TrigFlowNetwork(raw, time="log_sigma", logvar_head=LogVariance()),
            "velocity": VelocityNetwork(of_two_times),
        }


def steps(
    subject: Subject, options: argparse.Namespace, nets: Mapping[str, Network]
) -> dict[str, Callable[[], None]]:
    """A denoising step and one of each method, on one set of weights with one optimizer."""
    device, weights = torch.device(options.device), nn.ModuleDict(nets)
    optimizer = build(subject.experiment.optimizer, params=list(weights.parameters()))
    ema = EMA(weights, ConstantEMA(beta=0.999))
    x, cond = a_batch(nets["denoiser"], subject.batch, device)
    now = Progress(
        step=0,
        images=0,
        total_steps=1,
        batch_size=subject.batch,
        curriculum={"ratio": 0.9, "N": 18.0},
    )
    count = 0

    @functools.cache
    def frozen() -> Network:
        return copy.deepcopy(nets["denoiser"]).requires_grad_(False)

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
        torch.nn.utils.clip_grad_norm_(weights.parameters(), 1.0)
        optimizer.step()
        ema.update(weights, now)

    def trained(method: FlowMapMethod) -> Tensor:
        companions = {name: frozen() for name in method.companions()}
        given = Networks(nets[method.expects], companions)
        per_sample: Tensor = method.loss(given, batch(), now).per_sample
        return per_sample.mean()

    return {
        BASE: lambda: step(lambda: denoising_loss(nets["denoiser"], batch())),
        **{
            name: functools.partial(step, functools.partial(trained, method))
            for name, method in methods().items()
        },
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
    rows: list[tuple[str, ...]] = [
        ("network", "parameters", "batch", "step", *COSTS, "at most", "FastGen")
    ]
    for subject in chosen(options):
        nets = students(subject, device)
        count = sum(p.numel() for p in nets["denoiser"].parameters())
        about = (subject.name, f"{count / 1e6:.2f} M", str(subject.batch))
        for name, cells in costs(steps(subject, options, nets), options).items():
            references = REFERENCES[name] if subject.name == CIFAR10 else ("-", "-")
            rows.append((*about, name, *cells, *references))
    print_table(f"optimizer step, {options.precision}, {machine(options)}", rows)


if __name__ == "__main__":
    main()
