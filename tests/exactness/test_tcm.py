"""TCM: its losses and gradients against both official codes, its rows, its targets, contracts."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from consistency_fakes import (
    AsDrawn,
    ConsistencyOf,
    Gains,
    Recording,
    StoredDraws,
    f64,
    now,
    quadrature,
    random_batch,
    small_unet,
)
from edm_networks import ARCHITECTURES, RENAMED
from fastflow.closed_forms import ect_fixed_point_gaussian
from fastflow.consistency import (
    Distance,
    Euler,
    InverseCout,
    InverseGap,
    PseudoHuber,
    SquaredL2,
    Uniform,
    Weight,
)
from fastflow.data.batch import Batch
from fastflow.errors import ConfigError
from fastflow.generate import generate
from fastflow.method import Frozen, Loss, Networks
from fastflow.network import Network
from fastflow.oracle import Gaussian
from fastflow.path import expand, scaled
from fastflow.rng import isolated_rng
from fastflow.schedules import RatioStages, SigmoidRatio
from fastflow.teacher import Teacher
from fastflow.times import LogNormal, TruncatedLogNormal, TruncatedLogStudentT
from fastflow.wrappers import EDMDenoiser
from methods.ect import ECT
from methods.tcm import TCM, Truncated
from networks.mlp import ToyMLP
from reference_data import Reference, reference

STAGE1, STAGE2, TIMES, FASTGEN = (
    reference(n)
    for n in ("tcm_loss_stage1", "tcm_loss_stage2", "tcm_t_distributions", "fastgen_tcm_loss")
)
ANY_SOURCE = Frozen(weights="unused: tests hand the networks over")
METHOD = TCM(stage1=ANY_SOURCE)


def tcm(**changes) -> TCM:
    return dataclasses.replace(METHOD, **changes)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def images(count: int, seed: int = 0) -> Tensor:
    return 0.5 * normal(count, 1, 8, 8, seed=seed).float()


@dataclasses.dataclass(frozen=True, eq=False)
class WithBoundary(StoredDraws):
    """Stored draws whose share of rows is given as well."""

    rows: tuple[int, ...] = ()

    def share(self, name, share):
        assert name == "boundary"
        assert len(self.rows) == self.rows_in(share)
        return torch.tensor([i in self.rows for i in self.indices])


class Above(AsDrawn):
    """The stored levels, for a method that wants none below 1."""

    def quantile(self, u):
        return u.clamp_min(1.0)


def recorded_batch(
    x: Tensor, eps: Tensor, t: Tensor, rows: Tensor | None = None, cond: Tensor | None = None
) -> Batch:
    """A batch with given noise, times and boundary rows."""
    draws = WithBoundary(
        seed=0,
        step=0,
        indices=tuple(range(len(x))),
        total=len(x),
        eps=eps,
        levels=t,
        rows=() if rows is None else tuple(rows.tolist()),
    )
    return Batch(x=x, cond=cond, augment=None, draws=draws)


def recorded_unet(ref: Reference, prefix: str) -> EDMDenoiser:
    kwargs = {RENAMED.get(k, k): v for k, v in ref.config["net"].items()}
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
    sigma_data, kind = kwargs.pop("sigma_data"), kwargs.pop("model_type")
    kwargs["in_channels"] = kwargs["out_channels"] = kwargs.pop("img_channels")
    net = EDMDenoiser(ARCHITECTURES[kind](**kwargs), sigma_data=sigma_data)
    # FastGen's network has a head for the log-variance, which its consistency loss does not use.
    weights = {k: v for k, v in ref.weights(prefix).items() if "logvar" not in k}
    net.load_state_dict(weights, strict=True)
    return net.train()


def check_gradients(ref: Reference, prefix: str, total: Tensor, net: nn.Module) -> None:
    total.backward()
    parameters = dict(net.named_parameters())
    keys = ref.keys(prefix)
    assert len(keys) == 3
    for key in keys:
        ref.check(key, parameters[key.removeprefix(prefix)].grad)


# NVlabs/TCM, second stage


OFFICIAL: list[tuple[Distance, Weight]] = [
    (PseudoHuber(c=0.0), InverseGap()),
    (PseudoHuber(c=1e-8), InverseGap()),
    (PseudoHuber(c=0.06), InverseCout()),
    (PseudoHuber(c=0.06), InverseCout(power=1.0)),
    (PseudoHuber(c=0.0), InverseGap(power=0.5)),
    (SquaredL2(reduction="sum"), Uniform()),
]
BOUNDARY = STAGE2["perm"][:2].sort().values
OTHERS = torch.tensor([i for i in range(8) if i not in BOUNDARY])


def official_loss(stage: int, variant: int) -> tuple[Loss, Recording, Recording]:
    distance, weight = OFFICIAL[variant]
    q, number, limit = STAGE2.config["stages"][stage].values()
    values = RatioStages(q=q, kimg_per_stage=1.0, limit=limit)(
        dataclasses.replace(now(), images=1000 * number)
    )
    assert values["ratio"] == STAGE2.values["ratio"][f"s{stage}"]
    student, stage1 = (Recording(recorded_unet(STAGE2, f"net_{name}.")) for name in "st")
    batch = recorded_batch(STAGE2["images"], STAGE2["eps"], STAGE2["logt"].exp(), BOUNDARY)
    method = tcm(times=Above(), distance=distance, weight=weight)
    return method.loss(Networks(student, {"stage1": stage1}), batch, now(**values)), student, stage1


def parts(loss: Loss, method: TCM = METHOD) -> tuple[Tensor, Tensor]:
    """The weighted losses w d of all rows and the objective, from what the method returns."""
    count, total = len(BOUNDARY), len(loss.per_sample)
    factor = torch.full((total,), total / (total - count), dtype=torch.float64)
    factor[BOUNDARY] = total * method.boundary_weight / count
    return loss.per_sample / factor, loss.per_sample.mean()


@pytest.mark.parametrize("variant", range(6))
@pytest.mark.parametrize("stage", range(3))
def test_official_losses_and_gradients(stage, variant):
    loss, student, stage1 = official_loss(stage, variant)
    each, total = parts(loss)
    key = f"s{stage}.v{variant}"
    # Their 1 + 1e-8 of boundary rows is rounded to 1 on the way; FastGen's is not.
    inside = loss.times - 1e-8 * (loss.times == 1 + 1e-8)
    STAGE2.check(f"s{stage}.t", inside)
    STAGE2.check(f"{key}.loss", each[OTHERS])
    STAGE2.check(f"{key}.loss_boundary", each[BOUNDARY])
    if f"{key}.total" in STAGE2:
        STAGE2.check(f"{key}.total", total)
        check_gradients(STAGE2, f"{key}.grad.net_s.", total, student.net)
    assert all(p.grad is None for p in stage1.parameters())


def by_row(student: Recording, stage1: Recording, r: Tensor) -> tuple[Tensor, Tensor]:
    """D(x_t, t) and the target of each row: rows with r >= 1 were passed first."""
    order = torch.cat([(r >= 1).nonzero()[:, 0], (r < 1).nonzero()[:, 0]])
    back = order.argsort()
    (above, kept, below), (frozen,) = student.calls, stage1.calls
    online = torch.cat([above["out"], below["out"]])
    target = torch.cat([kept["out"], frozen["out"]])
    times = torch.cat([kept["t"], frozen["t"]])
    assert torch.equal(times[back], r)
    return online[back], target[back]


@pytest.mark.parametrize("stage", range(3))
def test_official_targets(stage):
    loss, student, stage1 = official_loss(stage, 0)
    r = STAGE2[f"s{stage}.r"]
    ratio = STAGE2.values["ratio"][f"s{stage}"]
    STAGE2.check(f"s{stage}.r", METHOD.gap(STAGE2[f"s{stage}.t"], ratio))
    online, target = by_row(student, stage1, METHOD.gap(loss.times, ratio))
    STAGE2.check("D_yt", online)
    STAGE2.check(f"s{stage}.D_yr", target)
    STAGE2.check(f"s{stage}.l2", (online - target).flatten(1).norm(dim=1)[OTHERS])
    for variant, (distance, _) in enumerate(OFFICIAL):
        unweighted = distance(online, target)
        STAGE2.check(f"s{stage}.v{variant}.loss_unweighted", unweighted[OTHERS])
    assert (r < 1).any()
    assert (r >= 1).any()


def test_official_denoiser_in_float64():
    net = recorded_unet(STAGE2, "net_s.").double()
    t = STAGE2["s0.t"]
    x = STAGE2["images"].double() + scaled(t, STAGE2["eps"].double())
    with torch.no_grad():
        STAGE2.check("D_yt.f64", net(x, t))


def test_official_cases_cover_what_they_should():
    assert len(STAGE2.config["variants"]) == len(OFFICIAL)
    assert sum(k.endswith(".total") for k in STAGE2.keys("s")) == 2
    named = ("t", "r", "D_yr", "l2", "loss", "loss_boundary", "loss_unweighted", "total")
    outputs = {k for k in STAGE2.keys("s") if ".grad." not in k}
    assert {k.split(".")[-1] for k in outputs} == set(named)


# NVlabs/TCM, first stage: ECT with r of at least 1e-6, distilled by Euler's step


@pytest.mark.parametrize("mode", ["ct", "cd"])
def test_official_first_stage(mode):
    method = ECT(
        times=AsDrawn(),
        gap=SigmoidRatio(r_min=1e-6),
        distance=PseudoHuber(c=1e-8),
        teacher=Teacher(source=ANY_SOURCE) if mode == "cd" else None,
        step=Euler(),
    )
    values = RatioStages(q=2, kimg_per_stage=1.0)(dataclasses.replace(now(), images=2000))
    student = Recording(recorded_unet(STAGE1, "net_s."))
    nets = Networks(student, {"teacher": recorded_unet(STAGE1, "net_t.").eval()})
    batch = recorded_batch(STAGE1["images"], STAGE1["eps"], STAGE1["logt"].exp())
    loss = method.loss(nets, batch, now(**values))
    target = student.calls[1]
    STAGE1.check(f"{mode}.r", target["t"])
    STAGE1.check(f"{mode}.x_r", target["x"])
    STAGE1.check(f"{mode}.loss", loss.per_sample)


# NVlabs/TCM, laws of t


@pytest.mark.parametrize("case", TIMES.values)
def test_official_times(case):
    stored = TIMES.values[case]
    p = stored["params"]
    if stored["kind"] == "t":
        law = TruncatedLogStudentT(
            df=p["df"], loc=p["mu"], scale=p["sigma"], t_min=p["lo"], t_max=p["hi"]
        )
        assert law == METHOD.times
    else:
        law = TruncatedLogNormal(mean=p["mu"], std=p["sigma"], t_min=p["lo"], t_max=p["hi"])
    quantiles = law.quantile(f64(*stored["levels"])).log()
    # Their table is as exact as scipy's inverse of Student's law.
    torch.testing.assert_close(quantiles, f64(*stored["ppf_log_t"]), rtol=1e-6, atol=1e-8)
    sample = stored["log_t"]
    level = f64(*sample["quantile_levels"])
    spread = (level * (1 - level) / sample["n"]).sqrt()
    low, high = (law.quantile((level + k * spread).clamp(1e-9, 1 - 1e-9)).log() for k in (-5, 5))
    drawn = f64(*sample["quantiles"])
    assert ((drawn >= low) & (drawn <= high)).all()
    ends = law.quantile(f64(1e-16, 1 - 1e-16))
    assert p["lo"] <= ends.min()
    assert ends.max() <= p["hi"]


def test_official_times_from_the_same_numbers():
    """Theirs are uniform between the levels of both ends, the lower one of which is 1/2."""
    u = TIMES["0.u"]
    top = stats.t.cdf(math.log(80.0) / 0.2, 0.01)
    TIMES.check("0.log_t", METHOD.times.quantile((u - 0.5) / (top - 0.5)).log())


# NVlabs/FastGen


FASTGEN_VARIANTS = {
    "v0": {"distance": PseudoHuber(c=1e-8), "weight": InverseGap()},
    "v1": {"distance": PseudoHuber(c=0.06), "weight": InverseCout()},
    "v2": {"distance": PseudoHuber(c=0.06), "weight": InverseGap()},
}


@pytest.mark.parametrize("variant", FASTGEN_VARIANTS)
def test_fastgen_losses_and_gradients(variant):
    """Its floor under r is 0.002; otherwise the second stage is the official one."""
    values = FASTGEN.values[variant]
    method = tcm(times=Above(), gap=SigmoidRatio(r_min=0.002), **FASTGEN_VARIANTS[variant])
    student = Recording(recorded_unet(FASTGEN, "net."))
    stage1 = Recording(recorded_unet(FASTGEN, "cm_teacher."))
    edge = FASTGEN["perm"][:2]
    batch = recorded_batch(
        FASTGEN["real_data"], FASTGEN["eps"], FASTGEN["t"], edge, FASTGEN["condition"]
    )
    loss = method.loss(Networks(student, {"stage1": stage1}), batch, now(ratio=values["ratio"]))
    FASTGEN.check("t_used", loss.times)
    r = method.gap(loss.times, values["ratio"])
    FASTGEN.check(f"{variant}.r", r)
    online, target = by_row(student, stage1, r)
    FASTGEN.check("D_yt", online)
    FASTGEN.check(f"{variant}.D_yr", target)
    factor = torch.full((8,), 8 / 6, dtype=torch.float64)
    factor[edge] = 8 * 0.1 / 2
    each = loss.per_sample / factor
    others = torch.tensor([i not in edge for i in range(8)])
    FASTGEN.check(f"{variant}.per_sample", each)
    FASTGEN.check(f"{variant}.cm_loss", each[others].mean())
    FASTGEN.check(f"{variant}.loss_boundary", each[edge].mean())
    FASTGEN.check(f"{variant}.total_loss", loss.per_sample.mean())
    unweighted = method.distance(online, target)
    FASTGEN.check(f"{variant}.unweighted_cm_loss", unweighted[others].mean())
    prefix = f"{variant}.grad.net."
    if FASTGEN.keys(prefix):
        check_gradients(FASTGEN, prefix, loss.per_sample.mean(), student.net)


def test_fastgen_denoiser_in_float64():
    net, t = recorded_unet(FASTGEN, "net.").double(), FASTGEN["t_used"]
    x = FASTGEN["real_data"].double() + scaled(t, FASTGEN["eps"].double())
    with torch.no_grad():
        FASTGEN.check("D_yt.f64", net(x, t, cond=FASTGEN["condition"].double()))


# Rows and targets


CURRICULUM = now(ratio=0.9)


def where_form(method: TCM, nets: Networks, batch: Batch, ratio: float) -> Tensor:
    """The loss with both targets computed for all rows, [B]."""
    boundary = batch.draws.share("boundary", method.boundary_share)
    t = method.times(batch.draws)
    t[boundary] = method.transition + 1e-8
    r = method.gap(t, ratio)
    eps = batch.draws.normal("eps", batch.x.shape[1:], dtype=batch.x.dtype)
    x_t, x_r = (batch.x + scaled(time, eps) for time in (t, r))
    online = nets.student(x_t, t, cond=batch.cond)
    with torch.no_grad():
        ours, theirs = (n(x_r, r, cond=batch.cond) for n in (nets.student, nets["stage1"]))
    target = torch.where(expand(r >= method.transition, ours), ours, theirs)
    each = method.weight(t, r).to(online.dtype) * method.distance(online, target)
    total = batch.draws.total
    rows = int(method.boundary_share * total)
    factor = torch.full_like(t, total / (total - rows))
    factor[boundary] = total * method.boundary_weight / max(rows, 1)
    return each * factor.to(each.dtype)


def two_unets(dropout: float = 0.0, cond_dim: int = 0) -> Networks:
    student, stage1 = (small_unet(seed, dropout, cond_dim).train() for seed in (0, 1))
    return Networks(student, {"stage1": stage1.requires_grad_(False)})


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
def test_each_row_has_its_target(ratio, share):
    """As if both targets were computed for every row, loss and gradient."""
    nets, method = two_unets(cond_dim=3), tcm(boundary_share=share)
    for net in (nets.student, nets["stage1"]):
        net.double()
    batch = random_batch(images(16).double(), cond=torch.eye(3).double()[torch.arange(16) % 3])
    loss = method.loss(nets, batch, now(ratio=ratio)).per_sample
    expected = where_form(method, nets, batch, ratio)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    found, wanted = (
        torch.autograd.grad(value.mean(), list(nets.student.parameters()))
        for value in (loss, expected)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * b.abs().max().item())


def test_rows_are_routed_exactly_at_the_transition():
    """r = t' belongs to the student, the next smaller number to the first stage."""
    below = torch.nextafter(f64(1.0), f64(0.0)).item()

    class Given(SigmoidRatio):
        def __call__(self, t, ratio):
            return f64(1.0, below, 1.5, 0.3)

    student, stage1 = (Recording(net) for net in (small_unet(0), small_unet(1)))
    method = tcm(times=Above(), gap=Given(), boundary_share=0.0)
    batch = recorded_batch(images(4), images(4, seed=3), f64(2.0, 2.0, 2.0, 2.0))
    method.loss(Networks(student, {"stage1": stage1}), batch, CURRICULUM)
    first, kept, second = student.calls
    (frozen,) = stage1.calls
    assert kept["t"].tolist() == [1.0, 1.5]
    assert frozen["t"].tolist() == [below, 0.3]
    assert first["out"].requires_grad
    assert second["out"].requires_grad
    assert not kept["out"].requires_grad
    assert not frozen["out"].requires_grad


def test_each_row_costs_one_target():
    student, stage1 = (Recording(net) for net in (small_unet(0), small_unet(1)))
    nets, batch = Networks(student, {"stage1": stage1}), random_batch(images(16))
    METHOD.loss(nets, batch, now(ratio=0.9))
    first, kept, second = (len(call["x"]) for call in student.calls)
    (frozen,) = (len(call["x"]) for call in stage1.calls)
    assert first + second == kept + frozen == 16
    assert first == kept > 0
    assert second == frozen >= 4


@pytest.mark.parametrize("low", [True, False])
def test_no_network_is_left_out(low):
    """Or the processes that share a sharded network would wait for each other."""
    student, stage1 = (Recording(net) for net in (small_unet(0), small_unet(1)))
    method = tcm(times=Above(), boundary_share=0.0)
    nets, t = Networks(student, {"stage1": stage1}), f64(1.1, 1.2) if low else f64(50.0, 70.0)
    loss = method.loss(nets, recorded_batch(images(2), images(2, seed=1), t), now(ratio=0.5))
    assert [len(call["x"]) for call in student.calls] == ([1, 1, 2] if low else [2, 2, 1])
    assert [len(call["x"]) for call in stage1.calls] == ([2] if low else [1])
    plain = Networks(student.net, {"stage1": stage1.net})
    expected = where_form(method, plain, recorded_batch(images(2), images(2, seed=1), t), 0.5)
    torch.testing.assert_close(loss.per_sample, expected, rtol=1e-5, atol=1e-6)
    # All calls with a graph take part in the backward pass.
    outs = [call["out"] for call in student.calls if call["out"].requires_grad]
    gradients = torch.autograd.grad(loss.per_sample.sum(), outs)
    assert sorted(len(g) for g in gradients) == [1, 2]


def test_boundary_rows_and_their_weight():
    nets, batch = two_unets(), random_batch(images(10))
    loss = METHOD.loss(nets, batch, CURRICULUM)
    edge = loss.times == METHOD.transition + 1e-8
    assert int(edge.sum()) == 2  # int(0.25 * 10)
    assert (METHOD.gap(loss.times, 0.9)[edge] < 1).all()
    assert (loss.times >= 1).all()
    heavier = tcm(boundary_weight=0.3).loss(nets, batch, CURRICULUM)
    torch.testing.assert_close(heavier.per_sample[edge], 3 * loss.per_sample[edge])
    assert torch.equal(heavier.per_sample[~edge], loss.per_sample[~edge])
    none = tcm(boundary_share=0.0).loss(nets, batch, CURRICULUM)
    assert (none.times != 1 + 1e-8).all()
    assert torch.equal(none.times[~edge], loss.times[~edge])
    torch.testing.assert_close(none.per_sample[~edge], loss.per_sample[~edge] * 8 / 10)


class Constant(Network):
    """A denoiser that knows one picture."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Parameter(torch.full((1, 8, 8), 0.3))

    def forward(self, x, t, s=None, cond=None, augment=None, guidance=None):
        return self.picture.expand_as(x) + 0 * x


def test_without_boundary_a_constant_has_no_loss():
    """Times stay so far up that no target comes from the first stage."""
    nets = Networks(Constant(), {"stage1": small_unet().requires_grad_(False)})
    far = TruncatedLogStudentT(t_min=10.0)
    free = tcm(times=far, boundary_share=0.0).loss(nets, random_batch(images(8)), CURRICULUM)
    assert (free.per_sample == 0).all()
    bound = tcm(times=far).loss(nets, random_batch(images(8)), CURRICULUM)
    assert int((bound.per_sample > 1).sum()) == 2


def test_only_the_student_is_differentiated():
    nets = two_unets()
    METHOD.loss(nets, random_batch(images(8)), CURRICULUM).per_sample.mean().backward()
    assert all(p.grad is not None for p in nets.student.parameters())
    assert all(p.grad is None for p in nets["stage1"].parameters())


class Masks(Network):
    """A denoiser of nothing but dropout masks."""

    def forward(self, x, t, s=None, cond=None, augment=None, guidance=None):
        return nn.functional.dropout(1 + nn.functional.dropout(torch.ones_like(x))) + 0 * x


def test_dropout_masks_of_both_targets_are_those_of_the_online_pass():
    net, batch = Masks(), random_batch(images(16))
    method = tcm(distance=PseudoHuber(c=0.0))
    with isolated_rng(7, "cpu"):
        loss = method.loss(Networks(net, {"stage1": net}), batch, CURRICULUM)
        following = torch.rand(4)
    assert (loss.per_sample == 0).all()
    r = method.gap(loss.times, 0.9)
    # The stream stands where the online passes alone leave it.
    with isolated_rng(7, "cpu"):
        kept, frozen = (net(batch.x[rows], None) for rows in (r >= 1, r < 1))
        assert torch.equal(torch.rand(4), following)
    assert len(kept) > 1
    assert len(frozen) > 1
    assert not torch.equal(kept[0], kept[1])


# The exact map, and fixed points


S = 0.5


def gaussian_losses(maps: Gains, stage1: Gains, t: Tensor, edge: Tensor) -> Tensor:
    """The population loss w d of each time in `t`, then of each boundary row, [N]."""
    x, eps = quadrature(S)
    every = torch.cat([t, edge])
    rows = torch.arange(4 * len(t), 4 * len(every))
    method = tcm(
        times=Above(),
        boundary_share=(len(rows) + 0.5) / (4 * len(every)),
        boundary_weight=len(edge) / len(t),  # every row weighs the same
        distance=SquaredL2(reduction="sum"),
        weight=Uniform(),
        gap=SigmoidRatio(),
    )
    batch = recorded_batch(
        x.repeat(len(every), 1), eps.repeat(len(every), 1), every.repeat_interleave(4), rows
    )
    nets = Networks(ConsistencyOf(maps, 0.0), {"stage1": ConsistencyOf(stage1, 0.0)})
    loss = method.loss(nets, batch, now(ratio=0.75))
    return loss.per_sample.reshape(-1, 4).mean(1) * len(t) / len(every)


def law(t: Tensor) -> Tensor:
    return SigmoidRatio()(t, 0.75)


def test_the_closed_form_of_consistency_training_is_stationary():
    """a(t) = a(r) (S^2 + r t) / (S^2 + t^2), where a(r) is the first stage's below t'."""
    times = [80.0, 30.0, 2.0]
    for value in times:  # which grow on the way
        r = law(f64(value)).item()
        times += [r] * (r >= 1)
    t, edge = f64(*times).unique(), f64(1.0 + 1e-8)
    every = torch.cat([t, edge])
    r = law(every)
    lower = r[r < 1].unique()
    known = torch.cat([lower, edge, t]).unique()
    gains = ect_fixed_point_gaussian(known, law, S)
    scale = 2 * gains * (S**2 + known**2)
    maps, stage1 = Gains(known, gains), Gains(lower, gains[: len(lower)])
    losses = gaussian_losses(maps, stage1, t, edge)
    (gradient,) = torch.autograd.grad(losses.sum(), maps.raw)
    assert (gradient / scale).abs().max() < 1e-12
    minimum = ect_fixed_point_gaussian(r, law, S) ** 2 * (every - r) ** 2 * S**2
    torch.testing.assert_close(losses.detach(), minimum / (S**2 + every**2), rtol=1e-9, atol=0)
    # A first stage that is 1 % too strong moves the optimum at the boundary.
    stage1 = Gains(lower, 1.01 * gains[: len(lower)])
    losses = gaussian_losses(maps, stage1, t, edge)
    (gradient,) = torch.autograd.grad(losses.sum(), maps.raw)
    assert (gradient / scale).abs()[known == edge].item() > 1e-3


def test_the_exact_map_is_consistent_through_both_networks():
    """f(X_{t->r}(x), r) = f(x, t) on every path of the ODE, also across the transition."""
    oracle = Gaussian.isotropic(S, mean=0.2)
    exact = ConsistencyOf(lambda x, t: oracle.flow_map(x, t, 0 * t), 0.0)
    both = METHOD.for_sampling(Networks(exact, {"stage1": exact}))
    t, r = f64(80.0, 5.0, 1.5, 1.0), f64(40.0, 0.5, 0.9, 0.2)
    x = scaled(t, normal(4, 3))
    direct = METHOD.flow_map(both, x, t, 0 * t)
    through = METHOD.flow_map(both, oracle.flow_map(x, t, r), r, 0 * t)
    torch.testing.assert_close(through, direct, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(direct, oracle.flow_map(x, t, 0 * t), rtol=1e-12, atol=1e-12)


# Sampling


def test_the_second_step_is_answered_by_the_first_stage():
    student, stage1 = (Recording(net) for net in (small_unet(0), small_unet(1)))
    nets = Networks(student, {"stage1": stage1})
    assert METHOD.sampling_companions == {"stage1"}
    net = METHOD.for_sampling(nets).eval()
    generate(METHOD, net, range(3), (1, 8, 8), (80.0, 0.821))
    (first,), (second,) = student.calls, stage1.calls
    assert (first["t"] == 80).all()
    assert (second["t"] == 0.821).all()


def test_a_view_of_both_networks():
    student, stage1 = small_unet(0, cond_dim=3), small_unet(1, cond_dim=3)
    net = Truncated(student, stage1, transition=1.0)
    below = torch.nextafter(f64(1.0), f64(0.0)).item()
    x, t, cond = images(4), f64(1.0, below, 80.0, 0.01), torch.eye(3)[[0, 1, 2, 0]]
    out = net(x, t, cond=cond)
    expected = [student, stage1, student, stage1]
    for i, source in enumerate(expected):
        alone = source(x[i : i + 1], t[i : i + 1], cond=cond[i : i + 1])
        torch.testing.assert_close(out[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert (net.sample_shape, net.cond_dim, net.sigma_data) == (
        student.sample_shape,
        student.cond_dim,
        student.sigma_data,
    )
    ends = METHOD.flow_map(net, x, t, 0 * t, cond)
    assert torch.equal(ends, out)


# Contracts


def test_the_same_draws_give_the_same_loss():
    nets, x = two_unets(), images(8)
    first, again = (METHOD.loss(nets, random_batch(x), CURRICULUM) for _ in range(2))
    assert torch.equal(first.per_sample, again.per_sample)
    assert first.per_sample.dtype == torch.float32
    assert first.times.dtype == torch.float64
    assert METHOD.needs == {"ratio"}
    assert all(not v.requires_grad and v.ndim == 0 for v in first.metrics.values())


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_loss_does_not_depend_on_how_the_batch_is_divided(size):
    nets, batch = two_unets(), random_batch(images(8))
    whole = METHOD.loss(nets, batch, CURRICULUM)
    divided = [METHOD.loss(nets, part, CURRICULUM) for part in batch.split(size)]
    assert torch.equal(torch.cat([loss.times for loss in divided]), whole.times)
    torch.testing.assert_close(
        torch.cat([loss.per_sample for loss in divided]), whole.per_sample, rtol=1e-4, atol=1e-6
    )


def test_autocast_leaves_the_loss_in_float32():
    nets, batch = two_unets(), random_batch(images(8))
    plain = METHOD.loss(nets, batch, CURRICULUM)
    with torch.autocast("cpu", torch.bfloat16):
        loss = METHOD.loss(nets, batch, CURRICULUM)
    assert loss.per_sample.dtype == torch.float32
    assert torch.equal(loss.times, plain.times)
    torch.testing.assert_close(loss.per_sample.mean(), plain.per_sample.mean(), rtol=0.2, atol=0)


def test_vectors_train_too():
    student, stage1 = (EDMDenoiser(ToyMLP(data_dim=2, width=16, depth=1)) for _ in range(2))
    nets = Networks(student, {"stage1": stage1.requires_grad_(False)})
    loss = METHOD.loss(nets, random_batch(normal(6, 2).float()), CURRICULUM)
    assert loss.per_sample.shape == (6,)


# Errors


@pytest.mark.parametrize("law", [LogNormal(mean=-1.1, std=2.0), TruncatedLogStudentT(t_min=0.9)])
def test_times_below_the_transition_are_refused(law):
    with pytest.raises(ConfigError, match=r"TCM.times: a law of t from .* up given, accepted"):
        tcm(times=law)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"transition": 0.0}, "TCM.transition: 0.0 given"),
        ({"transition": 80.0}, "TCM.transition: 80.0 given"),
        ({"boundary_share": 1.0}, "boundary_share=1.0"),
        ({"boundary_share": -0.1}, "boundary_share=-0.1"),
        ({"boundary_weight": -1.0}, "boundary_weight=-1.0"),
    ],
)
def test_impossible_numbers_are_refused(change, text):
    with pytest.raises(ConfigError, match=text):
        tcm(**change)


def test_a_ratio_of_1_is_refused():
    with pytest.raises(ConfigError, match="curriculum ratio: 1.0 reached"):
        METHOD.loss(two_unets(), random_batch(images(4)), now(ratio=1.0))


def test_a_first_stage_that_does_not_fit_is_refused():
    student = small_unet(cond_dim=3)
    METHOD.check(Networks(student, {"stage1": small_unet(cond_dim=3)}))
    with pytest.raises(ConfigError, match="stage1: cond_dim 0 given, accepted: 3"):
        METHOD.check(Networks(student, {"stage1": small_unet()}))
    with pytest.raises(ConfigError, match="stage1: augment_dim 2 given, accepted: 0"):
        METHOD.check(Networks(student, {"stage1": small_unet(cond_dim=3, augment_dim=2)}))
    other = small_unet(cond_dim=3)
    other.sigma_data = 1.0
    with pytest.raises(ConfigError, match=r"stage1: sigma_data 1.0 given, accepted: 0.5"):
        METHOD.check(Networks(student, {"stage1": other}))
    with pytest.raises(ConfigError, match="method.sigma_data"):
        METHOD.check(Networks(other, {"stage1": student}))


def test_the_dropout_of_the_first_stage_is_active():
    assert METHOD.companions()["stage1"].dropout
