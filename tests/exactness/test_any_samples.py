"""Every method takes samples of any shape, batches of one, both types, and labels or none."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from consistency_fakes import GivenNoise, now
from fastflow.consistency import GridPairing, Heun
from fastflow.data.batch import Batch
from fastflow.generate import default_times, generate
from fastflow.guidance import MixedGuidance
from fastflow.method import FlowMapMethod, Frozen, Networks
from fastflow.network import Network
from fastflow.path import expand
from fastflow.raw import RawNetwork
from fastflow.regression import AdaptiveL2
from fastflow.schedules import FixedDecay
from fastflow.teacher import Teacher
from fastflow.times import LogNormal, PairLaw
from fastflow.wrappers import EDMDenoiser, TrigFlowNetwork, VelocityNetwork
from methods.cm import CM
from methods.continuous_cm import ContinuousCM
from methods.ect import ECT
from methods.edm import EDM
from methods.flow_matching import FlowMatching
from methods.ict import ICT
from methods.mean_flow import MeanFlow, MeanFlowEDM
from methods.scm import SCM
from methods.tcm import TCM

CLASSES, LABELS = 3, 2
CURRICULUM = now(N=18, ratio=0.9)
ANY = Frozen(weights="unused: tests hand the networks over")
GUIDED = Teacher(source=ANY, guidance=2.0)
SQUARED = AdaptiveL2(power=0.0)
METHODS: dict[str, FlowMapMethod] = {
    "CT": CM(pairs=GridPairing(), target=FixedDecay(mu=0.9)),
    "CD": CM(pairs=GridPairing(), teacher=GUIDED, step=Heun()),
    "CT in continuous time": ContinuousCM(),
    "CD in continuous time": ContinuousCM(teacher=GUIDED),
    "iCT": ICT(),
    "ECT": ECT(),
    "ECD": ECT(teacher=GUIDED),
    "TCM": TCM(stage1=ANY),
    "sCT": SCM(),
    "sCD": SCM(teacher=GUIDED),
    "MeanFlow": MeanFlow(regression=SQUARED),
    "MeanFlow, guided": MeanFlow(regression=SQUARED, guidance=MixedGuidance(omega=2.0, kappa=0.5)),
    "MeanFlow, distilled": MeanFlow(regression=SQUARED, teacher=GUIDED),
    "MeanFlow on EDM's path": MeanFlowEDM(
        times=PairLaw(times=LogNormal(mean=-1.1, std=1.6), equal=0.25), regression=SQUARED
    ),
    "EDM": EDM(),
    "flow matching": FlowMatching(),
}
SHAPES = [(5,), (1, 4, 4), (3, 4, 6), (2, 3, 4, 5)]
each_method = pytest.mark.parametrize("name", METHODS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


class AnyRaw(RawNetwork):
    """tanh(a x + b + times + labels), for samples of any shape."""

    def __init__(self, shape: tuple[int, ...], two_times: bool, seed: int) -> None:
        super().__init__()
        self.sample_shape, self.two_times = shape, two_times
        self.cond_dim, self.augment_dim = CLASSES, LABELS
        generator = torch.Generator().manual_seed(seed)

        def weights(*size: int) -> nn.Parameter:
            return nn.Parameter(0.3 * torch.randn(*size, generator=generator))

        self.a, self.b = weights(*shape), weights(*shape)
        self.times = weights(2 if two_times else 1)
        self.labels, self.augments = weights(CLASSES), weights(LABELS)

    def forward(self, x, c_noise, cond=None, augment=None, c_second=None, guidance=None):
        given = self.conditions(c_noise, cond, augment, c_second, guidance)
        seconds = [] if given.c_second is None else [given.c_second]
        times = torch.stack([given.c_noise, *seconds], 1).to(self.times.dtype)
        sums = times @ self.times + given.cond @ self.labels + given.augment @ self.augments
        return torch.tanh(self.a * x + self.b + expand(sums, x)).to(x.dtype)


def network(method: FlowMapMethod, shape: tuple[int, ...], seed: int = 0) -> Network:
    raw = AnyRaw(shape, method.two_times, seed)
    wrappers = {"trigflow": TrigFlowNetwork, "velocity": VelocityNetwork, "denoiser": EDMDenoiser}
    return wrappers[method.expects](raw)


def networks(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Networks:
    method = METHODS[name]
    others = {
        "target": network(method, shape, 1),
        "stage1": network(method, shape, 2),
        "teacher": EDMDenoiser(AnyRaw(shape, False, 3)),
    }
    for other in others.values():
        other.to(dtype).requires_grad_(False)
    nets = Networks(network(method, shape).to(dtype), others)
    method.check(nets)
    return nets


def batch(
    shape: tuple[int, ...], size: int = 6, dtype: torch.dtype = torch.float32, labels: bool = True
) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, size, *shape, generator=generator)
    draws = GivenNoise(seed=0, step=0, indices=tuple(range(size)), total=size, eps=eps)
    made = Batch(x=(0.5 * x).to(dtype), cond=None, augment=None, draws=draws)
    if not labels:
        return made
    cond = torch.eye(CLASSES)[torch.arange(size) % CLASSES].to(dtype)
    augment = torch.eye(LABELS)[torch.arange(size) % LABELS].to(dtype)
    return dataclasses.replace(made, cond=cond, augment=augment)


def gradients(net: Network, per_sample: Tensor) -> list[Tensor]:
    parameters = list(net.parameters())
    found = torch.autograd.grad(per_sample.mean(), parameters)
    assert all(bool(g.isfinite().all()) for g in found)
    return list(found)


@each_method
@each_shape
def test_any_shape(name, shape):
    """Of images, also not square and of one channel, of vectors and of volumes."""
    nets = networks(name, shape)
    loss = METHODS[name].loss(nets, batch(shape), CURRICULUM)
    assert loss.per_sample.shape == loss.times.shape == (6,)
    assert bool(loss.per_sample.isfinite().all())
    assert all(bool((g != 0).any()) for g in gradients(nets.student, loss.per_sample))
    samples = generate(METHODS[name], METHODS[name].for_sampling(nets), range(3), shape, (
        default_times(METHODS[name], 2)
    ))  # fmt: skip
    assert samples.shape == (3, *shape)
    assert bool(samples.isfinite().all())


@each_method
def test_a_batch_of_one(name):
    """Alone, a sample has the loss that it has as a micro-batch of one."""
    shape = (1, 4, 4)
    nets = networks(name, shape)
    whole = batch(shape)
    together = METHODS[name].loss(nets, whole, CURRICULUM)
    alone = [METHODS[name].loss(nets, part, CURRICULUM) for part in whole.split(1)]
    assert torch.equal(torch.cat([loss.times for loss in alone]), together.times)
    torch.testing.assert_close(
        torch.cat([loss.per_sample for loss in alone]), together.per_sample, rtol=1e-4, atol=1e-6
    )
    single = METHODS[name].loss(nets, batch(shape, size=1), CURRICULUM)
    assert bool(single.per_sample.isfinite().all())
    gradients(nets.student, single.per_sample)


@each_method
def test_both_types_agree(name):
    shape = (3, 4, 6)
    losses = []
    for dtype in (torch.float32, torch.float64):
        nets = networks(name, shape, dtype)
        loss = METHODS[name].loss(nets, batch(shape, dtype=dtype), CURRICULUM)
        assert loss.per_sample.dtype == dtype
        assert loss.times.dtype == torch.float64
        losses.append(loss.per_sample.detach().double())
    torch.testing.assert_close(*losses, rtol=2e-3, atol=1e-5)


@each_method
def test_labels_and_none(name):
    """Without labels the rows are zero; with them every kind changes the loss."""
    shape = (3, 4, 6)
    nets, full = networks(name, shape), batch(shape)
    bare = batch(shape, labels=False)
    zero = dataclasses.replace(
        full,
        cond=torch.zeros_like(full.cond) if full.cond is not None else None,
        augment=torch.zeros_like(full.augment) if full.augment is not None else None,
    )
    losses = {
        key: METHODS[name].loss(nets, made, CURRICULUM).per_sample.detach()
        for key, made in {
            "full": full,
            "none": bare,
            "zero": zero,
            "no class": dataclasses.replace(full, cond=None),
            "no augment": dataclasses.replace(full, augment=None),
        }.items()
    }
    if name != "MeanFlow, guided":  # without classes it is trained without guidance
        torch.testing.assert_close(losses["none"], losses["zero"])
    for key in ("none", "no class", "no augment"):
        assert not torch.allclose(losses[key], losses["full"])
