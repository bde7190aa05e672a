"""Preconditionings: official numbers, boundary conditions, and the EDM wrapper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastflow.errors import ConfigError
from fastflow.path import VE, VP, Linear, TrigFlow, expand, vp_linear_betas
from fastflow.precond import (
    CTM,
    LCM,
    AverageVelocity,
    EDMConsistency,
    EDMScaling,
    Parameterisation,
    ShiftedEDM,
    SimpleEDM,
    TrigDDIM,
    consistency_from_denoiser,
    shifted_from_denoiser,
)
from fastflow.raw import RawNetwork
from fastflow.wrappers import EDMDenoiser
from methods.ect import ECT
from networks.song_unet import SongUNet
from reference_data import reference

PARAMETERISATIONS: dict[str, Parameterisation] = {
    "edm": EDMConsistency(),
    "shifted": ShiftedEDM(),
    "trig": TrigDDIM(),
    "average_velocity": AverageVelocity(),
    "ctm": CTM(),
    "simple_edm_linear": SimpleEDM(path=Linear()),
    "simple_edm_ve": SimpleEDM(path=VE()),
    "simple_edm_trig": SimpleEDM(path=TrigFlow()),
    "simple_edm_vp": SimpleEDM(path=VP(alphas_cumprod=vp_linear_betas(20))),
    "lcm": LCM(),
}
every_one = pytest.mark.parametrize("part", PARAMETERISATIONS.values(), ids=PARAMETERISATIONS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def near(actual: Tensor, expected: Tensor, atol: float = 1e-13) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=atol)


class Recorder(RawNetwork):
    """A raw model that remembers what it was given and answers x^2 in bfloat16."""

    sample_shape = (5,)
    cond_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Tensor | None = None,
        augment: Tensor | None = None,
        c_second: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        self.seen = (x, c_noise, cond, augment)
        return (x**2).to(torch.bfloat16)

    def shard_units(self) -> list[nn.Module]:
        return [self.layer]


def test_scalings_of_openai() -> None:
    ref = reference("openai_scalings")
    sigma, config = ref["sigma"], ref.config
    scaling = EDMScaling(sigma_data=config["sigma_data"])(sigma)
    ref.check("edm.c_skip", scaling.c_skip)
    ref.check("edm.c_out", scaling.c_out)
    ref.check("edm.c_in", scaling.c_in)
    # That code's time input is 1000 times EDM's, and guards the logarithm with 1e-44.
    ref.check("rescaled_t", 1000 * scaling.c_noise)
    boundary = EDMConsistency(sigma_data=config["sigma_data"])
    c_skip, c_out = boundary.coefficients(sigma, torch.full_like(sigma, config["sigma_min"]))
    ref.check("boundary.c_skip", c_skip)
    ref.check("boundary.c_out", c_out)
    ref.check("boundary.c_in", scaling.c_in)


def test_consistency_from_denoiser_equals_the_official_scalings() -> None:
    ref = reference("openai_scalings")
    sigma = ref["sigma"]
    x, raw = normal(len(sigma), 4), normal(len(sigma), 4, seed=1)
    denoised = expand(ref["edm.c_skip"], x) * x + expand(ref["edm.c_out"], x) * raw
    expected = expand(ref["boundary.c_skip"], x) * x + expand(ref["boundary.c_out"], x) * raw
    near(consistency_from_denoiser(x, denoised, sigma, 0.002, 0.5), expected)


@pytest.mark.parametrize("convert", [consistency_from_denoiser, shifted_from_denoiser])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conversion_at_its_boundary(convert: object, dtype: torch.dtype) -> None:
    x, denoised = normal(6, 3, 2).to(dtype), normal(6, 3, 2, seed=1).to(dtype)
    t = torch.full((6,), 0.002, dtype=torch.float64)
    assert torch.equal(convert(x, denoised, t, 0.002, 0.5), x)  # type: ignore[operator]
    assert convert(x, denoised, t, 0.0, 0.5) is denoised  # type: ignore[operator]
    out = convert(x, denoised, t + 1, 0.002, 0.5)  # type: ignore[operator]
    assert out.dtype == dtype


def test_shifted_conversion_equals_its_scalings() -> None:
    t = torch.tensor([0.003, 0.02, 0.5, 80.0], dtype=torch.float64)
    x, raw = normal(4, 3), normal(4, 3, seed=1)
    own, shifted = EDMScaling()(t), EDMScaling()(t - 0.003)
    denoised = expand(own.c_skip, x) * x + expand(own.c_out, x) * raw
    expected = expand(shifted.c_skip, x) * x + expand(shifted.c_out, x) * raw
    near(shifted_from_denoiser(x, denoised, t, 0.003, 0.5), expected)
    apart = consistency_from_denoiser(x, denoised, t, 0.003, 0.5) - expected
    assert apart.abs().max() > 1e-3


@pytest.mark.parametrize("suffix", ["", ".f64"])
def test_ect_preconditioning_with_the_network(suffix: str) -> None:
    """Training: EDM. Evaluation: shifted by 0.003, from the output of the same denoiser."""
    ref = reference("ect_precond")
    config = ref.config
    raw = SongUNet(
        resolution=config["img_resolution"],
        cond_dim=config["label_dim"],
        channels=config["model_channels"],
        channel_mult=tuple(config["channel_mult"]),
        num_blocks=config["num_blocks"],
        attn_resolutions=tuple(config["attn_resolutions"]),
        dropout=0.0,
    )
    net = EDMDenoiser(raw, sigma_data=config["sigma_data"])
    net.load_state_dict(ref.weights("net."))
    dtype = torch.float64 if suffix else torch.float32
    net.to(dtype)
    x, t = ref["x"].to(dtype), ref["sigma"].double()
    # The case stores no labels of its own: they are the first rows of its sister's.
    cond = reference("ect_loss")["class_labels"][: len(x)].to(dtype)
    with torch.no_grad():
        denoised = net(x, t, cond=cond)
    assert denoised.dtype == dtype
    ref.check(f"D_train{suffix}", denoised)
    shifted = consistency_from_denoiser(
        x, denoised, t, s_min=config["sigma_min"], sigma_data=config["sigma_data"]
    )
    ref.check(f"D_eval{suffix}", shifted)
    method = ECT(shift=config["sigma_min"], sigma_data=config["sigma_data"])
    with torch.no_grad():
        ref.check(f"D_eval{suffix}", method.flow_map(net, x, t, torch.zeros_like(t), cond))


def test_raw_output_round_trip() -> None:
    t = torch.logspace(-3, 3, 31, dtype=torch.float64)
    x, denoised = normal(31, 4), normal(31, 4, seed=1)
    scaling = EDMScaling()(t)
    skip, out = expand(scaling.c_skip, x), expand(scaling.c_out, x)
    raw = (denoised - skip * x) / out
    near(skip * x + out * raw, denoised, atol=1e-12)
    # Targets and inputs of the raw model have unit variance (arXiv 2206.00364, appendix B.6).
    near((0.25 * (1 - scaling.c_skip) ** 2 + (scaling.c_skip * t) ** 2) / scaling.c_out**2, t**0)
    near(scaling.c_in**2 * (t**2 + 0.25), t**0)


def test_edm_output_is_minus_trigflow_output() -> None:
    """v_trig = sigma_data F_trig with F_trig = -F_edm, at states matched by noise level."""
    sigma = torch.tensor([0.01, 0.5, 80.0], dtype=torch.float64)
    x, raw = normal(3, 4), normal(3, 4, seed=1)
    scaling = EDMScaling()(sigma)
    denoised = expand(scaling.c_skip, x) * x + expand(scaling.c_out, x) * raw
    y, t = VE().convert(x, sigma, TrigFlow())
    near(TrigDDIM().jump(y, -raw, t, torch.zeros_like(t)), denoised, atol=1e-12)
    near(TrigFlow().velocity_from_denoised(y, denoised, t), -0.5 * raw, atol=1e-12)


@every_one
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jump_to_where_one_is_changes_nothing(part: Parameterisation, dtype: torch.dtype) -> None:
    x, f = normal(6, 2, 3).to(dtype), normal(6, 2, 3, seed=1).to(dtype)
    t = torch.tensor([0.002, 0.1, 0.5, 0.77, 0.999, 1.0], dtype=torch.float64)
    out = part.jump(x, f, t, t)
    assert out.dtype == dtype
    assert torch.equal(out, x)


@every_one
def test_coefficients_are_finite_at_both_ends(part: Parameterisation) -> None:
    t = torch.tensor([0.002, 1.0, 1.5], dtype=torch.float64)
    for coefficient in part.coefficients(t, torch.zeros_like(t)):
        assert torch.isfinite(coefficient).all()


@pytest.mark.parametrize("path", [Linear(), VE(), TrigFlow()], ids=["linear", "ve", "trig"])
def test_simple_edm_is_ddim_through_an_edm_denoiser(path: Linear | VE | TrigFlow) -> None:
    t = torch.tensor([0.2, 0.6, 0.95], dtype=torch.float64)
    s = torch.tensor([0.0, 0.3, 0.94], dtype=torch.float64)
    x, raw = normal(3, 4), normal(3, 4, seed=1)
    y, sigma = path.convert(x, t, VE())
    scaling = EDMScaling()(sigma)
    denoised = expand(scaling.c_skip, y) * y - expand(scaling.c_out, y) * raw
    near(SimpleEDM(path=path).jump(x, raw, t, s), path.ddim(x, denoised, t, s))


def slope_at_start(part: Parameterisation, x: Tensor, f: Tensor, t: Tensor) -> Tensor:
    """d/ds of the jump at s = t."""
    return torch.func.jvp(lambda s: part.jump(x, f, t, s), (t,), (torch.ones_like(t),))[1]


def test_tangent_conditions() -> None:
    """At s = t the jump leaves with the velocity that its output stands for."""
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x, f = normal(3, 4), normal(3, 4, seed=1)
    near(slope_at_start(AverageVelocity(), x, f, t), f)
    near(slope_at_start(TrigDDIM(), x, f, t), 0.5 * f)
    near(slope_at_start(CTM(), x, f, t), VE().velocity_from_denoised(x, f, t))
    path = Linear()
    denoised = SimpleEDM(path=path).jump(x, f, t, torch.zeros_like(t))
    near(
        slope_at_start(SimpleEDM(path=path), x, f, t),
        path.velocity_from_denoised(x, denoised, t),
        atol=1e-12,
    )


def test_lcm_values() -> None:
    t = torch.tensor([0, 19, 999])
    c_skip, c_out = LCM().coefficients(t, torch.zeros_like(t))
    assert c_skip.tolist() == pytest.approx([1.0, 6.9e-6, 2.5e-9], rel=0.01)
    assert c_out[0] == 0
    assert c_out[1:].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_average_velocity_is_what_it_says() -> None:
    t, s = torch.tensor([0.9, 0.4]).double(), torch.tensor([0.1, 0.0]).double()
    x, f = normal(2, 3), normal(2, 3, seed=1)
    near(expand(t - s, x) * f + AverageVelocity().jump(x, f, t, s), x)


def test_the_wrapper_computes_scalings_in_the_type_of_t() -> None:
    raw = Recorder()
    net = EDMDenoiser(raw)
    x, cond = normal(4, 5), torch.ones(4, 3)
    t = torch.tensor([0.0, 0.002, 1.0, 80.0], dtype=torch.float64)
    out = net(x, t, cond=cond, augment=cond)
    scaling = EDMScaling()(t)
    seen, c_noise, seen_cond, seen_augment = raw.seen
    assert seen_cond is cond
    assert seen_augment is cond
    assert seen.dtype == out.dtype == c_noise.dtype == torch.float64
    near(seen, expand(scaling.c_in, x) * x)
    near(c_noise[1:], t[1:].log() / 4)
    assert torch.isfinite(c_noise[0])
    raw_out = (seen**2).to(torch.bfloat16).double()
    near(out, expand(scaling.c_skip, x) * x + expand(scaling.c_out, x) * raw_out)
    assert torch.equal(out[0], x[0])  # t = 0
    assert net.sample_shape == (5,)
    assert net.cond_dim == 3
    assert net.sigma_data == 0.5
    assert net.shard_units() == [raw.layer]
    assert all(name.startswith("model.") for name in net.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_levels_are_never_narrower_than_float32(dtype: torch.dtype) -> None:
    raw = Recorder()
    net = EDMDenoiser(raw)
    t = torch.tensor([79.9, 80.0], dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(normal(2, 5).to(dtype), t)
    assert out.dtype == dtype
    c_noise = raw.seen[1]
    assert c_noise.dtype == torch.float32
    assert torch.equal(c_noise, (t.log() / 4).float())


def test_one_time_is_broadcast_to_all_rows() -> None:
    raw = Recorder()
    x, t = normal(4, 5), torch.tensor(2.0, dtype=torch.float64)
    out = EDMDenoiser(raw)(x, t)
    assert raw.seen[1].shape == (4,)
    assert torch.equal(out, EDMDenoiser(raw)(x, t.expand(4)))


def test_an_end_time_is_refused() -> None:
    x, t = normal(2, 5), torch.ones(2)
    with pytest.raises(ConfigError, match="two_times=True"):
        EDMDenoiser(Recorder())(x, t, t)


@pytest.mark.parametrize("kind", [EDMScaling, EDMConsistency, ShiftedEDM, TrigDDIM, LCM])
def test_impossible_sigma_data_is_refused(kind: type) -> None:
    with pytest.raises(ConfigError, match=f"{kind.__name__}.sigma_data: 0.0 given"):
        kind(sigma_data=0.0)
