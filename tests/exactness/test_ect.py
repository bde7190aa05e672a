"""ECT and ECD: official losses and gradients, r(t), its two ends, teachers, fixed points."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from consistency_fakes import (
    AsDrawn,
    ConsistencyOf,
    DenoiserOf,
    Gains,
    Recording,
    f64,
    now,
    quadrature,
    random_batch,
    small_unet,
    stored_batch,
)
from edm_networks import ARCHITECTURES, RENAMED
from fastflow.closed_forms import ect_fixed_point_gaussian
from fastflow.consistency import (
    Euler,
    Heun,
    InverseCout,
    InverseGap,
    PseudoHuber,
    SquaredL2,
    TeacherStep,
    Uniform,
)
from fastflow.errors import ConfigError
from fastflow.generate import generate
from fastflow.method import Frozen, Loss, Networks
from fastflow.oracle import Gaussian
from fastflow.path import expand, scaled
from fastflow.rng import isolated_rng
from fastflow.schedules import ConstantRatio, Gap, RatioStages, SigmoidRatio
from fastflow.teacher import Teacher
from fastflow.times import LogNormal
from fastflow.wrappers import EDMDenoiser
from methods.ect import ECT
from reference_data import reference

LOSS, SCHEDULE = reference("ect_loss"), reference("ect_schedule")
ANY_SOURCE = Frozen(weights="unused: tests hand the teacher over")
METHOD = ECT()
S = 0.5


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def images(count: int, seed: int = 0) -> Tensor:
    return 0.5 * normal(count, 1, 8, 8, seed=seed).float()


def at_stage(q: float, stage: int, limit: float = 1.0) -> dict[str, float]:
    moment = dataclasses.replace(now(), images=1000 * stage)
    return RatioStages(q=q, kimg_per_stage=1.0, limit=limit)(moment)


# locuslab/ect


GAPS: dict[str, Gap] = {"sigmoid": SigmoidRatio(k=8.0, b=1.0), "const": ConstantRatio()}


@pytest.mark.parametrize("key", SCHEDULE.keys("r."))
def test_official_r(key):
    _, q, kind, *_ = key.split(".")
    ratios = [at_stage(float(q[1:]), stage)["ratio"] for stage in range(9)]
    assert ratios == [SCHEDULE.values["ratio"][f"{q}.stage{stage}"] for stage in range(9)]
    SCHEDULE.check(key, torch.stack([GAPS[kind](SCHEDULE["t"], ratio) for ratio in ratios]))


def official_loss(key: str) -> tuple[Loss, Recording]:
    """The recorded variant, e.g. "q2.sigmoid.s3.c0.06"."""
    q, kind, stage, c = key.split(".", 3)
    method = ECT(gap=GAPS[kind], distance=PseudoHuber(c=float(c[1:])))
    kwargs = {RENAMED.get(k, k): v for k, v in LOSS.config["net"].items()}
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
    sigma_data, kind = kwargs.pop("sigma_data"), kwargs.pop("model_type")
    kwargs.pop("sigma_min")  # at evaluation only
    kwargs["in_channels"] = kwargs["out_channels"] = kwargs.pop("img_channels")
    net = EDMDenoiser(ARCHITECTURES[kind](**kwargs), sigma_data=sigma_data)
    net.load_state_dict(LOSS.weights(), strict=True)
    levels = torch.special.ndtr(LOSS["rnd_normal"].flatten().double())
    batch = stored_batch(LOSS["images"], LOSS["eps"], levels, cond=LOSS["class_labels"])
    student = Recording(net.train())
    values = at_stage(float(q[1:]), int(stage[1:]))
    return method.loss(Networks(student), batch, now(**values)), student


OFFICIAL = [k.removesuffix(".loss") for k in LOSS.keys("q") if k.endswith(".loss")]


@pytest.mark.parametrize("key", OFFICIAL)
def test_official_losses_and_gradients(key):
    loss, student = official_loss(key)
    online, target = student.calls
    variant = ".".join(key.split(".")[:3])
    LOSS.check("t", online["t"])
    LOSS.check(f"{variant}.r", target["t"])
    LOSS.check("D_yt", online["out"])
    if f"{variant}.D_yr" in LOSS:
        LOSS.check(f"{variant}.D_yr", target["out"])
    LOSS.check(f"{key}.loss", loss.per_sample)
    prefix = f"{key}.grad."
    if LOSS.keys(prefix):
        loss.per_sample.mean().backward()
        gradients = {n: p.grad for n, p in student.net.named_parameters()}
        for name in LOSS.keys(prefix):
            LOSS.check(name, gradients[name.removeprefix(prefix)])


def test_official_cases_cover_what_they_should():
    assert len(OFFICIAL) == 28
    assert sum(bool(LOSS.keys(f"{k}.grad.")) for k in OFFICIAL) == 3
    outputs = {k for k in LOSS.keys("") if LOSS.info["tensors"].get(k, {}).get("role") == "output"}
    known = ("t", "r", "D_yt", "D_yr", "loss")
    assert all(k.split(".")[-1] in known or ".grad." in k for k in outputs)


# r(t)


def test_ratios_that_are_the_same_stage():
    ratios = [at_stage(q, stage)["ratio"] for q, stage in ((256, 0), (2, 7), (4, 3))]
    assert ratios == [0.99609375] * 3


@pytest.mark.parametrize(
    ("stage", "t", "r", "digits"),
    [
        (0, 2.0, 0.046377, 6),
        (0, 5.0, 2.366143, 6),
        (0, 80.0, 40.0, 12),
        (0, 1.94591, 0.0, 12),
        (0, 0.3, 0.0, 12),
        (3, 1.0, 0.803029, 6),
        (7, 0.002, 0.001961, 6),
        (7, 1.0, 0.987689, 6),
        (7, 80.0, 79.6875, 12),
    ],
)
def test_published_values_of_r(stage, t, r, digits):
    found = METHOD.gap(f64(t), at_stage(2, stage)["ratio"]).item()
    assert found == pytest.approx(r, abs=0.6 * 10**-digits)


def test_r_leaves_0_at_ln_7():
    threshold = f64(7.0).log()
    assert METHOD.gap(threshold * (1 - 1e-9), 0.5).item() == 0
    assert METHOD.gap(threshold * (1 + 1e-9), 0.5).item() > 0


def test_times_are_not_clamped():
    """The law is the official one: ln t ~ N(-1.1, 2^2), also beyond [0.002, 80]."""
    assert METHOD.times == LogNormal(mean=-1.1, std=2.0)
    far = METHOD.times.quantile(torch.special.ndtr(f64(-4.0, 4.0)))
    torch.testing.assert_close(far.log(), f64(-9.1, 6.9), rtol=1e-9, atol=0)
    batch = stored_batch(images(2), images(2), torch.special.ndtr(f64(-4.0, 4.0)))
    loss = METHOD.loss(Networks(small_unet()), batch, now(ratio=0.5))
    torch.testing.assert_close(loss.times, far, rtol=1e-12, atol=0)


def test_a_ratio_of_1_is_refused():
    with pytest.raises(ConfigError, match="curriculum ratio: 1.0 reached at step 0"):
        METHOD.loss(Networks(small_unet()), random_batch(images(2)), now(ratio=1.0))
    with pytest.raises(ConfigError, match="'ratio'"):
        METHOD.loss(Networks(small_unet()), random_batch(images(2)), now())
    assert METHOD.needs == {"ratio"}


# Diffusion is stage 0


def test_rows_with_r_0_are_denoising():
    """The target is x0 to the bit, and the gradient that of a weighted denoising loss."""
    x, eps = images(6), normal(6, 1, 8, 8, seed=5).float()
    t = f64(0.01, 0.1, 0.5, 1.0, 1.9, 1.94)
    net = Recording(small_unet())
    method = ECT(times=AsDrawn())
    loss = method.loss(Networks(net), stored_batch(x, eps, t), now(ratio=0.5))
    online, target = net.calls
    assert (target["t"] == 0).all()
    assert torch.equal(target["out"], x)
    loss.per_sample.sum().backward()
    norm = (net.net(online["x"], t) - x).flatten(1).norm(dim=1)
    torch.testing.assert_close(loss.per_sample, (norm / t).float())
    expected = torch.autograd.grad((norm / t).sum(), list(net.parameters()))
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def test_the_recipe_of_imagenet_64_at_ratio_0_is_edm():
    """With the squared distance and its weight, ratio 0 gives EDM's own loss."""
    method = ECT(times=AsDrawn(), distance=SquaredL2(), weight=InverseCout())
    x, eps, t = images(4), normal(4, 1, 8, 8, seed=5).float(), f64(0.02, 0.5, 3.0, 70.0)
    net = small_unet()
    loss = method.loss(Networks(net), stored_batch(x, eps, t), now(ratio=0.0))
    error = (net(x + scaled(t, eps), t) - x).flatten(1).square().mean(1)
    expected = (t**2 + 0.25) / (t * 0.5) ** 2 * error
    torch.testing.assert_close(loss.per_sample, expected.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("c", [0.0, 0.06])
def test_weights_of_both_recipes(c):
    x, eps = images(4), normal(4, 1, 8, 8, seed=5).float()
    t = f64(2.5, 5.0, 20.0, 80.0)
    method, batch = ECT(times=AsDrawn(), distance=PseudoHuber(c=c)), stored_batch(x, eps, t)
    net = Recording(small_unet())
    loss = method.loss(Networks(net), batch, now(ratio=0.75))
    online, target = net.calls
    norm = (online["out"] - target["out"]).flatten(1).square().sum(1)
    plain = (norm + c**2).sqrt() - c
    r = t * (1 - 0.25 * (1 + 8 * torch.sigmoid(-t)))
    torch.testing.assert_close(target["t"], r, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.per_sample, (plain / (t - r)).float(), rtol=1e-5, atol=0)
    other = dataclasses.replace(method, weight=InverseCout())
    loss = other.loss(Networks(net), batch, now(ratio=0.75))
    weight = (t**2 + 0.25) / (t * 0.5) ** 2
    torch.testing.assert_close(loss.per_sample, (weight * plain).float(), rtol=1e-5, atol=0)


# What is differentiated, and dropout


@pytest.mark.parametrize("step", [None, Euler(), Heun()])
def test_only_the_online_pass_is_differentiated(step):
    teacher = None if step is None else Teacher(source=ANY_SOURCE)
    method = ECT(teacher=teacher, step=step or Euler())
    student, source = Recording(small_unet(0)), Recording(small_unet(1))
    nets, batch = Networks(student, {"teacher": source}), random_batch(images(4))
    method.loss(nets, batch, now(ratio=0.9)).per_sample.mean().backward()
    online, target = student.calls
    assert online["out"].requires_grad
    assert not target["out"].requires_grad
    assert not target["x"].requires_grad
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in source.parameters())
    assert len(source.calls) == {None: 0, Euler(): 1, Heun(): 2}[step]


def test_dropout_masks_are_those_of_the_online_pass():
    class Here(SigmoidRatio):
        def __call__(self, t, ratio):
            return t

    method = ECT(times=AsDrawn(), gap=Here(), weight=Uniform())
    net = Recording(small_unet(dropout=0.5).train())
    batch = stored_batch(images(3), images(3, seed=1), f64(0.5, 1.0, 5.0))
    with isolated_rng(7, "cpu"):
        loss = method.loss(Networks(net), batch, now(ratio=0.5))
        following = torch.rand(4)
    assert (loss.per_sample == 0).all()
    with isolated_rng(7, "cpu"):
        once = net.net(net.calls[0]["x"], loss.times)
        assert torch.equal(torch.rand(4), following)
    with isolated_rng(8, "cpu"):
        assert not torch.equal(net.net(net.calls[0]["x"], loss.times), once)


# Distillation


def test_the_teachers_step():
    """One Euler step from t to r, and D itself where r = 0."""
    source = Recording(small_unet(1))
    student = Recording(small_unet(0))
    method = ECT(times=AsDrawn(), teacher=Teacher(source=ANY_SOURCE))
    t = f64(0.5, 3.0, 30.0)
    batch = stored_batch(images(3), images(3, seed=1), t)
    method.loss(Networks(student, {"teacher": source}), batch, now(ratio=0.75))
    (call,), (online, target) = source.calls, student.calls
    assert torch.equal(call["x"], online["x"])
    assert torch.equal(call["t"], t)
    r = target["t"]
    assert r[0] == 0 < r[1]
    slope = (online["x"] - call["out"]) / expand(t, call["x"]).float()
    moved = online["x"] + expand(r - t, slope).float() * slope
    torch.testing.assert_close(target["x"], moved, rtol=1e-4, atol=1e-5)
    assert torch.equal(target["x"][0], call["out"][0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactStep(TeacherStep):
    """The flow of Gaussian data in the place of a solver's step."""

    def __call__(self, denoiser, x, t, r):
        return ORACLE.flow_map(x, t, r)


ORACLE = Gaussian.isotropic(S, mean=0.2)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.99])
def test_the_exact_map_has_no_distillation_loss(ratio):
    method = ECT(teacher=Teacher(source=ANY_SOURCE), step=ExactStep(), distance=SquaredL2())
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    student = ConsistencyOf(lambda x, t: scale * ORACLE.flow_map(x, t, 0 * t), s_min=0.0)
    nets = Networks(student, {"teacher": DenoiserOf(ORACLE.denoiser)})
    batch = random_batch(ORACLE.sample((32, 3), torch.Generator().manual_seed(0)))
    loss = method.loss(nets, batch, now(ratio=ratio)).per_sample
    assert loss.dtype == torch.float64
    assert loss.abs().max() < 1e-20 / (1 - ratio)
    loss.mean().backward()
    assert abs(scale.grad.item()) < 1e-9


# Fixed points on data N(0, S^2)


@pytest.mark.parametrize("teacher", [None, Teacher(source=ANY_SOURCE)], ids=["ect", "ecd"])
@pytest.mark.parametrize(("gap", "ratio"), [("sigmoid", 0.5), ("sigmoid", 0.875), ("const", 0.5)])
def test_the_closed_form_is_stationary(teacher, gap, ratio):
    """a(t) = a(r) (S^2 + r t) / (S^2 + t^2), from data and from Euler's step of the teacher."""
    law = GAPS[gap]
    times = [80.0, 7.0, 0.4]
    while (r := law(f64(times[-1]), ratio).item()) > 0 and len(times) < 40:
        times.append(r)
    t = f64(*times)
    r = law(t, ratio)
    known = torch.cat([t, r]).unique()
    gains = ect_fixed_point_gaussian(known, lambda t: law(t, ratio), S)
    method = ECT(times=AsDrawn(), gap=law, distance=SquaredL2(), weight=Uniform(), teacher=teacher)
    x, eps = quadrature(S)
    batch = stored_batch(x.repeat(len(t), 1), eps.repeat(len(t), 1), t.repeat_interleave(4))

    def losses(maps: Gains) -> Tensor:
        denoiser = DenoiserOf(Gaussian.isotropic(S).denoiser)
        nets = Networks(ConsistencyOf(maps, 0.0), {"teacher": denoiser})
        return method.loss(nets, batch, now(ratio=ratio)).per_sample.reshape(-1, 4).mean(1)

    maps = Gains(known, gains)
    found = losses(maps)
    (gradient,) = torch.autograd.grad(found.sum(), maps.raw)
    scale = 2 * gains * (S**2 + known**2)
    assert (gradient / scale).abs().max() < 1e-12
    a_r = ect_fixed_point_gaussian(r, lambda t: law(t, ratio), S)
    minimum = a_r**2 * (t - r) ** 2 * S**2 / (S**2 + t**2) if teacher is None else 0 * t
    torch.testing.assert_close(found.detach(), minimum, rtol=1e-10, atol=1e-20)
    wrong = Gains(known, torch.where(known == 7.0, 1.01, 1.0) * gains)
    (gradient,) = torch.autograd.grad(losses(wrong).sum(), wrong.raw)
    assert (gradient / scale)[known == 7.0].item() > 1e-3


# Sampling, contracts, what is asked of networks


@pytest.mark.parametrize("between", [0.821, 1.526])
def test_two_steps_land_at_0(between):
    """Noise of standard deviation t is added to a state without any."""
    assert METHOD.s_min == 0
    student = Recording(small_unet())
    generate(METHOD, student, range(2), (1, 8, 8), (80.0, between))
    assert [call["t"][0].item() for call in student.calls] == [80.0, between]
    x = images(4)
    assert torch.equal(METHOD.flow_map(small_unet(), x, f64(0, 0, 0, 0), f64(0, 0, 0, 0)), x)


@pytest.mark.parametrize("teacher", [None, Teacher(source=ANY_SOURCE, guidance=2.0)])
def test_a_loss_depends_on_its_own_sample(teacher):
    method = ECT(teacher=teacher)
    cond = torch.eye(3)[torch.arange(8) % 3]
    student, source = small_unet(0, cond_dim=3), small_unet(1, cond_dim=3)
    nets = Networks(student, {"teacher": source})
    first = method.loss(nets, random_batch(images(8), cond=cond), now(ratio=0.9))
    again = method.loss(nets, random_batch(images(8), cond=cond), now(ratio=0.9))
    assert torch.equal(first.per_sample, again.per_sample)
    alone = [
        method.loss(nets, part, now(ratio=0.9))
        for part in random_batch(images(8), cond=cond).split(1)
    ]
    torch.testing.assert_close(
        torch.cat([loss.per_sample for loss in alone]), first.per_sample, rtol=1e-4, atol=1e-4
    )
    assert first.per_sample.dtype == torch.float32
    assert first.times.dtype == torch.float64


def test_companions_are_those_of_the_teacher():
    assert METHOD.companions() == {}
    guide = Frozen(weights="a weaker model")
    method = ECT(teacher=Teacher(source=ANY_SOURCE, guidance=2.0, guide=guide))
    assert method.companions() == {"teacher": ANY_SOURCE, "guide": guide}


def test_networks_that_do_not_fit_are_refused():
    student = small_unet()
    student.sigma_data = 1.0
    with pytest.raises(ConfigError, match="method.sigma_data: 0.5 given, accepted: 1.0"):
        METHOD.check(Networks(student))
    method = ECT(teacher=Teacher(source=ANY_SOURCE, guidance=2.0))
    nets = Networks(small_unet(), {"teacher": small_unet()})
    with pytest.raises(ConfigError, match="guidance: 2.0 given without classes"):
        method.check(nets)


def test_sampling_may_land_above_0():
    """The official evaluation; training does not know of it."""
    shifted, net, x = ECT(shift=0.003), small_unet(), images(3)
    t = f64(0.003, 1.0, 80.0)
    out = shifted.flow_map(net, x, t, 0 * t)
    assert torch.equal(out[0], x[0])
    assert not torch.isclose(out[1], METHOD.flow_map(net, x, t, 0 * t)[1]).all()
    losses = [m.loss(Networks(net), random_batch(x), now(ratio=0.5)) for m in (METHOD, shifted)]
    assert torch.equal(losses[0].per_sample, losses[1].per_sample)
    for wrong in (-0.1, 80.0):
        with pytest.raises(ConfigError, match=f"ECT.shift: {wrong} given, accepted: from 0"):
            ECT(shift=wrong)


def test_the_default_weight_is_the_inverse_gap():
    assert METHOD.weight == InverseGap()
    assert METHOD.distance == PseudoHuber(c=0.0)
