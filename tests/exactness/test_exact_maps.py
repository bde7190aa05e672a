"""On Gaussian data the exact map has no residual in any method, from data and from a teacher.

What a method compares or regresses on is noisy for single samples: the line from x0 through x_t is
no path of the flow. Here data and noise are chosen so that it is one as far as the method can see:
a chord of the path of x_t, for methods that compare two points of it, or its tangent, for methods
that take a velocity. Then the loss from data itself must vanish, at the times of the method's own
law. A teacher gives the velocity of any line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from consistency_fakes import ConsistencyOf, DenoiserOf, GivenNoise, now
from fastflow.consistency import (
    GridPairing,
    InverseGap,
    PseudoHuber,
    RatioPairing,
    TeacherStep,
    TimePair,
)
from fastflow.data.batch import Batch
from fastflow.method import FlowMapMethod, Frozen, Loss, Networks
from fastflow.network import Network
from fastflow.oracle import Gaussian
from fastflow.path import Linear, expand, scaled
from fastflow.regression import AdaptiveL2, ExponentialL2, NormalisedGradient
from fastflow.schedules import FixedDecay, LinearRamp, SigmoidRatio
from fastflow.tangent import DualNumbers, FunctionalJVP, Pairs
from fastflow.teacher import Teacher
from fastflow.times import LogitNormal, LogNormal, PairLaw, UniformPower
from mean_flow_fakes import AverageVelocity
from methods.cm import CM
from methods.continuous_cm import ContinuousCM
from methods.ect import ECT
from methods.edm import EDM
from methods.flow_matching import FlowMatching
from methods.ict import ICT
from methods.mean_flow import MeanFlow, MeanFlowEDM
from methods.scm import SCM
from methods.tcm import TCM

ROWS, DIM, SD = 64, 3, 0.5
CURRICULUM = now(N=18, ratio=0.9)
TEACHER = Teacher(source=Frozen(weights="unused: tests hand the teacher over"))
STAGE1 = Frozen(weights="unused: tests hand the networks over")


@dataclasses.dataclass(frozen=True)
class Data:
    """N(mean, std^2) in each of three dimensions."""

    mean: float
    std: float

    @property
    def oracle(self) -> Gaussian:
        return Gaussian.isotropic(self.std, mean=self.mean)


DATA = {"assumed": Data(0.0, SD), "narrow": Data(0.3, 0.2), "wide": Data(-0.4, 1.5)}


# Exact networks; `off` bends them by that share, differently at every time


def bent(out: Tensor, t: Tensor, off: float) -> Tensor:
    return out * (1 + off * expand(torch.sin(t), out))


def consistency_network(data: Data, s_min: float, off: float) -> Network:
    def jump(x: Tensor, t: Tensor) -> Tensor:
        return bent(data.oracle.flow_map(x, t, torch.full_like(t, s_min)), t, off)

    return ConsistencyOf(jump, s_min)


def smooth_consistency_network(data: Data, s_min: float, off: float) -> Network:
    """The same in operations that every tangent engine has rules for."""

    def jump(x: Tensor, t: Tensor) -> Tensor:
        gain = ((data.std**2 + s_min**2) / (data.std**2 + t**2)).sqrt()
        return bent(data.mean + expand(gain, x) * (x - data.mean), t, off)

    return ConsistencyOf(jump, s_min)


def denoiser_network(data: Data, off: float) -> Network:
    return DenoiserOf(lambda x, t: bent(data.oracle.denoiser(x, t), t, off))


class Trig(DenoiserOf):
    predicts, sigma_data = "trigflow", SD


def trigflow_network(data: Data, off: float) -> Network:
    """F = (cos(t) x - f) / (sin(t) sd), f = mean + S C^(-1/2) (x - cos(t) mean)."""

    def raw(x: Tensor, t: Tensor) -> Tensor:
        cos, sin = expand(torch.cos(t), x), expand(torch.sin(t), x)
        gain = data.std * (cos**2 * data.std**2 + sin**2 * SD**2) ** -0.5
        f = data.mean + gain * (x - cos * data.mean)
        return bent((cos * x - f) / (sin * SD), t, off)

    return Trig(raw)


def velocity_network(data: Data, off: float) -> Network:
    velocity = data.oracle.on(Linear()).velocity
    net = AverageVelocity(lambda z, t, _: bent(velocity(z, t), t, off))
    net.two_times = False
    return net


def average_network(data: Data, off: float) -> Network:
    """u of the linear path, where 1 - sqrt(C_r / C_t) is divided by t - r on paper."""
    variance = data.std**2

    def u(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        c_t, c_r = ((1 - k) ** 2 * variance + k**2 for k in (t, r))
        slope = ((1 + variance) * (t + r) - 2 * variance) / (c_t + (c_t * c_r).sqrt())
        exact = expand(slope, z) * (z - expand(1 - t, z) * data.mean) - data.mean
        return bent(exact, t, off)

    return AverageVelocity(u)


class AverageDenoiser(Network):
    """D(x, t, r) = x - t u of EDM's path, the same on paper."""

    two_times = True

    def __init__(self, data: Data, off: float) -> None:
        super().__init__()
        self.data, self.off = data, off

    def forward(self, x, t, s=None, cond=None, augment=None, guidance=None):
        variance, mean = self.data.std**2, self.data.mean
        c_t, c_s = t**2 + variance, s**2 + variance
        slope = (t + s) / (c_t + (c_t * c_s).sqrt())
        return x - bent(expand(t * slope, x) * (x - mean), t, self.off)


# Data and noise whose line is that of the exact path


def chord(data: Data, x_t: Tensor, pair: TimePair) -> tuple[Tensor, Tensor]:
    """(x0, eps) with x0 + t eps = x_t and x0 + r eps where its path is at r."""
    x_r = data.oracle.flow_map(x_t, pair.t, pair.r)
    eps = scaled(1 / (pair.t - pair.r), x_t - x_r)
    return x_t - scaled(pair.t, eps), eps


def tangent(data: Data, path, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(x0, eps) whose line has the velocity of the path through x_t: the two means given x_t."""
    oracle = data.oracle.on(path)
    return oracle.denoiser(x_t, t), oracle.noise(x_t, t)


def draws(eps: Tensor | None = None) -> GivenNoise:
    return GivenNoise(seed=3, step=0, indices=tuple(range(ROWS)), total=ROWS, eps=eps)


def normal(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, DIM, dtype=torch.float64, generator=generator)


def loss_of(method: FlowMapMethod, nets: Networks, x0: Tensor, eps: Tensor) -> Loss:
    method.check(nets)
    batch = Batch(x=x0, cond=None, augment=None, draws=draws(eps))
    return method.loss(nets, batch, CURRICULUM)


# Methods. What a method's metrics call its residual, before any weight: a distance, a root mean
# square or the length of the tangent.


def residual(loss: Loss) -> float:
    metrics = loss.metrics
    if "distance" in metrics:
        return metrics["distance"].item()
    return metrics["tangent"].item() if "tangent" in metrics else metrics["mse"].sqrt().item()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactStep(TeacherStep):
    """The flow of the data in the place of a solver's step, by the denoiser it is given."""

    mean: float
    std: float

    def __call__(self, denoiser, x, t, r):
        return Data(self.mean, self.std).oracle.flow_map(x, t, r)


NORM = PseudoHuber(c=0.0)
EACH_TIME = {"times": LogNormal(mean=-1.1, std=2.0), "gap": SigmoidRatio()}
DISCRETE: dict[str, Callable[[], CM | ECT | ICT | TCM]] = {
    "CT": lambda: CM(pairs=GridPairing(), distance=NORM),
    "CT, EMA target": lambda: CM(pairs=GridPairing(), distance=NORM, target=FixedDecay(mu=0.9)),
    "CM, ratio": lambda: CM(
        pairs=RatioPairing(**EACH_TIME), distance=NORM, weight=InverseGap(), boundary=0.0
    ),
    "iCT": lambda: ICT(huber=0.0),
    "ECT": lambda: ECT(),
    "TCM": lambda: TCM(stage1=STAGE1, distance=NORM),
}


def pair_of(method: CM | ECT | ICT | TCM, t: Tensor) -> TimePair:
    if isinstance(method, CM | ICT):
        return method.pairs(draws(), CURRICULUM)
    return TimePair(t=t, r=method.gap(t, CURRICULUM["ratio"]))


def discrete_residual(name: str, data: Data, off: float = 0.0) -> float:
    method = DISCRETE[name]()
    exact = consistency_network(data, method.s_min, 0.0)
    nets = Networks(
        consistency_network(data, method.s_min, off), {"target": exact, "stage1": exact}
    )
    any_pair = loss_of(method, nets, normal(0), normal(1))
    pair = pair_of(method, any_pair.times)
    assert torch.equal(pair.t, any_pair.times)
    x_t = data.mean + data.std * normal(2) + scaled(pair.t, normal(3))
    return residual(loss_of(method, nets, *chord(data, x_t, pair)))


DISTILLED: dict[str, Callable[[TeacherStep], CM | ECT]] = {
    "CD": lambda step: CM(pairs=GridPairing(), teacher=TEACHER, step=step, distance=NORM),
    "CD, ratio": lambda step: CM(
        pairs=RatioPairing(**EACH_TIME), teacher=TEACHER, step=step, distance=NORM, boundary=0.0
    ),
    "ECD": lambda step: ECT(teacher=TEACHER, step=step, distance=NORM),
}


def distilled_residual(name: str, data: Data, off: float = 0.0) -> float:
    method = DISTILLED[name](ExactStep(mean=data.mean, std=data.std))
    teacher = denoiser_network(data, 0.0)
    nets = Networks(consistency_network(data, method.s_min, off), {"teacher": teacher})
    return residual(loss_of(method, nets, data.mean + data.std * normal(0), normal(1)))


CONTINUOUS: dict[str, tuple[FlowMapMethod, Callable[[Data, float], Network]]] = {
    "sCT": (SCM(warmup=LinearRamp(steps=0)), trigflow_network),
    "sCT, dual numbers": (SCM(warmup=LinearRamp(steps=0), engine=DualNumbers()), trigflow_network),
    "sCT, func.jvp": (SCM(warmup=LinearRamp(steps=0), engine=FunctionalJVP()), trigflow_network),
    **{
        f"CM in continuous time, {k}": (
            ContinuousCM(coordinate=k, boundary=0.0, engine=engine),
            lambda data, off: smooth_consistency_network(data, 0.0, off),
        )
        for k, engine in (("t", Pairs()), ("log", DualNumbers()), ("rho", FunctionalJVP()))
    },
    "EDM": (EDM(), denoiser_network),
    "flow matching": (FlowMatching(), velocity_network),
}
V0 = PairLaw(times=LogitNormal(mean=-2.0, std=2.0), equal=0.25)
V1 = PairLaw(
    times=LogitNormal(mean=-0.6, std=1.6),
    ends=LogitNormal(mean=-4.0, std=1.6),
    equal=0.25,
    order="clip",
)
for _law, _times in (("v0", V0), ("v1", V1)):
    for _name, _regression in (
        ("adaptive", AdaptiveL2(power=0.75)),
        ("opt_grad", NormalisedGradient()),
        ("exponential", ExponentialL2()),
    ):
        _method = MeanFlow(times=_times, regression=_regression)
        CONTINUOUS[f"MeanFlow, {_law}, {_name}"] = (_method, average_network)
ON_EDMS_PATH = MeanFlowEDM(times=PairLaw(times=LogNormal(mean=-1.1, std=1.6), equal=0.25))
CONTINUOUS["MeanFlow on EDM's path"] = (ON_EDMS_PATH, AverageDenoiser)


def continuous_residual(name: str, data: Data, off: float = 0.0) -> float:
    method, network = CONTINUOUS[name]
    nets = Networks(network(data, off))
    t = loss_of(method, nets, normal(0), normal(1)).times
    x_t = method.path.interpolate(data.mean + data.std * normal(2), normal(3), t)
    return residual(loss_of(method, nets, *tangent(data, method.path, x_t, t)))


TAUGHT: dict[str, tuple[FlowMapMethod, Callable[[Data, float], Network]]] = {
    "CD in continuous time": (
        ContinuousCM(teacher=TEACHER, times=UniformPower(t_min=0.01)),
        lambda data, off: smooth_consistency_network(data, 0.002, off),
    ),
    "sCD": (SCM(warmup=LinearRamp(steps=0), teacher=TEACHER), trigflow_network),
    "MeanFlow, v0, from a teacher": (MeanFlow(times=V0, teacher=TEACHER), average_network),
    "MeanFlow, v1, from a teacher": (MeanFlow(times=V1, teacher=TEACHER), average_network),
    "MeanFlow on EDM's path, from a teacher": (
        dataclasses.replace(ON_EDMS_PATH, teacher=TEACHER),
        AverageDenoiser,
    ),
}


def taught_residual(name: str, data: Data, off: float = 0.0) -> float:
    """Any sample: the teacher knows the velocity."""
    method, network = TAUGHT[name]
    worst = 0.0
    for teacher in (denoiser_network(data, 0.0), velocity_network(data, 0.0)):
        nets = Networks(network(data, off), {"teacher": teacher})
        loss = loss_of(method, nets, data.mean + data.std * normal(0), normal(1))
        worst = max(worst, residual(loss))
    return worst


RESIDUALS: dict[str, Callable[..., float]] = {
    **dict.fromkeys(DISCRETE, discrete_residual),
    **dict.fromkeys(DISTILLED, distilled_residual),
    **dict.fromkeys(CONTINUOUS, continuous_residual),
    **dict.fromkeys(TAUGHT, taught_residual),
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", RESIDUALS)
def test_the_exact_map_has_no_residual(name, data):
    assert RESIDUALS[name](name, DATA[data]) < 1e-12


@pytest.mark.parametrize("name", RESIDUALS)
def test_a_map_that_is_off_has_one(name):
    assert RESIDUALS[name](name, DATA["narrow"], off=0.01) > 1e-4


def test_a_line_of_a_sample_has_a_residual():
    """What the chord and the tangent are for."""
    data = DATA["narrow"]
    method = ECT()
    nets = Networks(consistency_network(data, 0.0, 0.0))
    assert residual(loss_of(method, nets, data.mean + data.std * normal(0), normal(1))) > 0.01
