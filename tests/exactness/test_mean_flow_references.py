"""MeanFlow against what was recorded from py-meanflow and from FastGen on both of its paths."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from consistency_fakes import now
from fastflow.data.batch import Batch
from fastflow.ema import EMA, ConstantEMA
from fastflow.guidance import MixedGuidance
from fastflow.method import Frozen, Loss, Networks
from fastflow.network import Network
from fastflow.progress import Progress
from fastflow.regression import AdaptiveL2, ExponentialL2, NormalisedGradient, Regression
from fastflow.rng import Draws
from fastflow.rows import EachRow, FirstRows
from fastflow.sampling import jumps, multistep, prior
from fastflow.schedules import LinearRamp
from fastflow.tangent import Pairs, TangentEngine
from fastflow.teacher import Teacher
from fastflow.time_difference import BoundedDifference
from fastflow.times import LogitNormal, PairLaw
from mean_flow_fakes import (
    Listening,
    batch_of,
    fastgen_unet,
    given_times,
    py_meanflow_unet,
)
from methods.mean_flow import MeanFlow, MeanFlowEDM
from reference_data import Reference, reference

PYMF, TIMES, AVERAGES = (reference(f"pymf_{n}") for n in ("loss", "tr_sampler", "ema"))
LINEAR, EDM = reference("fastgen_meanflow_rf"), reference("fastgen_meanflow_edm")
F32, F64 = torch.float32, torch.float64
both_types = pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watching(Regression):
    """Another regression that keeps what it is given."""

    inner: Regression
    seen: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        self.seen.update(u=prediction.detach(), target=target)
        return self.inner(prediction, target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchingEngine(TangentEngine):
    """Another engine whose velocity and derivative are kept."""

    inner: TangentEngine
    seen: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.inner.name

    def __call__(self, f, primals, tangents):
        value, tangent = self.inner(f, primals, tangents)
        self.seen.update(z=primals[0], v=tangents[0], dudt=tangent)
        return value, tangent


class Step(NamedTuple):
    """A loss, its student, and what went into it."""

    loss: Loss
    student: nn.Module
    seen: dict[str, Any]


def watched(method: MeanFlow, nets: Networks, batch: Batch, moment: Progress) -> Step:
    regression = Watching(inner=method.regression)
    engine = WatchingEngine(inner=method.engine)
    method = dataclasses.replace(method, regression=regression, engine=engine)
    loss = method.loss(nets, batch, moment)
    return Step(loss, nets.student, {**regression.seen, **engine.seen})


def check(ref: Reference, key: str, value: Tensor, dtype: torch.dtype) -> None:
    """Compare with the stored float32 tensor, or float64 one where there is one."""
    if dtype is F32:
        ref.check(key, value)
    elif f"{key}.f64" in ref:
        ref.check(f"{key}.f64", value)


def check_gradients(ref: Reference, prefix: str, step: Step, count: int) -> None:
    step.loss.per_sample.mean().backward()
    parameters = {k.removeprefix("model."): p for k, p in step.student.named_parameters()}
    keys = ref.keys(prefix)
    assert len(keys) == count
    for key in keys:
        name = key.removeprefix(prefix).removeprefix("model.")
        gradient = parameters[name].grad
        if name == "map_layer0.weight":  # the layer over both times is in two pieces here
            second = parameters["map_second.layer.weight"].grad
            gradient = torch.cat([gradient, second], 1)
        elif ".qkv." in name and ref is PYMF:  # q | k | v there
            gradient = gradient.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        ref.check(key, gradient)


# py-meanflow


def pymf_step(norm: str, dtype: torch.dtype) -> Step:
    kwargs = PYMF.config["norms"][int(norm[1:])]
    x, e, augment = (PYMF[k].to(dtype) for k in ("x", "e", "aug_cond"))
    method = MeanFlow(
        times=given_times(PYMF["t"], PYMF["r"]),
        regression=AdaptiveL2(power=kwargs["norm_p"], c=kwargs["norm_eps"]),
    )
    nets = Networks(py_meanflow_unet(PYMF, dtype).train())
    return watched(method, nets, batch_of(x, e, augment=augment), now())


@both_types
@pytest.mark.parametrize("norm", ["n0", "n1", "n2"])
def test_py_meanflow_losses(norm, dtype):
    step = pymf_step(norm, dtype)
    check(PYMF, "u", step.seen["u"], dtype)
    check(PYMF, "dudt", step.seen["dudt"], dtype)
    check(PYMF, "u_tgt", step.seen["target"], dtype)
    check(PYMF, "sq", AdaptiveL2(power=0.0)(step.seen["u"], step.seen["target"]), dtype)
    check(PYMF, f"per_sample.{norm}", step.loss.per_sample, dtype)
    check(PYMF, f"loss.{norm}", step.loss.per_sample.mean(), dtype)


@pytest.mark.parametrize(("norm", "count"), [("n0", 3), ("n1", 3), ("n2", 1)])
def test_py_meanflow_gradients(norm, count):
    step = pymf_step(norm, F32)
    check_gradients(PYMF, f"grad.{norm}.", step, count)


def pymf_law(params: dict[str, Any]) -> PairLaw:
    return PairLaw(
        times=LogitNormal(mean=params["P_mean_t"], std=params["P_std_t"]),
        ends=LogitNormal(mean=params["P_mean_r"], std=params["P_std_r"]),
        order={"v0": "sort", "v1": "clip"}[params["tr_sampler"]],
        equal=1 - params["ratio"],
        rows=EachRow(),
    )


@pytest.mark.parametrize("case", ["0.v1", "1.v0"])
def test_py_meanflow_times_from_the_same_numbers(case):
    """Their draws, made as the case says, through our map give their times."""
    stored = TIMES.values[case]
    generator = torch.Generator().manual_seed(stored["seed"])
    normals = [torch.randn(4096, generator=generator).double() for _ in range(2)]
    uniform = torch.rand(4096, generator=generator).double()
    t, r = (torch.special.ndtr(normal) for normal in normals)
    batch = batch_of(torch.zeros(4096, 1), torch.zeros(4096, 1), t=t, r=r, equal=uniform)
    ours = pymf_law(stored["params"])(batch.draws)
    for name, value in zip("tr", ours, strict=True):
        TIMES.check(f"{case}.{name}", value)
    assert (ours[0] == ours[1]).double().mean().item() == stored["frac_equal"]


@pytest.mark.parametrize("case", ["0.v1", "1.v0"])
def test_py_meanflow_times_in_law(case):
    """2e6 official draws: means, quantiles and the share of r = t within 5 standard errors."""
    stored, n = TIMES.values[case], 2**16
    # A rank-1 lattice fills the cube of (t, r, equal) evenly: far less noise than random numbers.
    steps = torch.arange(n, dtype=F64)[:, None] * torch.tensor([1.0, 19463.0, 34427.0]) / n
    t, r, equal = ((steps + 0.5 / n) % 1).clamp(1e-9, 1 - 1e-9).unbind(1)
    batch = batch_of(torch.zeros(n, 1), torch.zeros(n, 1), t=t, r=r, equal=equal)
    ours = dict(zip("tr", pymf_law(stored["params"])(batch.draws), strict=True))
    slack = 2e-3  # of the lattice
    for name, value in ours.items():
        official = stored["big"][name]
        error = 5 * official["std"] / official["n"] ** 0.5
        assert abs(value.mean().item() - official["mean"]) < error + slack * official["std"]
        assert value.std().item() == pytest.approx(official["std"], rel=5e-3)
        for level, quantile in zip(official["quantile_levels"], official["quantiles"], strict=True):
            margin = 5 * (level * (1 - level) / official["n"]) ** 0.5 + slack
            assert abs((value <= quantile).double().mean().item() - level) < margin
    share = (ours["t"] == ours["r"]).double().mean().item()
    assert abs(share - stored["big"]["frac_equal"]) < 5 * (0.21 / 2e6) ** 0.5 + slack
    gap = (ours["t"] - ours["r"]).mean().item()
    assert gap == pytest.approx(stored["big"]["mean_gap"], abs=slack)


def test_times_of_seeded_draws():
    """The law as training uses it, from our own generator."""
    stored = TIMES.values["1.v0"]
    draws = Draws(seed=1, step=0, indices=tuple(range(4096)), total=4096)
    t, r = pymf_law(stored["params"])(draws)
    for value, name in ((t, "t"), (r, "r")):
        official = stored["big"][name]
        assert abs(value.mean().item() - official["mean"]) < 5 * official["std"] / 64


@pytest.mark.parametrize("beta", [0.9, 0.9999, 0.99995])
def test_py_meanflow_averages_every_16_steps(beta):
    module = nn.Module()
    module.w = nn.Parameter(AVERAGES["init"])
    ema = EMA(module, ConstantEMA(beta=beta, every=16))
    rows = []
    for step, values in enumerate(AVERAGES["trajectory"], start=1):
        module.w.data.copy_(values)
        moment = Progress(step=step, images=step, total_steps=50, batch_size=1)
        ema.update(module, moment)
        rows.append(ema.state_dict()["w"].clone())
    AVERAGES.check(f"ema_{beta:g}", torch.stack(rows))


# FastGen


REGRESSIONS = {
    ("l2", "poly_0.75"): lambda v: AdaptiveL2(power=0.75, c=v["norm_const"]),
    ("l2", "exp_1.0_-0.01"): lambda v: ExponentialL2(rate=0.01, c=v["norm_const"]),
    ("opt_grad", "poly_1.0"): lambda v: NormalisedGradient(
        power=1.0,
        c=v["norm_const"],
        per_dimension=v.get("tangent_spatial_invariance", False),
    ),
}
ANY_SOURCE = Frozen(weights="unused: tests hand the teacher over")


def fastgen_method(ref: Reference, variant: dict[str, Any]) -> MeanFlow:
    times = given_times(ref["t"], ref["r"])
    regression = REGRESSIONS[variant["loss_type"], variant["norm_method"]](variant)
    window = tuple(variant.get("win_", (0.0, 80.0)))
    teacher = guidance = None
    if variant.get("cd"):
        scale = variant.get("gs_", 1.0)
        teacher = Teacher(source=ANY_SOURCE, guidance=scale, interval=window)
    elif variant.get("drop") is not None:  # without it the scale is ignored
        guidance = MixedGuidance(
            omega=variant["gs_"],
            kappa=variant.get("mix_", 0.0),
            t_min=window[0],
            t_max=window[1],
            label_dropout=variant["drop"],
            dropped=FirstRows(count="binomial"),
        )
    engine: TangentEngine = Pairs()
    if variant.get("use_jvp_finite_diff"):
        ends = (0.0, 0.999) if ref is LINEAR else (0.002, 80.0)
        engine = BoundedDifference(
            step=variant["jvp_finite_diff_eps"], t_min=ends[0], t_max=ends[1]
        )
    kwargs: dict[str, Any] = {
        "times": times,
        "regression": regression,
        "warmup": LinearRamp(steps=variant.get("tangent_warmup_steps", 0)),
        "guidance": guidance,
        "teacher": teacher,
        "engine": engine,
    }
    return MeanFlow(**kwargs) if ref is LINEAR else MeanFlowEDM(least_gap=0.002, **kwargs)


def fastgen_step(ref: Reference, name: str, dtype: torch.dtype) -> Step:
    variant = ref.values["variants"][name]
    student = fastgen_unet(ref, dtype).train()
    companions = {"teacher": fastgen_unet(ref, dtype, "teacher").eval()}
    batch = batch_of(
        ref["real_data"].to(dtype),
        ref["eps"].to(dtype),
        cond=ref["condition"].to(dtype),
        label_dropout=ref["dropout_uniform"],
    )
    moment = dataclasses.replace(now(), step=variant.get("it", 0), total_steps=1000)
    return watched(fastgen_method(ref, variant), Networks(student, companions), batch, moment)


CASES = [(ref, name) for ref in (LINEAR, EDM) for name in ref.values["variants"]]


@both_types
@pytest.mark.parametrize(
    ("ref", "name"), CASES, ids=[f"{ref.name.rsplit('_', 1)[1]}-{name}" for ref, name in CASES]
)
def test_fastgen_losses(ref, name, dtype):
    step = fastgen_step(ref, name, dtype)
    check(ref, "x_t", step.seen["z"], dtype)
    if not ref.values["variants"][name].get("drop"):  # recorded with all of the labels
        check(ref, "u_theta", step.seen["u"], dtype)
    if f"{name}.dxt_dt" in ref:
        check(ref, f"{name}.dxt_dt", step.seen["v"], dtype)
    if f"{name}.jvp" in ref:
        check(ref, f"{name}.jvp", step.seen["dudt"], dtype)
    check(ref, f"{name}.loss", step.loss.per_sample, dtype)
    u, target = step.seen["u"], step.seen["target"]
    weight = step.loss.per_sample.detach() / AdaptiveL2(power=0.0)(u, target)
    if ref.values["variants"][name]["loss_type"] == "opt_grad":
        scale = 192 if "inv" in name else 1  # e is shorter by sqrt(192), and w^2 ||e||^2 the loss
        weight = (weight * scale).sqrt()
    check(ref, f"{name}.weight", weight, dtype)
    count = len(ref.keys(f"{name}.grad."))
    if dtype is F32 and count:
        check_gradients(ref, f"{name}.grad.", step, count)


def test_fastgen_cases_cover_what_they_should():
    assert len(CASES) == 20
    assert sum(bool(ref.keys(f"{name}.grad.")) for ref, name in CASES) == 5
    # Rows with r = t, rows outside of the window of guidance, and labels dropped from the front.
    assert all((ref["t"] == ref["r"]).any() for ref in (LINEAR, EDM))
    step = fastgen_step(LINEAR, "ct.l2_guided_drop", F64)
    plain = LINEAR["eps"].double() - LINEAR["real_data"].double()
    same = (step.seen["v"] == plain).flatten(1).all(1)
    assert same.tolist() == [True, True, True, True, False, True]


@pytest.mark.parametrize("ref", [LINEAR, EDM])
def test_fastgen_monitors(ref):
    """What is left of the flow-matching error, and the data that the average velocity implies."""
    step = fastgen_step(ref, "ct.l2", F32)
    u, z, x, eps = step.seen["u"], step.seen["z"], ref["real_data"], ref["eps"]
    ref.check("v_loss", (u - (eps - x)).square().flatten(1).mean(1))
    ref.check("x0_approx", z - ref["t"].float()[:, None, None, None] * u)


@pytest.mark.parametrize(
    ("key", "times"),
    [("ode.1step", (0.999,)), ("ode.2step", (0.999, 0.5)), ("sde.3step", (0.999, 0.6, 0.3))],
)
def test_fastgen_generation(key, times):
    """Their "ode" jumps from time to time; "sde" to the data, with fresh noise in between."""
    method, net = MeanFlow(), fastgen_unet(LINEAR, F32).eval()
    noises, cond = list(LINEAR["gen.noise"]), LINEAR["condition"][:2]

    def flow_map(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return method.flow_map(net, x, t, s, cond)

    x = prior(noises[0], method.path, times[0])
    with torch.no_grad():
        if key.startswith("ode"):
            x = jumps(flow_map, x, (*times, 0.0))
        else:
            fresh = iter(noises[1:]).__next__
            x = multistep(flow_map, x, times, fresh, method.path)
    LINEAR.check(f"gen.{key}", x)


def test_networks_are_called_as_recorded():
    """Guidance asks an evaluated network at r = t; training goes on in training mode."""
    variant = LINEAR.values["variants"]["ct.l2_mixture"]
    net: Network = Listening(fastgen_unet(LINEAR, F32).train())
    batch = batch_of(
        LINEAR["real_data"], LINEAR["eps"], LINEAR["condition"],
        label_dropout=LINEAR["dropout_uniform"],
    )  # fmt: skip
    fastgen_method(LINEAR, variant).loss(Networks(net), batch, now())
    null, own, trained = net.calls
    assert [c["training"] for c in net.calls] == [False, False, True]
    assert not null["cond"].any()
    assert torch.equal(own["cond"], LINEAR["condition"])
    assert torch.equal(null["s"], null["t"])
    assert torch.equal(own["s"], own["t"])
    assert not own["out"].requires_grad
    assert trained["training"]
