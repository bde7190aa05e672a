"""Paths, conversions, step times and quantisation against FastGen's noise schedules.

FastGen keeps divisors at least 1e-6 away from 0, so that the few rows at an end of a path, where
ours are exact or infinite, differ; they are left out by name.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from consistency_fakes import f64, fixed_pairs, now, stored_batch
from fastflow.consistency import QuantisedPairing
from fastflow.path import VE, VP, Linear, Path, TrigFlow
from fastflow.times import karras_grid
from reference_data import reference

REF = reference("fastgen_schedules")
TABLE = tuple(REF["alphas.alphas_cumprod"].tolist())
PATHS: dict[str, Path] = {
    "edm": VE(),
    "rf": Linear(),
    "trig": TrigFlow(sigma_data=1.0),
    "alphas": VP(alphas_cumprod=TABLE),
}


def own_time(name: str) -> Tensor:
    """FastGen's t in the time of our path: steps of the table for alphas, which it cuts."""
    t = REF[f"{name}.t"]
    return (1000 * t).floor() if name == "alphas" else t


def inside(name: str) -> Tensor:
    """Rows where b > 0: the first one of rf and trig is clean data."""
    return own_time(name) > 0 if name in ("rf", "trig") else own_time(name) > -1


def check(key: str, actual: Tensor, rows: Tensor | None = None) -> None:
    """`Reference.check` on some of the rows."""
    tolerance = REF.info["tensors"][key].get("tolerance", REF.info["default_tolerance"])
    expected = REF[key]
    if rows is not None:
        actual, expected = actual[rows], expected[rows]
    torch.testing.assert_close(actual, expected, rtol=tolerance["rtol"], atol=tolerance["atol"])


@pytest.mark.parametrize("name", PATHS)
def test_coefficients(name):
    path, t = PATHS[name], own_time(name)
    check(f"{name}.alpha", path.a(t))
    check(f"{name}.sigma", path.b(t))
    if name != "alphas":  # a table without derivatives
        check(f"{name}.alpha_prime", path.da(t))
        check(f"{name}.sigma_prime", path.db(t))
    check(f"{name}.sqrt_snr", 1 / path.nsr(t), inside(name))


@pytest.mark.parametrize("name", PATHS)
def test_noising(name):
    path, t = PATHS[name], own_time(name)
    check(f"{name}.x_t", path.interpolate(REF[f"{name}.x0"], REF[f"{name}.eps"], t))
    if name != "alphas":
        velocity = path.velocity(REF[f"{name}.x0"], REF[f"{name}.eps"], t)
        check(f"{name}.cond_velocity", velocity)


@pytest.mark.parametrize("name", ["edm", "rf", "trig"])
def test_conversions(name):
    """From a random output that fits nothing, so that every term counts."""
    path, t, rows = PATHS[name], REF[f"{name}.t"], inside(name)
    x, out = REF[f"{name}.x_t"], REF[f"{name}.model_out"]
    check(f"{name}.conv.x0_to_eps", path.noise_from_denoised(x, out, t), rows)
    check(f"{name}.conv.x0_to_flow", path.velocity_from_denoised(x, out, t), rows)
    check(f"{name}.conv.eps_to_x0", path.denoised_from_noise(x, out, t))
    denoised = path.denoised_from_noise(x, out, t)
    check(f"{name}.conv.eps_to_flow", path.velocity(denoised, out, t), rows)
    check(f"{name}.conv.flow_to_x0", path.denoised_from_velocity(x, out, t))
    check(f"{name}.conv.flow_to_eps", path.noise_from_velocity(x, out, t), rows)


@pytest.mark.parametrize("name", ["alphas", "cogvideox"])
def test_conversions_of_v(name):
    """DDPM's v is the velocity of TrigFlow with unit data at tan t = b/a, on the same state."""
    a, b = REF[f"{name}.alpha"], REF[f"{name}.sigma"]
    path, t = TrigFlow(sigma_data=1.0), torch.atan2(b, a)
    x, out = REF[f"{name}.x_t"], REF[f"{name}.model_out"]
    check(f"{name}.x_t", path.interpolate(REF[f"{name}.x0"], REF[f"{name}.eps"], t))
    check(f"{name}.conv.x0_to_eps", path.noise_from_denoised(x, out, t))
    check(f"{name}.conv.x0_to_v", path.velocity_from_denoised(x, out, t))
    check(f"{name}.conv.eps_to_x0", path.denoised_from_noise(x, out, t))
    denoised = path.denoised_from_noise(x, out, t)
    check(f"{name}.conv.eps_to_v", path.velocity(denoised, out, t))
    check(f"{name}.conv.v_to_x0", path.denoised_from_velocity(x, out, t))
    check(f"{name}.conv.v_to_eps", path.noise_from_velocity(x, out, t))


@pytest.mark.parametrize("name", ["edm", "rf", "trig"])
def test_times_of_a_noise_level(name):
    path, rows = PATHS[name], inside(name)
    check(f"{name}.sqrt_snr_to_t", path.t_of_nsr(1 / REF[f"{name}.sqrt_snr"]), rows)


def test_fastgen_looks_up_the_square_of_the_noise_level():
    """Its table search forgets a root: sigma^2 is taken for sigma. Ours finds the step back."""
    path, t = PATHS["alphas"], own_time("alphas")
    found = path.t_of_nsr(1 / REF["alphas.sqrt_snr"])
    torch.testing.assert_close(found, t, rtol=1e-6, atol=1e-6)
    squares = path.b(t) ** 2
    table = path.b(torch.arange(1000).double())
    nearest = (table[None] - squares[:, None]).abs().argmin(1)
    check("alphas.sqrt_snr_to_t", nearest.double() / 1000)


@pytest.mark.parametrize("name", PATHS)
def test_starting_states(name):
    """Noise times b(t_max); FastGen ends the linear path at 0.999."""
    largest = {"edm": 80.0, "rf": 0.999, "trig": math.pi / 2, "alphas": 999.0}[name]
    schedule = REF.values["schedules"][name]
    noise = REF[f"{name}.noise"]
    b = PATHS[name].b(f64(largest))
    check(f"{name}.latents", b * noise)
    assert b.item() == pytest.approx(schedule["max_sigma"], rel=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_step_times(steps):
    """Even steps from t_max down to 0; in EDM even steps of the index, from 998 down to 2."""
    for name, largest in (("rf", 0.999), ("trig", math.pi / 2), ("alphas", 0.999)):
        even = largest * (1 - torch.arange(steps + 1).double() / steps)
        check(f"{name}.t_list_{steps}", even)
    grid = karras_grid(1000)
    index = (998 - 996 * torch.arange(steps).double() / steps).long()
    check(f"edm.t_list_{steps}", torch.cat([grid[index], f64(0.0)]))


def test_the_grid_of_edm():
    schedule, grid = REF.values["schedules"]["edm"], karras_grid(1000)
    assert grid[:3].tolist() == pytest.approx(schedule["sigmas_first3"], rel=1e-10)
    assert grid[-3:].tolist() == pytest.approx(schedule["sigmas_last3"], rel=1e-10)


def test_times_are_moved_to_the_nearest_point():
    """As `QuantisedPairing` moves t, and r where the two do not fall on one point."""
    t, nearest = REF["edm.t"], REF["edm.closest_idx"]
    check("edm.idx_to_t", karras_grid(1000)[nearest])
    pairs = QuantisedPairing(pairs=fixed_pairs(t, t / 2))
    batch = stored_batch(torch.zeros(len(t), 1), torch.zeros(len(t), 1))
    moved = pairs(batch.draws, now())
    check("edm.idx_to_t", moved.t)


@pytest.mark.parametrize("name", ["rf", "trig", "alphas"])
def test_nearest_points_of_the_other_schedules(name):
    """Even grids of 1000 points, looked up by noise level."""
    path, t = PATHS[name], own_time(name)
    last = {"rf": 0.999, "trig": math.pi / 2, "alphas": 999.0}[name]
    grid = last * torch.arange(1000).double() / 999
    nearest = (path.b(grid)[None] - path.b(t)[:, None]).abs().argmin(1)
    assert torch.equal(nearest, REF[f"{name}.closest_idx"])
    scale = 1000 if name == "alphas" else 1
    check(f"{name}.idx_to_t", grid[nearest] / scale)


@pytest.mark.parametrize(
    ("name", "factor"), [("edm", 1), ("rf", 1000), ("trig", 1), ("alphas", 1000)]
)
def test_what_their_networks_read(name, factor):
    """`VelocityNetwork(time_scale=1000)` for rf; the raw time elsewhere."""
    check(f"{name}.rescale_t", factor * REF[f"{name}.t"])


def test_every_output_is_tested():
    tested = {"alpha", "sigma", "alpha_prime", "sigma_prime", "rescale_t", "sqrt_snr", "latents"}
    tested |= {"sqrt_snr_to_t", "x_t", "cond_velocity", "closest_idx", "idx_to_t", "conv"}
    tested |= {f"t_list_{n}" for n in (1, 2, 4, 7)}
    tensors = REF.info["tensors"]
    outputs = {k for k in REF.keys("") if tensors[k]["role"] == "output"}
    assert {k.split(".")[1] for k in outputs} == tested
