"""sCM and its network against what NVIDIA FastGen's code gives, in float32 and in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from consistency_fakes import AsDrawn, now, stored_batch
from edm_networks import ARCHITECTURES, our_keywords
from fastflow.consistency import InverseSigma, Uniform
from fastflow.method import Frozen, Loss, Networks
from fastflow.path import VE, TrigFlow
from fastflow.path_difference import PathDifference
from fastflow.schedules import LinearRamp
from fastflow.tangent import DualNumbers, FunctionalJVP, Pairs
from fastflow.teacher import Teacher
from fastflow.wrappers import TrigFlowNetwork
from methods.scm import SCM
from networks.song_unet import SongUNet
from reference_data import Reference, reference

LOSS, PRECOND = reference("fastgen_scm_loss"), reference("fastgen_trigflow_precond")
PATH = TrigFlow()
GUIDANCE = 1.8  # not recorded; the one value with which the guided velocity agrees
STEPS = LOSS.config["tangent_warmup_steps"]

types = pytest.mark.parametrize(("suffix", "dtype"), [("", torch.float32), (".f64", torch.float64)])
each_mode = pytest.mark.parametrize("mode", ["ct", "cd", "cd_cfg"])


class EmbeddingHead(nn.Module):
    """FastGen's u: a linear map of what its U-Net reads of the noise level."""

    def __init__(self, model: SongUNet) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)
        self._features = model.map_noise.forward

    def forward(self, c_noise: Tensor) -> Tensor:
        features = self._features(c_noise).to(self.linear.weight.dtype)
        out: Tensor = self.linear(features).squeeze(1)
        return out

    def after_step(self) -> None:
        pass


def our_name(name: str) -> str:
    return name.replace("model.logvar_linear.", "logvar_head.linear.")


def network(ref: Reference, prefix: str, dtype: torch.dtype = torch.float32) -> TrigFlowNetwork:
    """The recorded EDM network, its weights as a TrigFlow network."""
    config: dict[str, Any] = dict(ref.config["net"])
    sigma_data, kind = config.pop("sigma_data"), config.pop("model_type")
    for limit in ("min_t", "max_t"):
        config.pop(limit)
    kwargs = our_keywords(config)
    kwargs["in_channels"] = kwargs["out_channels"] = kwargs.pop("img_channels")
    model = ARCHITECTURES[kind](**kwargs)
    net = TrigFlowNetwork(
        model, sigma_data=sigma_data, time="log_sigma", logvar_head=EmbeddingHead(model)
    )
    weights = {our_name(name): value for name, value in ref.weights(prefix).items()}
    net.load_state_dict(weights, strict=True)
    return net.to(dtype)


# The network


@types
def test_trigflow_network_from_edm_weights(suffix, dtype):
    net = network(PRECOND, "net.", dtype)
    x, t = PRECOND["x_t_hat"].to(dtype), PATH.t_of_nsr(PRECOND["t_edm"])
    PRECOND.check("t_hat", t)
    with torch.no_grad():
        out = net(x, t, cond=PRECOND["condition"].to(dtype))
        PRECOND.check(f"F_theta{suffix}", out)
        PRECOND.check(f"x0{suffix}", PATH.denoised_from_velocity(x, 0.5 * out, t))
        PRECOND.check(f"logvar{suffix}", net.logvar(t)[:, None])
        PRECOND.check("net_input.t", PATH.nsr(t))
        PRECOND.check("net_input.x", PATH.convert(x, t, VE())[0])
        jump = SCM().flow_map(net, x, t, torch.zeros_like(t), PRECOND["condition"].to(dtype))
        PRECOND.check(f"x0{suffix}", jump)


# The loss

FASTGEN = SCM(
    times=AsDrawn(),
    limit="rms",
    weight=InverseSigma(power=1.0),
    average="mean/d",
    warmup=LinearRamp(steps=STEPS),
)
DIFFERENCES = PathDifference(step=1e-3, follow="sample")


@dataclasses.dataclass
class Case:
    """The recorded batch with the recorded networks, in one mode and type."""

    mode: str
    dtype: torch.dtype = torch.float32
    method: SCM = FASTGEN

    def __post_init__(self) -> None:
        if self.mode != "ct":
            teacher = Teacher(
                source=Frozen(weights="unused: tests hand the teacher over"),
                guidance=GUIDANCE if self.mode == "cd_cfg" else 1.0,
            )
            self.method = dataclasses.replace(self.method, teacher=teacher)
        self.nets = Networks(
            network(LOSS, "net.", self.dtype).train(),
            {"teacher": network(LOSS, "teacher.", self.dtype).eval()},
        )
        self.cond = LOSS["condition"].to(self.dtype)
        x0, eps = LOSS["real_data"].to(self.dtype), LOSS["eps"].to(self.dtype)
        self.batch = stored_batch(x0, eps, levels=LOSS["t"], cond=self.cond)
        self.t = PATH.t_of_nsr(LOSS["t"])
        self.x = PATH.interpolate(x0, eps, self.t)
        self.line = self.dxdt = PATH.velocity(x0, eps, self.t)
        if self.method.teacher is not None:
            denoiser = self.method.teacher.denoiser(self.nets, PATH, self.cond)
            self.dxdt = PATH.velocity_from_denoised(self.x, denoiser(self.x, self.t), self.t)

    def derivative(self) -> tuple[Tensor, Tensor]:
        def f(x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.nets.student(x, t, cond=self.cond)
            return out

        out, change = self.method.derivative(f, self.x, self.t, self.dxdt, self.line)
        return out.detach(), change

    def g(self, r: float) -> Tensor:
        out, change = self.derivative()
        return self.method.limited(self.method.tangent(out, change, self.x, self.t, self.dxdt, r))

    def loss(self, r: float = 1.0) -> Loss:
        moment = dataclasses.replace(now(), step=int(r * STEPS), total_steps=STEPS)
        return self.method.loss(self.nets, self.batch, moment)

    def unweighted(self, r: float) -> Tensor:
        """The mean square of what F is pulled along."""
        plain = dataclasses.replace(self.method, weight=Uniform(), average="mean")
        nets = Networks(WithoutHead(self.nets.student), self.nets.companions)
        moment = dataclasses.replace(now(), step=int(r * STEPS), total_steps=STEPS)
        return plain.loss(nets, self.batch, moment).per_sample


class WithoutHead(TrigFlowNetwork):
    """The same network, its log-variance head hidden."""

    def __init__(self, net: Any) -> None:
        super().__init__(net.model, net.sigma_data, net.time)


def test_the_state():
    case = Case("ct")
    LOSS.check("x_t_hat", case.x)
    with torch.no_grad():
        LOSS.check("logvar", case.nets.student.logvar(case.t)[:, None])


@each_mode
def test_the_velocity(mode):
    LOSS.check(f"{mode}.dxt_dt", Case(mode).dxdt)


@each_mode
@types
@pytest.mark.parametrize("engine", [Pairs(), DualNumbers(), FunctionalJVP()], ids=repr)
def test_exact_derivatives(mode, suffix, dtype, engine):
    method = dataclasses.replace(FASTGEN, engine=engine)
    out, change = Case(mode, dtype, method).derivative()
    assert out.dtype == change.dtype == dtype
    LOSS.check(f"F_theta{suffix}", out)
    LOSS.check(f"{mode}.exact.F_jvp{suffix}", change)


@each_mode
@types
def test_finite_differences(mode, suffix, dtype):
    method = dataclasses.replace(FASTGEN, engine=DIFFERENCES)
    case = Case(mode, dtype, method)
    out, change = case.derivative()
    LOSS.check(f"F_theta{suffix}", out)
    if mode == "ct" or not suffix:
        LOSS.check(f"{mode}.fd.F_jvp{suffix}", change)
    else:  # they always move along the line of (x0, z)
        LOSS.check("ct.fd.F_jvp.f64", change)
    LOSS.check(f"{mode}.fd.r1.g{suffix}", case.g(1.0))


@each_mode
@pytest.mark.parametrize("r", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["exact", "fd"])
def test_tangents_and_losses(mode, r, kind):
    method = dataclasses.replace(FASTGEN, engine=DIFFERENCES) if kind == "fd" else FASTGEN
    case = Case(mode, method=method)
    key = f"{mode}.{kind}.r{r:g}"
    if f"{key}.g" in LOSS:
        LOSS.check(f"{key}.g", case.g(r))
    loss = case.loss(r)
    LOSS.check(f"{key}.loss", loss.per_sample)
    LOSS.check(f"{key}.unweighted", case.unweighted(r))
    torch.testing.assert_close(loss.times, case.t, rtol=0, atol=0)


OPTIONS: dict[str, dict[str, Any]] = {
    "prior_weighting_enabled=False": {"weight": Uniform()},
    "g_norm_spatial_invariance=False": {"limit": "norm"},
    "divide_x_0_spatial_dim=False": {"average": "mean"},
    "tangent_warmup_const=0.5": {"c": 0.5},  # no warm-up, whatever its name
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option):
    case = Case("ct", method=dataclasses.replace(FASTGEN, **OPTIONS[option]))
    LOSS.check(f"ct.exact.r1.{option}.loss", case.loss().per_sample)


@pytest.mark.parametrize("mode", ["ct", "cd_cfg"])
def test_gradients(mode):
    case = Case(mode)
    case.loss().per_sample.mean().backward()
    parameters = dict(case.nets.student.named_parameters())
    prefix = f"{mode}.exact.r1.grad."
    keys = LOSS.keys(prefix)
    assert len(keys) == 4
    for key in keys:
        gradient = parameters[our_name(key.removeprefix(prefix))].grad
        assert gradient is not None
        LOSS.check(key, gradient)


def test_every_recorded_tensor_is_tested():
    modes, kinds = ("ct", "cd", "cd_cfg"), ("exact", "fd")
    cases = [f"{m}.{k}.r{r}" for m in modes for k in kinds for r in ("0", "0.5", "1")]
    tested = {"real_data", "eps", "t", "condition", "x_t_hat", "F_theta", "F_theta.f64", "logvar"}
    tested |= {f"{c}.{name}" for c in cases for name in ("loss", "unweighted", "g", "g.f64")}
    tested |= {f"{m}.dxt_dt" for m in modes}
    tested |= {f"{m}.{k}.F_jvp{s}" for m in modes for k in kinds for s in ("", ".f64")}
    tested |= {f"ct.exact.r1.{option}.loss" for option in OPTIONS}
    found = {k for k in LOSS.keys() if not k.startswith(("net.", "teacher."))}  # noqa: SIM118
    assert {k for k in found - tested if ".grad." not in k} == set()
