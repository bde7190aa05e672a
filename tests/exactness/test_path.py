"""The interpolants: derivatives, conversions and changes of path, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastflow.errors import ConfigError
from fastflow.path import VE, VP, Linear, Path, TrigFlow, expand, scaled, vp_linear_betas

PATHS: dict[str, Path] = {
    "ve": VE(),
    "linear": Linear(),
    "trig": TrigFlow(),
    "trig_unit": TrigFlow(sigma_data=1.0),
    "vp": VP(alphas_cumprod=vp_linear_betas()),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
SHAPE = (7, 3, 2, 2)


def ratios(low: float = 1e-3, high: float = 1e3, n: int = 7) -> torch.Tensor:
    return torch.logspace(math.log10(low), math.log10(high), n, dtype=torch.float64)


def interior_times(path: Path, n: int = 7) -> torch.Tensor:
    """Times strictly inside the path's range and, for VP, off the grid points."""
    low, high = (1e-3, 1e3) if not isinstance(path, VP) else (0.0101, 150.0)
    return path.t_of_nsr(ratios(low, high, n))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-12) -> None:
    atol = rtol * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def test_expand() -> None:
    t = torch.arange(4.0)
    assert expand(t, torch.zeros(4, 3, 8, 8)).shape == (4, 1, 1, 1)
    assert expand(t, torch.zeros(4, 2)).shape == (4, 1)
    assert expand(torch.tensor(1.0), torch.zeros(4, 2)).shape == (1, 1)


@every_path
def test_nsr_is_inverted(path: Path) -> None:
    k = ratios(0.0101, 150.0, 101)
    close(path.nsr(path.t_of_nsr(k)), k)
    # Inverse in t: limited by the spacing of float64 near an end where nsr grows without bound.
    t = interior_times(path)
    torch.testing.assert_close(path.t_of_nsr(path.nsr(t)), t, rtol=1e-12, atol=1e-15)
    close(path.b(t) / path.a(t), path.nsr(t))


@every_path
def test_derivatives_and_wronskian_against_autograd(path: Path) -> None:
    t = interior_times(path).requires_grad_()

    def derivative(value: torch.Tensor) -> torch.Tensor:
        if not value.requires_grad:
            return torch.zeros_like(t)
        return torch.autograd.grad(value.sum(), t, allow_unused=True, materialize_grads=True)[0]

    da, db = derivative(path.a(t)), derivative(path.b(t))
    close(path.da(t), da)
    close(path.db(t), db)
    w = path.wronskian(t)
    assert (w > 0).all()
    torch.testing.assert_close(w, path.a(t) * db - da * path.b(t), rtol=1e-12, atol=0)
    torch.testing.assert_close(w, path.a(t) ** 2 * derivative(path.nsr(t)), rtol=1e-12, atol=0)


@every_path
@pytest.mark.parametrize("other", PATHS.values(), ids=PATHS)
def test_interpolate_then_convert(path: Path, other: Path) -> None:
    x0, eps = normal(*SHAPE), normal(*SHAPE, seed=1)
    t = path.t_of_nsr(ratios(0.0101, 150.0))
    x, u = path.convert(path.interpolate(x0, eps, t), t, other)
    torch.testing.assert_close(other.nsr(u), path.nsr(t), rtol=1e-12, atol=0)
    torch.testing.assert_close(x, other.interpolate(x0, eps, u), rtol=2e-12, atol=1e-13)


@every_path
def test_round_trips_of_predictions(path: Path) -> None:
    x0, eps, t = normal(*SHAPE), normal(*SHAPE, seed=1), interior_times(path)
    x, v = path.interpolate(x0, eps, t), path.velocity(x0, eps, t)
    # Absolute errors are those of x's rounding, divided by a (or b) where that is small.
    a = expand(path.a(t), x)
    b = expand(path.b(t), x)

    def near(actual: torch.Tensor, expected: torch.Tensor, weight: torch.Tensor) -> None:
        assert ((actual - expected) * weight).abs().max() < 1e-12 * x.abs().max()

    near(path.denoised_from_velocity(x, v, t), x0, a)
    near(path.noise_from_velocity(x, v, t), eps, b)
    near(path.denoised_from_noise(x, eps, t), x0, a)
    near(path.noise_from_denoised(x, x0, t), eps, b)
    scale = 1 / (path.da(t).abs() + path.db(t).abs())
    near(path.velocity_from_denoised(x, x0, t), v, expand(scale, x) * b)
    near(path.score_from_denoised(x, x0, t), -eps / b, b * b)


@pytest.mark.parametrize("path", [VE(), Linear(), TrigFlow()], ids=["ve", "linear", "trig"])
def test_velocity_conversions_at_both_ends(path: Path) -> None:
    x0, eps = normal(2, 5), normal(2, 5, seed=1)
    t = torch.tensor([0.0, path.t_max], dtype=torch.float64)
    x, v = path.interpolate(x0, eps, t), path.velocity(x0, eps, t)
    rtol = 1e-12 * 80  # VE: D is a difference of states of size 80
    close(path.denoised_from_velocity(x, v, t), x0, rtol)
    close(path.noise_from_velocity(x, v, t), eps, rtol)


def test_velocity_in_the_three_special_forms() -> None:
    x0, eps, t = normal(3, 4), normal(3, 4, seed=1), torch.tensor([0.1, 0.5, 0.9]).double()
    c, s = expand(t.cos(), x0), expand(t.sin(), x0)
    assert torch.equal(VE().velocity(x0, eps, t), eps)
    assert torch.equal(Linear().velocity(x0, eps, t), eps - x0)
    close(TrigFlow().velocity(x0, eps, t), c * 0.5 * eps - s * x0)
    x = VE().interpolate(x0, eps, t)
    close(VE().velocity_from_denoised(x, x0, t), (x - x0) / expand(t, x))
    x = TrigFlow().interpolate(x0, eps, t)
    v = TrigFlow().velocity(x0, eps, t)
    close(TrigFlow().denoised_from_velocity(x, v, t), c * x - s * v)
    close(TrigFlow().noise_from_velocity(x, v, t) * 0.5, s * x + c * v)


@every_path
def test_ddim_is_exact_for_a_constant_denoiser(path: Path) -> None:
    x0, eps, t = normal(*SHAPE), normal(*SHAPE, seed=1), interior_times(path)
    s = t.roll(1)
    s[0] = t[0] / 2
    x = path.interpolate(x0, eps, t)
    near = path.interpolate(x0, eps, s)
    weight = expand(path.b(t) / (path.b(t) + path.b(s)), x)
    assert ((path.ddim(x, x0, t, s) - near) * weight).abs().max() < 1e-12 * x.abs().max()


def test_ddim_is_a_euler_step_except_in_trigflow() -> None:
    x, d = normal(3, 4), normal(3, 4, seed=1)
    t, s = torch.tensor([0.9, 0.5, 0.3]).double(), torch.tensor([0.8, 0.1, 0.0]).double()
    for path in (VE(), Linear()):
        euler = x + expand(s - t, x) * path.velocity_from_denoised(x, d, t)
        close(path.ddim(x, d, t, s), euler)
    trig = TrigFlow()
    v = trig.velocity_from_denoised(x, d, t)
    gap = expand(t - s, x)
    close(trig.ddim(x, d, t, s), torch.cos(gap) * x - torch.sin(gap) * v)


@every_path
def test_two_steps_are_one_with_a_target_of_its_own(path: Path) -> None:
    """Progressive distillation: x0 = (x_s - b_s/b_t x_t) / (a_s - a_t b_s/b_t) leads to x_s."""
    x, first, second = normal(*SHAPE), normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    t = interior_times(path)
    m, s = path.t_of_nsr(path.nsr(t) * 0.7), path.t_of_nsr(path.nsr(t) * 0.4)
    x_s = path.ddim(path.ddim(x, first, t, m), second, m, s)
    kept = path.b(s) / path.b(t)
    target = scaled(1 / (path.a(s) - path.a(t) * kept), x_s - scaled(kept, x))
    close(path.ddim(x, target, t, s), x_s)
    if isinstance(path, VE):
        slope = (x_s - x) / expand(s - t, x)
        close(target, path.denoised_from_velocity(x, slope, t))


def test_reference_times() -> None:
    """The same noise level on three paths (sigma_data 0.5)."""
    sigma = torch.tensor([80.0, 0.002, 0.821], dtype=torch.float64)
    trig = torch.tensor([1.5645464, 0.00399998, 1.0237757], dtype=torch.float64)
    linear = torch.tensor([0.9876543, 0.00199601, 0.4508512], dtype=torch.float64)
    torch.testing.assert_close(TrigFlow().t_of_nsr(sigma), trig, rtol=0, atol=6e-8)
    torch.testing.assert_close(Linear().t_of_nsr(sigma), linear, rtol=0, atol=6e-8)
    at = torch.tensor(1.1, dtype=torch.float64)
    assert TrigFlow().nsr(at).item() == pytest.approx(0.9823798, abs=5e-8)
    one = torch.ones((), dtype=torch.float64)
    assert TrigFlow().t_of_nsr(one).item() == pytest.approx(1.1071487, abs=5e-8)
    assert TrigFlow().t_max == pytest.approx(1.5645464, abs=5e-8)


def test_edm_input_scaling_is_trigflow() -> None:
    x, sigma = normal(3, 4), torch.tensor([0.01, 1.0, 80.0], dtype=torch.float64)
    y, t = VE().convert(x, sigma, TrigFlow())
    close(y / 0.5, x / expand((sigma**2 + 0.25).sqrt(), x))
    close(t, torch.atan(sigma / 0.5))


def test_linear_reaches_pure_noise() -> None:
    path = Linear()
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.equal(path.t_of_nsr(path.nsr(t)), t)
    x = normal(2, 3)
    y, u = path.convert(x, t, TrigFlow())
    assert torch.equal(u, torch.tensor([0.0, math.pi / 2], dtype=torch.float64))
    close(y, x * torch.tensor([[1.0], [0.5]], dtype=torch.float64))


def test_vp_meets_its_table_and_takes_integers() -> None:
    table = vp_linear_betas(50, 1e-3, 0.1)
    path, t = VP(alphas_cumprod=table), torch.arange(50)
    abar = torch.tensor(table, dtype=torch.float64)
    close(path.a(t), abar.sqrt())
    close(path.b(t), (1 - abar).sqrt())
    assert path.a(t).dtype == torch.float64
    assert path.nsr(t).diff().min() > 0
    assert (path.t_min, path.t_max) == (0.0, 49.0)
    assert vp_linear_betas()[0] == pytest.approx(1 - 1e-4, rel=1e-14)
    assert vp_linear_betas()[999] == pytest.approx(4.0358e-5, rel=1e-4)


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_keep_their_type_and_times_theirs(path: Path, dtype: torch.dtype) -> None:
    t = interior_times(path)
    s = t / 2
    x, y = normal(7, 2).to(dtype), normal(7, 2, seed=1).to(dtype)
    for out in (
        path.interpolate(x, y, t),
        path.velocity(x, y, t),
        path.denoised_from_velocity(x, y, t),
        path.noise_from_velocity(x, y, t),
        path.denoised_from_noise(x, y, t),
        path.noise_from_denoised(x, y, t),
        path.velocity_from_denoised(x, y, t),
        path.score_from_denoised(x, y, t),
        path.ddim(x, y, t, s),
    ):
        assert out.dtype == dtype
        assert torch.isfinite(out).all()
    z, u = path.convert(x, t.to(torch.float32), VE())
    assert (z.dtype, u.dtype) == (dtype, torch.float32)


def test_float32_states_round_float64_coefficients_once() -> None:
    """cos(1.5645) in float32 is off by 7e-6; from a float64 time the error is one rounding."""
    t = torch.tensor([TrigFlow().t_max], dtype=torch.float64)
    one = torch.ones(1, 1)
    x = TrigFlow().interpolate(one, torch.zeros(1, 1), t)
    assert x.item() == pytest.approx(math.cos(t.item()), rel=6e-8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VE(sigma_min=80.0),
        lambda: VE(sigma_min=-1.0),
        lambda: TrigFlow(sigma_data=0.0),
        lambda: VP(alphas_cumprod=(0.5,)),
        lambda: VP(alphas_cumprod=(1.0, 0.5)),
        lambda: VP(alphas_cumprod=(0.9, 0.0)),
        lambda: VP(alphas_cumprod=(0.5, 0.6)),
        lambda: vp_linear_betas(1),
        lambda: vp_linear_betas(10, 0.0),
    ],
)
def test_impossible_values_are_refused(make: object) -> None:
    with pytest.raises(ConfigError, match="accepted"):
        make()  # type: ignore[operator]
