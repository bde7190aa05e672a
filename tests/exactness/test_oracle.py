"""The closed forms against each other, quadrature, the ODE and the identities of a flow map."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from fastflow.closed_forms import (
    cm_fixed_point_gaussian,
    ct_minimum_loss_gaussian,
    ect_fixed_point_gaussian,
    energy_distance,
    exact_gain_gaussian,
    gaussian_w2_squared,
)
from fastflow.errors import ConfigError
from fastflow.oracle import Gaussian, Mixture, Mixture1D, integrate
from fastflow.path import VE, VP, Linear, Path, TrigFlow, vp_linear_betas
from fastflow.sampling import guided, ode_euler, ode_heun, on_path
from fastflow.times import karras_grid

PATHS = [VE(), Linear(), TrigFlow(), VP(alphas_cumprod=vp_linear_betas())]
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def times(path: Path, *ratios: float) -> Tensor:
    return path.t_of_nsr(f64(*ratios))


def gaussian_5d(path: Path = PATHS[0]) -> Gaussian:
    root = normal(5, 5, seed=1) / 2
    return Gaussian(mean=normal(5, seed=2), cov=root @ root.T, path=path)


def mixture_2d(path: Path = PATHS[0], steps: int = 1024) -> Mixture:
    roots = normal(3, 2, 2, seed=3) / 5
    covs = roots @ roots.mT + 0.02 * torch.eye(2)
    return Mixture(f64(0.2, 0.5, 0.3), normal(3, 2, seed=4), covs, path, steps)


WEIGHTS, MEANS, STDS = f64(0.3, 0.5, 0.2), f64(-1.0, 0.2, 0.9), f64(0.05, 0.3, 0.1)
LINE = Mixture1D(WEIGHTS, MEANS, STDS)
LINE_BY_ODE = Mixture.isotropic(WEIGHTS, MEANS[:, None], STDS)


# Gaussians


class TestGaussian:
    @each_path
    def test_identities_of_a_flow_map(self, path):
        """Lagrangian, Eulerian, semigroup, diagonal and MeanFlow's, to rounding."""
        data = gaussian_5d(path)
        t, u, s = times(path, 3.0), times(path, 0.7), times(path, 0.05)
        x = path.interpolate(data.sample((6, 5), torch.Generator()), normal(6, 5), t)
        one = torch.ones_like(t)
        end, lagrangian = jvp(lambda s: data.flow_map(x, t, s), (s,), (one,))
        close(lagrangian, data.velocity(end, s))
        v = data.velocity(x, t)
        _, eulerian = jvp(lambda x, t: data.flow_map(x, t, s), (x, t), (v, one))
        scale = data.velocity(end, s).abs().max() + 1
        assert eulerian.abs().max() < 1e-12 * scale
        close(data.flow_map(data.flow_map(x, t, u), u, s), end)
        _, diagonal = jvp(lambda s: data.flow_map(x, t, s), (t,), (one,))
        close(diagonal, v)
        average, slope = jvp(lambda x, t: (x - data.flow_map(x, t, s)) / (t - s), (x, t), (v, one))
        close(average, v - (t - s) * slope)
        close(data.flow_map(end, s, t), x)

    @each_path
    def test_predictions_are_conversions_of_each_other(self, path):
        data, t = gaussian_5d(path), times(path, 0.8)
        x = normal(4, 5)
        d, e, v = data.denoiser(x, t), data.noise(x, t), data.velocity(x, t)
        close(path.interpolate(d, e, t), x)
        close(path.denoised_from_velocity(x, v, t), d)
        close(path.score_from_denoised(x, d, t), data.score(x, t))

    @each_path
    def test_the_map_is_the_same_on_every_path(self, path):
        data, t, s = gaussian_5d(), f64(5.0), f64(0.1)
        x = 5 * normal(4, 5)
        there, t_there = VE().convert(x, t, path)
        end = data.on(path).flow_map(there, t_there, path.t_of_nsr(s))
        close(VE().convert(data.flow_map(x, t, s), s, path)[0], end, 1e-11)

    def test_the_map_solves_the_ode(self):
        data, t, s = gaussian_5d(), f64(80.0), f64(0.002)
        x = 80 * normal(3, 5)
        solved = integrate(data.denoiser, x, t, s, steps=4096)
        close(solved, data.flow_map(x, t, s), 1e-9)

    def test_formulas_by_name(self):
        x, mu, std = normal(3, 4), 0.3, 0.7
        edm = Gaussian.isotropic(std, mu)
        t, eps = f64(2.0), f64(0.002)
        close(edm.denoiser(x, t), mu + std**2 / (std**2 + 4) * (x - mu))
        close(edm.velocity(x, t), 2 * (x - mu) / (std**2 + 4))
        gain = math.sqrt((std**2 + 0.002**2) / (std**2 + 4))
        close(edm.flow_map(x, t, eps), mu + gain * (x - mu))
        u, w = 0.6, 0.2
        fm = edm.on(Linear())
        c = (1 - u) ** 2 * std**2 + u**2
        close(fm.velocity(x, f64(u)), -mu + (u - (1 - u) * std**2) / c * (x - (1 - u) * mu))
        c_end = (1 - w) ** 2 * std**2 + w**2
        expected = (1 - w) * mu + math.sqrt(c_end / c) * (x - (1 - u) * mu)
        close(fm.flow_map(x, f64(u), f64(w)), expected)

    def test_trigflow_stands_still_at_its_own_variance(self):
        data = Gaussian.isotropic(0.5).on(TrigFlow(sigma_data=0.5))
        x, t = normal(3, 2, 2, 2), f64(1.1)
        assert data.velocity(x, t).abs().max() < 1e-15
        close(data.flow_map(x, t, f64(0.0)), x)

    @each_path
    def test_one_point_is_reached_in_a_straight_line(self, path):
        data = Gaussian.isotropic(0.0, mean=normal(2, 3)).on(path)
        t, s = times(path, 4.0), times(path, 0.3)
        x = normal(5, 2, 3)
        close(data.denoiser(x, t), data.mean.expand(5, 2, 3))
        close(data.flow_map(x, t, s), path.ddim(x, data.mean, t, s))

    def test_flow_matching_starts_from_pure_noise(self):
        data, z = gaussian_5d(Linear()), normal(4, 5)
        end = data.flow_map(z, f64(1.0), f64(0.0))
        values, basis = torch.linalg.eigh(data.cov)
        close(end, data.mean + z @ basis @ torch.diag(values.sqrt()) @ basis.T)
        close(data.velocity(z, f64(1.0)), z - data.mean)

    def test_times_are_per_row(self):
        data, x = gaussian_5d(), normal(2, 5)
        t, s = f64(3.0, 0.5), f64(0.1, 0.0)
        rows = [data.flow_map(x[i : i + 1], t[i : i + 1], s[i : i + 1]) for i in range(2)]
        close(data.flow_map(x, t, s), torch.cat(rows))

    def test_samples_have_its_moments(self):
        data = gaussian_5d()
        x = data.sample((200_000, 5), torch.Generator().manual_seed(0))
        torch.testing.assert_close(x.mean(0), data.mean, rtol=0, atol=0.02)
        torch.testing.assert_close(x.T.cov(), data.cov, rtol=0, atol=0.03)

    def test_covariances_are_checked(self):
        with pytest.raises(ConfigError, match="eigenvalue -1 given"):
            Gaussian(f64(0.0, 0.0), torch.diag(f64(1.0, -1.0)))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Equal up to `tolerance` of the largest value."""
    assert actual.dtype == torch.float64
    atol = tolerance * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# Mixtures


class TestMixture:
    @each_path
    def test_one_component_is_a_gaussian(self, path):
        single = gaussian_5d(path)
        mixture = Mixture(f64(1.0), single.mean[None], single.cov[None], path, steps=128)
        t, s = times(path, 3.0), times(path, 0.1)
        x = normal(4, 5)
        for name in ("denoiser", "noise", "score", "velocity"):
            close(getattr(mixture, name)(x, t), getattr(single, name)(x, t), 1e-11)
        close(mixture.flow_map(x, t, s), single.flow_map(x, t, s), 1e-8)
        close(mixture.component(0).flow_map(x, t, s), single.flow_map(x, t, s))

    @each_path
    @pytest.mark.parametrize("ratio", [0.05, 1.0, 20.0])
    def test_score_is_the_gradient_of_the_density(self, path, ratio):
        data, t = mixture_2d(path), times(path, ratio)
        x = path.interpolate(data.sample(5, torch.Generator())[0], normal(5, 2), t)
        gradient = vmap(grad(lambda row: data.log_prob(row[None], t)[0]))(x)
        close(data.score(x, t), gradient, 1e-11)
        close(path.score_from_denoised(x, data.denoiser(x, t), t), gradient, 1e-9)
        close(path.interpolate(data.denoiser(x, t), data.noise(x, t), t), x)

    def test_denoiser_and_density_by_quadrature(self):
        x0 = torch.linspace(-4, 4, 20001, dtype=torch.float64)
        density = (
            WEIGHTS * torch.exp(torch.distributions.Normal(MEANS, STDS).log_prob(x0[:, None]))
        ).sum(1)
        t, x = f64(0.4), f64(-1.3, -0.4, 0.1, 0.8, 2.0)
        joint = density * torch.exp(torch.distributions.Normal(x0, 0.4).log_prob(x[:, None]))
        mass = torch.trapezoid(joint, x0)
        mean = torch.trapezoid(joint * x0, x0) / mass
        close(LINE_BY_ODE.denoiser(x[:, None], t)[:, 0], mean, 1e-10)
        close(LINE_BY_ODE.log_prob(x[:, None], t), mass.log(), 1e-10)

    def test_responsibilities_survive_the_far_tails(self):
        shares = LINE_BY_ODE.responsibilities(f64(-500.0, 500.0)[:, None], f64(0.0))
        close(shares.sum(1), f64(1.0, 1.0))
        assert shares[:, 1].min() > 0.999
        assert torch.isfinite(LINE_BY_ODE.log_prob(f64(1e6)[:, None], f64(0.0))).all()

    def test_moments(self):
        data = mixture_2d()
        x, labels = data.sample(300_000, torch.Generator().manual_seed(0))
        moments = data.moments()
        torch.testing.assert_close(x.mean(0), moments.mean, rtol=0, atol=0.01)
        torch.testing.assert_close(x.T.cov(), moments.cov, rtol=0, atol=0.01)
        shares = torch.bincount(labels) / len(labels)
        torch.testing.assert_close(shares.double(), data.weights, rtol=0, atol=0.005)
        torch.testing.assert_close(x[labels == 1].mean(0), data.means[1], rtol=0, atol=0.01)
        torch.testing.assert_close(x[labels == 1].T.cov(), data.covs[1], rtol=0, atol=0.01)

    def test_conditional_is_the_component(self):
        path = TrigFlow()
        data, x = mixture_2d(path), normal(6, 2)
        labels = torch.tensor([0, 1, 2, 2, 1, 0])
        t, s = times(path, *[2.0] * 6), times(path, *[0.01] * 6)
        maps = data.conditional_flow_map(x, t, s, labels)
        denoised = data.conditional_denoiser(x, t, labels)
        for i, k in enumerate(labels):
            part, row = data.component(int(k)), slice(i, i + 1)
            close(maps[row], part.flow_map(x[row], t[row], s[row]))
            close(denoised[row], part.denoiser(x[row], t[row]))

    @each_path
    def test_identities_of_a_flow_map(self, path):
        """By central differences, whose five maps are rows of one batch."""
        data = mixture_2d(path, steps=256)
        t, u, s = times(path, 2.0), times(path, 0.5), times(path, 0.05)
        x = path.interpolate(data.sample(4, torch.Generator())[0], normal(4, 2), t)
        v, h = data.velocity(x, t), 1e-5 * s
        zero = torch.zeros_like(h)
        shifts = [(zero, zero), (zero, h), (zero, -h), (h, zero), (-h, zero)]
        states = torch.cat([x + dt * v for dt, _ in shifts])
        starts = torch.cat([(t + dt).expand(4) for dt, _ in shifts])
        stops = torch.cat([(s + ds).expand(4) for _, ds in shifts])
        end, later, sooner, ahead, behind = data.flow_map(states, starts, stops).split(4)
        slope = data.velocity(end, s)
        close((later - sooner) / (2 * h), slope, 1e-6)
        assert (ahead - behind).abs().max() < 1e-6 * (2 * h) * slope.abs().max()
        again, back, still = data.flow_map(
            torch.cat([data.flow_map(x, t, u), end, x]),
            torch.cat([u.expand(4), s.expand(4), t.expand(4)]),
            torch.cat([s.expand(4), t.expand(4), t.expand(4)]),
        ).split(4)
        close(again, end, 1e-8)
        close(back, x, 1e-8)
        close(still, x)

    def test_halving_the_step_changes_little(self):
        """Fifteen times the finer map's error, as the order is 4."""
        data, x = mixture_2d(), 80 * normal(8, 2)
        coarse = replace(data, steps=512).flow_map(x, f64(80.0), f64(0.002))
        close(data.flow_map(x, f64(80.0), f64(0.002)), coarse, 15e-8 / 2)

    def test_guided_flows_are_integrated(self):
        data, x = mixture_2d(), 5 * normal(4, 2)
        labels = torch.tensor([0, 1, 2, 0])

        def network(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
            return data.denoiser(x, t) if cond is None else data.conditional_denoiser(x, t, cond)

        t, s = f64(5.0), f64(0.05)
        conditional = integrate(guided(network, 1.0, labels, None), x, t, s, 256)
        close(conditional, data.conditional_flow_map(x, t, s, labels), 1e-8)
        plain = integrate(guided(network, 0.0, labels, None), x, t, s, 256)
        close(plain, replace(data, steps=256).flow_map(x, t, s))

    @pytest.mark.parametrize("weights", [f64(0.5, 0.6), f64(1.5, -0.5)])
    def test_weights_are_checked(self, weights):
        with pytest.raises(ConfigError, match="sum 1 accepted"):
            Mixture.isotropic(weights, torch.zeros(2, 1), torch.ones(2))
        with pytest.raises(ConfigError, match="sum 1 accepted"):
            Mixture1D(weights, f64(0.0, 1.0), f64(1.0, 1.0))

    def test_widths_are_checked(self):
        with pytest.raises(ConfigError, match="positive definite"):
            Mixture.isotropic(f64(0.5, 0.5), torch.zeros(2, 1), f64(1.0, 0.0))
        with pytest.raises(ConfigError, match="above 0"):
            Mixture1D(f64(0.5, 0.5), f64(0.0, 1.0), f64(1.0, 0.0))


# The exact map of one dimension, and the integrated one against it


class TestMixture1D:
    @each_path
    def test_the_map_keeps_the_cdf(self, path):
        data = LINE.on(path)
        t, s = times(path, 3.0), times(path, 0.2)
        x = path.interpolate(torch.linspace(-2, 2, 9).double(), normal(9), t)
        y = data.flow_map(x, t, s)

        def cdf(x: Tensor, t: Tensor) -> Tensor:
            std = torch.sqrt((path.a(t) * STDS) ** 2 + path.b(t) ** 2)
            z = (x[:, None] - path.a(t) * MEANS) / std
            return (WEIGHTS * torch.special.ndtr(z)).sum(1)

        close(cdf(y, s), cdf(x, t), 1e-14)

    def test_one_component_is_a_gaussian(self):
        data = Mixture1D(f64(1.0), f64(0.3), f64(0.7)).on(Linear())
        x = normal(3, 2, 2)
        expected = Gaussian.isotropic(0.7, 0.3).on(Linear()).flow_map(x, f64(1.0), f64(0.0))
        close(data.flow_map(x, f64(1.0), f64(0.0)), expected)

    def test_far_tails_stay_exact(self):
        """40 standard deviations out, the widest component alone decides."""
        x = f64(-3200.0, 3200.0)
        y = LINE.flow_map(x, f64(80.0), f64(0.0))
        widest = 0.2 + 0.3 / math.hypot(0.3, 80.0) * (x - 0.2)
        torch.testing.assert_close(y, widest, rtol=2e-2, atol=0)
        assert (LINE.flow_map(y, f64(0.0), f64(80.0)) / x - 1).abs().max() < 1e-9

    def test_there_and_back(self):
        x = 3 * normal(50)
        y = LINE.flow_map(x, f64(3.0), f64(0.3))
        close(LINE.flow_map(y, f64(0.3), f64(3.0)), x, 1e-11)
        assert (y[x.argsort()].diff() > 0).all()

    @pytest.mark.parametrize(("steps", "error"), [(512, 4e-8), (1024, 2.5e-9)])
    def test_accuracy_of_runge_kutta(self, steps, error):
        """Of fourth order: 1.7e-8 and 1.0e-9 from sigma 80 to 0.002."""
        x = 80 * normal(64, 1)
        exact = LINE.flow_map(x, f64(80.0), f64(0.002))
        data = replace(LINE_BY_ODE, steps=steps)
        close(data.flow_map(x, f64(80.0), f64(0.002)), exact, error)

    @each_path
    def test_the_integrated_map_reaches_both_ends(self, path):
        """Data at t = 0 and the path's last time (pure noise in flow matching) are included."""
        low, high = f64(0.0), f64(path.t_max)
        if isinstance(path, VP):
            low = f64(path.t_min)
        by_ode, exact = LINE_BY_ODE.on(path), LINE.on(path)
        z = path.b(high) * normal(16, 1)
        data = exact.flow_map(z, high, low)
        starts = torch.cat([high.expand(16), low.expand(16)])
        down, up = by_ode.flow_map(torch.cat([z, data]), starts, starts.flip(0)).split(16)
        close(down, data, 1.5e-8)
        close(up, z, 1e-6)

    def test_a_turned_product_in_the_plane(self):
        """Components on a line with equal covariance: a 1-D mixture times a Gaussian, turned."""
        angle = torch.tensor(0.7).double()
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
        line = Mixture1D(WEIGHTS, MEANS, f64(0.2, 0.2, 0.2))
        across = Gaussian.isotropic(0.05)
        cov = turn @ torch.diag(f64(0.04, 0.0025)) @ turn.T
        means = torch.stack([MEANS, torch.zeros(3)], 1) @ turn.T
        plane = Mixture(WEIGHTS, means, cov.expand(3, 2, 2), steps=512)
        y, t, s = 10 * normal(12, 2), f64(10.0), f64(0.01)
        exact = torch.cat([line.flow_map(y[:, :1], t, s), across.flow_map(y[:, 1:], t, s)], 1)
        close(plane.flow_map(y @ turn.T, t, s), exact @ turn.T, 1e-8)


# What training reaches


STD = 0.5


class TestFixedPoints:
    @pytest.mark.parametrize(
        ("n", "euler", "heun"),
        [
            (18, 0.846086, 1.05528),
            (40, 0.929727, 1.00978),
            (151, 0.981233, 1.00063),
            (1281, 0.997782, 1.00001),
        ],
    )
    def test_published_ratios(self, n, euler, heun):
        grid = karras_grid(n)
        exact = exact_gain_gaussian(grid[-1:], 0.002, STD)
        assert exact.item() == pytest.approx(0.00624993, abs=5e-9)
        by_euler = cm_fixed_point_gaussian(grid, STD)[-1:] / exact
        by_heun = cm_fixed_point_gaussian(grid, STD, solver="heun")[-1:] / exact
        assert by_euler.item() == pytest.approx(euler, abs=1e-6)
        assert by_heun.item() == pytest.approx(heun, abs=1e-5)

    @pytest.mark.parametrize(("solver", "sample"), [("euler", ode_euler), ("heun", ode_heun)])
    def test_it_is_where_distillation_changes_nothing(self, solver, sample):
        """a_n+1 x = a_n (one step of the teacher's solver from x), on each interval."""
        grid = karras_grid(12)
        a = cm_fixed_point_gaussian(grid, STD, solver=solver)
        velocity = Gaussian.isotropic(STD).velocity
        one = torch.ones(1, 1, dtype=torch.float64)
        for n in range(11):
            step = sample(velocity, one, (grid[n + 1].item(), grid[n].item()))
            close(a[n] * step, a[n + 1] * one)
        assert a[0] == 1

    def test_it_minimises_the_consistency_training_loss(self):
        """Least squares over x0 and eps: the slope and what is left of the loss."""
        grid = karras_grid(18)
        a, least = cm_fixed_point_gaussian(grid, STD), ct_minimum_loss_gaussian(grid, STD)
        # Four equally likely draws with the second moments of the law, which are all it takes.
        x0, eps = STD * f64(1.0, 1.0, -1.0, -1.0), f64(1.0, -1.0, 1.0, -1.0)
        for n in range(17):
            r, t = grid[n], grid[n + 1]
            x_t, target = x0 + t * eps, a[n] * (x0 + r * eps)
            slope = (x_t * target).mean() / x_t.square().mean()
            assert slope.item() == pytest.approx(a[n + 1].item(), rel=1e-12)
            loss = (slope * x_t - target).square().mean()
            assert loss.item() == pytest.approx(least[n].item(), rel=1e-9)

    def test_ect(self):
        t = f64(0.01, 0.5, 3.0, 80.0)
        denoiser = STD**2 / (STD**2 + t**2)
        close(ect_fixed_point_gaussian(t, torch.zeros_like, STD), denoiser)
        two_steps = STD**2 / (STD**2 + (t / 2) ** 2) * (STD**2 + t**2 / 2) / (STD**2 + t**2)

        def halves_once(t: Tensor) -> Tensor:
            return torch.where(torch.isin(t, f64(0.01, 0.5, 3.0, 80.0)), t / 2, 0.0)

        close(ect_fixed_point_gaussian(t, halves_once, STD), two_steps)

    def test_ect_tends_to_the_exact_map(self):
        t = f64(0.1, 2.0, 80.0)
        exact = exact_gain_gaussian(t, 0.0, STD)
        errors = [
            (ect_fixed_point_gaussian(t, lambda t, q=q: t * (1 - q), STD) / exact - 1).abs().max()
            for q in (0.02, 0.01)
        ]
        assert errors[1] < 0.02
        assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)


class TestDistances:
    cov = gaussian_5d().cov
    mean = gaussian_5d().mean

    def test_w2_of_equal_gaussians_is_zero(self):
        assert gaussian_w2_squared(self.mean, self.cov, self.mean, self.cov) < 1e-12

    def test_w2_of_a_shift_and_of_a_scale(self):
        shifted = gaussian_w2_squared(self.mean, self.cov, self.mean + 2, self.cov)
        assert shifted.item() == pytest.approx(20, rel=1e-12)
        scaled = gaussian_w2_squared(self.mean, self.cov, self.mean, 9 * self.cov)
        assert scaled.item() == pytest.approx(4 * self.cov.trace().item(), rel=1e-12)

    def test_w2_is_the_cost_of_the_monotone_map(self):
        """For any two covariances, not only commuting ones; and symmetric."""
        other = normal(5, 5, seed=9)
        other = other @ other.T
        root, inverse = matrix_power(self.cov, 0.5), matrix_power(self.cov, -0.5)
        move = inverse @ matrix_power(root @ other @ root, 0.5) @ inverse - torch.eye(5)
        cost = (move @ self.cov @ move.T).trace()
        zero = torch.zeros(5)
        assert gaussian_w2_squared(zero, self.cov, zero, other).item() == pytest.approx(cost.item())
        assert gaussian_w2_squared(zero, other, zero, self.cov).item() == pytest.approx(cost.item())

    def test_energy_distance_by_hand(self):
        x, y = f64(0.0, 2.0)[:, None], f64(1.0, 4.0)[:, None]
        assert energy_distance(x, y).item() == pytest.approx(4.0 - 2.0 - 3.0)

    def test_energy_distance_tells_distributions_apart(self):
        data = mixture_2d()
        x, _ = data.sample(2000, torch.Generator().manual_seed(0))
        y, _ = data.sample(2000, torch.Generator().manual_seed(1))
        assert energy_distance(x, y).abs() < 2e-3
        assert energy_distance(x, y + 0.3) > 0.02


def matrix_power(cov: Tensor, exponent: float) -> Tensor:
    values, basis = torch.linalg.eigh(cov)
    return basis @ torch.diag(values**exponent) @ basis.T


@each_path
def test_oracles_fit_the_samplers(path):
    """An oracle's VE denoiser, moved to a path, is its denoiser there."""
    data, t = mixture_2d(), times(path, 0.4)
    x = normal(3, 2)
    close(on_path(data.denoiser, path)(x, t), data.on(path).denoiser(x, t), 1e-11)
