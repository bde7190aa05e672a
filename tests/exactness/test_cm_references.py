"""CM against losses, gradients and samples recorded from the three official implementations."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from consistency_fakes import AsDrawn, Recording, f64, now, openai_toy, stored_batch
from edm_networks import ARCHITECTURES, RENAMED
from fastflow.consistency import (
    L1,
    Distance,
    Euler,
    GridPairing,
    InverseCout,
    InverseGap,
    InverseSigma,
    Pairing,
    PseudoHuber,
    QuantisedPairing,
    RatioPairing,
    SquaredL2,
    TruncatedSnr,
    Uniform,
    Weight,
)
from fastflow.method import Frozen, Loss, Networks
from fastflow.network import Network
from fastflow.path import VE
from fastflow.sampling import ddim, multistep
from fastflow.schedules import ConstantRatio, FixedDecay, Gap, RatioStages, SigmoidRatio
from fastflow.teacher import Teacher
from fastflow.times import LogNormal, karras_grid
from fastflow.wrappers import EDMDenoiser
from methods.cm import CM
from reference_data import Reference, reference

OPENAI, ECT, FASTGEN = (
    reference(n) for n in ("openai_consistency_losses", "ect_loss", "fastgen_cm_loss")
)
ANY_SOURCE = Frozen(weights="unused: tests hand the teacher over")


def recorded_unet(ref: Reference, prefix: str = "net.") -> EDMDenoiser:
    """The SongUNet of a case whose configuration lies under "net"."""
    kwargs: dict[str, Any] = {RENAMED.get(k, k): v for k, v in ref.config["net"].items()}
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
    kwargs.pop("sigma_min", None)
    sigma_data, kind = kwargs.pop("sigma_data"), kwargs.pop("model_type")
    kwargs["in_channels"] = kwargs["out_channels"] = kwargs.pop("img_channels", 3)
    net = EDMDenoiser(ARCHITECTURES[kind](**kwargs), sigma_data=sigma_data)
    # FastGen's network has a head for the log-variance, which its consistency loss does not use.
    weights = {k: v for k, v in ref.weights(prefix).items() if "logvar" not in k}
    net.load_state_dict(weights, strict=True)
    return net


def check_gradients(ref: Reference, prefix: str, loss: Loss, net: nn.Module) -> None:
    """Compare the recorded gradients of the mean loss."""
    loss.per_sample.mean().backward()
    parameters = dict(net.named_parameters())
    keys = ref.keys(prefix)
    assert len(keys) == 3
    for key in keys:
        gradient = parameters[key.removeprefix(prefix)].grad
        assert gradient is not None
        ref.check(key, gradient)


# openai/consistency_models: a Karras grid, boundary 0.002, EMA target, means over the pixels


OPENAI_DISTANCES: dict[str, Distance] = {
    "l2": SquaredL2(),
    "l1": L1(),
    "l2-32": SquaredL2(resize=32),
}
OPENAI_WEIGHTS: dict[str, Weight] = {
    "uniform": Uniform(),
    "karras": InverseCout(),
    "truncated-snr": TruncatedSnr(),
}


def openai_loss(key: str, dtype: torch.dtype) -> tuple[Loss, EDMDenoiser]:
    """The loss of a recorded variant, e.g. "n40.cd.l2.karras"."""
    scales, mode, distance, weight = key.split(".")
    n = int(scales[1:])
    method = CM(
        pairs=GridPairing(),
        distance=OPENAI_DISTANCES[distance],
        weight=OPENAI_WEIGHTS[weight],
        target=FixedDecay(mu=0.95),
        teacher=Teacher(source=ANY_SOURCE) if mode == "cd" else None,
    )
    lower = n - 2 - OPENAI[f"{scales}.indices"]  # their grid falls, ours rises
    levels = (lower.double() + 0.5) / (n - 1)
    student = openai_toy("online", dtype)
    companions: dict[str, Network] = {n: openai_toy(n, dtype) for n in ("target", "teacher")}
    batch = stored_batch(OPENAI["x_start"].to(dtype), OPENAI["noise"].to(dtype), levels)
    return method.loss(Networks(student, companions), batch, now(N=n)), student


OPENAI_KEYS = [
    k.removesuffix(".loss") for k in OPENAI.keys("n") if k.endswith(".loss") and k.count(".") == 4
]


@pytest.mark.parametrize("key", OPENAI_KEYS)
def test_openai_losses_and_gradients(key):
    loss, student = openai_loss(key, torch.float32)
    OPENAI.check(f"{key}.loss", loss.per_sample)
    exact, _ = openai_loss(key, torch.float64)
    assert exact.per_sample.dtype == torch.float64
    OPENAI.check(f"{key}.loss.f64", exact.per_sample)
    if OPENAI.keys(f"{key}.grad."):
        loss.per_sample.mean().backward()
        for name in "abd":
            OPENAI.check(f"{key}.grad.{name}", getattr(student.model, name).grad)


def test_openai_cases_cover_what_they_should():
    parts = [k.split(".") for k in OPENAI_KEYS]
    assert len(OPENAI_KEYS) == 26
    assert {p[1] for p in parts} == {"ct", "cd"}
    assert {p[2] for p in parts} == set(OPENAI_DISTANCES)
    assert {p[3] for p in parts} == set(OPENAI_WEIGHTS)


def test_openai_consistency_function():
    """Their `denoise` with boundary scalings is our flow map onto s_min."""
    method, sigmas = CM(pairs=GridPairing()), OPENAI["edm.sigmas"].double()
    x_t = OPENAI["x_start"] + sigmas.float()[:, None, None, None] * OPENAI["noise"]
    s = torch.full_like(sigmas, method.s_min)
    with torch.no_grad():
        out = method.flow_map(openai_toy("online", torch.float32), x_t, sigmas, s)
    OPENAI.check("denoise.boundary", out)


@pytest.mark.parametrize(("suffix", "dtype"), [("", torch.float32), (".f64", torch.float64)])
def test_openai_progressive_distillation(suffix, dtype):
    """Two Euler steps of the teacher, and the x0 that one step would need to get there."""
    grid = karras_grid(2 * 8 + 1).flip(0)
    first = 2 * OPENAI["progdist.indices"]
    t, m, s = grid[first], grid[first + 1], grid[first + 2]
    x = OPENAI["x_start"].to(dtype)
    x_t = VE().interpolate(x, OPENAI["noise"].to(dtype), t)
    with torch.no_grad():
        teacher, student = openai_toy("teacher", dtype), openai_toy("online", dtype)
        x_s = Euler()(teacher, Euler()(teacher, x_t, t, m), m, s)
        slope = (x_s - x_t) / (s - t)[:, None, None, None].to(dtype)
        target = VE().denoised_from_velocity(x_t, slope, t)
        error = SquaredL2()(student(x_t, t), target)
    OPENAI.check(f"progdist.n8.loss{suffix}", TruncatedSnr()(t, s).to(dtype) * error)
    # A DDIM step with this target lands where the two steps did.
    torch.testing.assert_close(VE().ddim(x_t, target, t, s), x_s, rtol=1e-4, atol=1e-4)


# locuslab/ect: continuous ratio, boundary 0, the student as its own target, norms


def ect_key(key: str) -> tuple[Gap, RatioStages, int, float]:
    """Parts of a variant such as "q2.sigmoid.s3.c0.06": gap, schedule, stage, Huber constant."""
    q, kind, stage, c = key.split(".", 3)
    gap = SigmoidRatio(k=8.0, b=1.0) if kind == "sigmoid" else ConstantRatio()
    return gap, RatioStages(q=float(q[1:]), kimg_per_stage=1.0), int(stage[1:]), float(c[1:])


def ect_loss(key: str) -> tuple[Loss, Recording]:
    gap, stages, stage, c = ect_key(key)
    method = CM(
        pairs=RatioPairing(times=LogNormal(mean=-1.1, std=2.0), gap=gap),
        distance=PseudoHuber(c=c),
        weight=InverseGap(),
        boundary=0.0,
    )
    values = stages(dataclasses.replace(now(), images=1000 * stage))
    assert values["stage"] == stage
    levels = torch.special.ndtr(ECT["rnd_normal"].flatten().double())
    batch = stored_batch(ECT["images"], ECT["eps"], levels, cond=ECT["class_labels"])
    student = Recording(recorded_unet(ECT).train())
    return method.loss(Networks(student), batch, now(**values)), student


ECT_KEYS = [k.removesuffix(".loss") for k in ECT.keys("q") if k.endswith(".loss")]


@pytest.mark.parametrize("key", ECT_KEYS)
def test_ect_losses_and_gradients(key):
    loss, student = ect_loss(key)
    online, target = student.calls
    variant = ".".join(key.split(".")[:3])
    ECT.check("t", online["t"])
    ECT.check(f"{variant}.r", target["t"])
    ECT.check("D_yt", online["out"])
    if f"{variant}.D_yr" in ECT:
        ECT.check(f"{variant}.D_yr", target["out"])
    ECT.check(f"{key}.loss", loss.per_sample)
    torch.testing.assert_close(loss.times, online["t"], rtol=0, atol=0)
    if ECT.keys(f"{key}.grad."):
        check_gradients(ECT, f"{key}.grad.", loss, student.net)


def test_ect_cases_cover_what_they_should():
    parts = [k.split(".", 3) for k in ECT_KEYS]
    assert len(ECT_KEYS) == 28
    assert {p[0] for p in parts} == {"q2", "q4"}
    assert {p[1] for p in parts} == {"const", "sigmoid"}
    assert {p[3] for p in parts} == {"c0", "c0.06"}
    assert sum(bool(ECT.keys(f"{k}.grad.")) for k in ECT_KEYS) == 3
    assert (ECT["q2.sigmoid.s0.r"] == 0).any()


# NVlabs/FastGen: r at least 0.002, t at least r + 1e-6, Euler's step of the teacher


FASTGEN_PAIRS = RatioPairing(times=AsDrawn(), gap=SigmoidRatio(r_min=0.002), min_gap=1e-6)
# Not recorded in the case; the one value with which the guided targets agree.
FASTGEN_GUIDANCE = 2.5


def fastgen_loss(
    mode: str = "ct",
    ratio: float = 0.875,
    distance: Distance = PseudoHuber(c=1e-8),  # noqa: B008, a value
    weight: Weight = InverseGap(),  # noqa: B008
    pairs: Pairing = FASTGEN_PAIRS,
) -> tuple[Loss, Recording]:
    scale = {"ct": None, "cd": 1.0, "cd_cfg": FASTGEN_GUIDANCE}[mode]
    teacher = None if scale is None else Teacher(source=ANY_SOURCE, guidance=scale)
    method = CM(
        pairs=pairs,
        distance=distance,
        weight=weight,
        teacher=teacher,
        step=Euler(),
        boundary=0.0,
    )
    student = Recording(recorded_unet(FASTGEN).train())
    companions: dict[str, Network] = {"teacher": recorded_unet(FASTGEN, "teacher.").eval()}
    batch = stored_batch(
        FASTGEN["real_data"],
        FASTGEN["eps"],
        levels=FASTGEN["t"],
        cond=FASTGEN["condition"],
    )
    return method.loss(Networks(student, companions), batch, now(ratio=ratio)), student


@pytest.mark.parametrize("mode", ["ct", "cd", "cd_cfg"])
@pytest.mark.parametrize("ratio", [0.5, 0.875, 0.99])
def test_fastgen_losses(mode, ratio):
    loss, student = fastgen_loss(mode, ratio)
    online, target = student.calls
    FASTGEN.check(f"ratio{ratio}.t_used", online["t"])
    FASTGEN.check(f"ratio{ratio}.r", target["t"])
    FASTGEN.check("D_yt", online["out"])
    key = f"ratio{ratio}.{mode}"
    if f"{key}.D_yr" in FASTGEN:
        FASTGEN.check(f"{key}.D_yr", target["out"])
    FASTGEN.check(f"{key}.loss", loss.per_sample)
    unweighted, _ = fastgen_loss(mode, ratio, weight=Uniform())
    FASTGEN.check(f"{key}.unweighted", unweighted.per_sample)


FASTGEN_WEIGHTS: dict[str, Weight] = {
    "default": InverseGap(),
    "c_out": InverseCout(power=1.0),
    "c_out_sq": InverseCout(power=2.0),
    "sigma_sq": InverseSigma(power=2.0),
    "sqrt": InverseGap(power=0.5),
    "one": Uniform(),
}
FASTGEN_DISTANCES: dict[str, Distance] = {
    "huber1e-08.sq0": PseudoHuber(c=1e-8),
    "huber0.06.sq0": PseudoHuber(c=0.06),
    "huber0.sq1": SquaredL2(reduction="sum"),
}


@pytest.mark.parametrize("weight", FASTGEN_WEIGHTS)
@pytest.mark.parametrize("distance", FASTGEN_DISTANCES)
def test_fastgen_weightings_and_distances(weight, distance):
    loss, _ = fastgen_loss(distance=FASTGEN_DISTANCES[distance], weight=FASTGEN_WEIGHTS[weight])
    FASTGEN.check(f"w.{weight}.{distance}.loss", loss.per_sample)


def test_fastgen_weightings_are_all_tested():
    assert len(FASTGEN.keys("w.")) == len(FASTGEN_WEIGHTS) * len(FASTGEN_DISTANCES)


def test_fastgen_moves_t_up_where_r_reaches_it():
    times = f64(0.002, 0.0020000005, 0.5)
    batch = stored_batch(torch.zeros(3, 1), torch.zeros(3, 1), times)
    t, r = FASTGEN_PAIRS(batch.draws, now(ratio=0.99))
    assert r[:2].tolist() == [0.002, 0.002]
    torch.testing.assert_close(t, f64(0.002001, 0.002001, 0.5))
    assert (t > r).all()


def test_fastgen_quantised_times():
    pairs = QuantisedPairing(pairs=FASTGEN_PAIRS)
    loss, student = fastgen_loss(pairs=pairs)
    online, target = student.calls
    FASTGEN.check("quantize.t", online["t"])
    FASTGEN.check("quantize.r", target["t"])
    FASTGEN.check("quantize.loss", loss.per_sample)


@pytest.mark.parametrize("mode", ["ct", "cd_cfg"])
def test_fastgen_gradients(mode):
    loss, student = fastgen_loss(mode)
    check_gradients(FASTGEN, f"grad.{mode}.ratio0.875.", loss, student.net)


@pytest.mark.parametrize(("steps", "times"), [(1, (80.0,)), (3, (80.0, 5.0, 0.8))])
def test_fastgen_generation(steps, times):
    """Their "sde" is denoise and re-noise; their "ode" keeps the noise that the map implies."""
    method = CM(pairs=FASTGEN_PAIRS, boundary=0.0)
    net = recorded_unet(FASTGEN).eval()
    noises = list(FASTGEN["gen.noise"])
    cond = FASTGEN["condition"][:2]

    def flow_map(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return method.flow_map(net, x, t, s, cond)

    with torch.no_grad():
        sde = multistep(
            flow_map, 80 * noises[0], times, iter(noises[1:]).__next__, method.path, method.s_min
        )
        FASTGEN.check(f"gen.sde.{steps}step", sde)
        ode = ddim(lambda x, t: flow_map(x, t, 0 * t), 80 * noises[0], (*times, 0.0), method.path)
        FASTGEN.check(f"gen.ode.{steps}step", ode)
