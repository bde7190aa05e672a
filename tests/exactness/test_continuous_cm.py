"""CM in continuous time: the limit of CM's gradient where the two times of a pair meet."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from consistency_fakes import now
from fastflow.config import build, lazy
from fastflow.consistency import Pairing, SquaredL2, TimePair, Weight
from fastflow.data.batch import Batch
from fastflow.errors import ConfigError
from fastflow.method import Frozen, Networks
from fastflow.network import Network
from fastflow.progress import Progress
from fastflow.rng import Draws
from fastflow.tangent import DualNumbers, FiniteDifference, FunctionalJVP, Pairs
from fastflow.teacher import Teacher
from fastflow.times import UniformPower
from fastflow.wrappers import EDMDenoiser
from methods.cm import CM
from methods.continuous_cm import ContinuousCM
from networks.mlp import ToyMLP

ROWS, DIM = 16, 2
TEACHER = Teacher(source=Frozen(weights="unused: tests hand the networks over"))
RATES = {"t": lambda t: 1.0, "log": lambda t: t, "rho": lambda t: 7 * t ** (6 / 7)}


def network(seed: int) -> Network:
    torch.manual_seed(seed)
    net = build(lazy(EDMDenoiser, model=lazy(ToyMLP, data_dim=DIM, width=16, depth=2))).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def batch() -> Batch:
    generator = torch.Generator().manual_seed(7)
    x = 0.5 * torch.randn(ROWS, DIM, dtype=torch.float64, generator=generator)
    draws = Draws(seed=5, step=0, indices=tuple(range(ROWS)), total=ROWS)
    return Batch(x=x, cond=None, augment=None, draws=draws)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortPairs(Pairing):
    """t of the continuous law and r = t (1 - share)."""

    share: float
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, draws: Draws, now: Progress) -> TimePair:
        t = UniformPower(t_min=0.01)(draws)
        return TimePair(t=t, r=t * (1 - self.share))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerClock(Weight):
    """(dt/dk) / (2 (t - r)): of a short difference a derivative, of a square its gradient."""

    coordinate: str

    def __call__(self, t: Tensor, r: Tensor) -> Tensor:
        return RATES[self.coordinate](t) / (2 * (t - r))


def gradient(method, teacher: Network | None) -> Tensor:
    nets = Networks(network(0), {} if teacher is None else {"teacher": teacher})
    method.check(nets)
    method.loss(nets, batch(), now(ratio=0.9)).per_sample.sum().backward()
    return nn.utils.parameters_to_vector([p.grad for p in nets.student.parameters()])


@pytest.mark.parametrize("taught", [False, True], ids=["CT", "CD"])
@pytest.mark.parametrize("coordinate", RATES)
def test_its_gradient_is_the_limit_of_cms(coordinate, taught):
    teacher = network(1) if taught else None
    exact = gradient(
        ContinuousCM(
            coordinate=coordinate,
            times=UniformPower(t_min=0.01),
            teacher=TEACHER if taught else None,
        ),
        teacher,
    )
    errors = []
    for share in (1e-3, 1e-4):
        discrete = CM(
            pairs=ShortPairs(share=share),
            distance=SquaredL2(),
            weight=PerClock(coordinate=coordinate),
            teacher=TEACHER if taught else None,
        )
        errors.append(((gradient(discrete, teacher) - exact).norm() / exact.norm()).item())
    assert errors[1] < 1e-3
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)  # of first order in the gap


@pytest.mark.parametrize("engine", [Pairs(), DualNumbers(), FunctionalJVP()], ids=lambda e: e.name)
def test_all_exact_engines_agree(engine):
    want = gradient(ContinuousCM(engine=FunctionalJVP()), None)
    assert torch.allclose(gradient(ContinuousCM(engine=engine), None), want, rtol=1e-10, atol=0)


def test_finite_differences_are_near_and_say_so():
    method = ContinuousCM(engine=FiniteDifference(step=1e-4))
    exact = gradient(ContinuousCM(), None)
    assert (gradient(method, None) - exact).norm() < 1e-3 * exact.norm()
    assert "finite differences" in method.title
    assert ContinuousCM().title == "ContinuousCM"


def test_only_the_value_carries_a_gradient():
    """L = <f, sg df> / d is linear in f: scaling the last layer's output scales f alone."""
    nets = Networks(network(0), {"teacher": network(1)})
    loss = ContinuousCM(teacher=TEACHER).loss(nets, batch(), now())
    loss.per_sample.sum().backward()
    assert all(p.grad is None for p in nets["teacher"].parameters())
    assert not loss.metrics["tangent"].requires_grad
    assert not loss.times.requires_grad


def test_times_are_uniform_in_their_power():
    law = UniformPower(t_min=0.002, t_max=80.0, rho=7.0)
    u = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    want = [0.002, *((low + k * (high - low)) ** 7 for k in (0.25, 0.5)), 80.0]
    assert law.quantile(u).tolist() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("build_it", "named"),
    [
        (lambda: ContinuousCM(boundary=90.0), "boundary"),
        (lambda: ContinuousCM(rho=0.0), "rho"),
        (lambda: ContinuousCM(rho=math.nan), "rho"),
        (lambda: ContinuousCM(coordinate="sigma"), "coordinate"),
        (lambda: UniformPower(t_min=2.0, t_max=1.0), "t_min"),
        (lambda: UniformPower(rho=-1.0), "rho"),
    ],
)
def test_impossible_settings_are_refused(build_it, named):
    with pytest.raises(ConfigError, match=named):
        build_it()
