"""Closed-form flow maps of Gaussian and Gaussian-mixture data: the ground truth of the tests.

Everything is computed in float64 and returned in it. An oracle knows its path: `denoiser(x, t)`,
`velocity(x, t)` and `flow_map(x, t, s)` take that path's states and times, and fit wherever a
trained network's would. `on(path)` gives the same data on another path.

With m_t = a mu and C_t = a^2 Sigma + b^2 I, all of whose C_t commute, one Gaussian has

    D = mu + a Sigma C_t^-1 (x - m_t)      E = b C_t^-1 (x - m_t)      score = -E / b
    v = a' D + b' E                        X_{t->s}(x) = m_s + (C_s C_t^-1)^1/2 (x - m_t),

and a mixture has the same D, E, score and v, averaged by the responsibilities of x. Its flow map
has no formula: `Mixture` integrates the ODE, `Mixture1D` uses that the map preserves the CDF.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastflow.errors import ConfigError
from fastflow.path import VE, Path, expand

_VE = VE()
# Below this multiple of the narrowest and above this multiple of the widest scale of the data,
# the flow of a mixture is given by expansions whose relative error is of order 1e-10.
_NARROW, _WIDE = 3e-3, 2e3
_BISECTIONS = 64


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Data N(mean, cov).

    Attributes:
        mean: [*shape] of one sample, or a scalar tensor for all its dimensions.
        cov: covariance matrix [D, D] of samples [D]; or a scalar tensor, the variance of every
            dimension of samples of any shape.
        path: the interpolant.

    Raises:
        ConfigError: a covariance with an eigenvalue below 0.
    """

    mean: Tensor
    cov: Tensor
    path: Path = _VE
    _variances: Tensor = field(init=False, repr=False)
    _basis: Tensor | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        cov = _float64(self.cov)
        variances, basis = (cov, None) if cov.ndim == 0 else torch.linalg.eigh(cov)
        if variances.min() < -1e-12 * variances.abs().max():
            raise ConfigError(
                f"covariance with an eigenvalue {variances.min().item():g} given; "
                f"positive semidefinite ones accepted"
            )
        variances = variances.clamp_min(0)
        _set(self, mean=_float64(self.mean), cov=cov, _variances=variances, _basis=basis)

    @classmethod
    def isotropic(cls, std: float, mean: float | Tensor = 0.0) -> Gaussian:
        """Independent dimensions with one standard deviation."""
        return cls(_float64(mean), _float64(std**2))

    def on(self, path: Path) -> Gaussian:
        """The same data on another path."""
        return replace(self, path=path)

    def denoiser(self, x: Tensor, t: Tensor) -> Tensor:
        """D = E[x0 | x_t]."""
        a = expand(self.path.a(_float64(t)), x)
        return self.mean + self._scaled(
            a * self._variances / self._variance(x, t), self._rest(x, t)
        )

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[eps | x_t]."""
        b = expand(self.path.b(_float64(t)), x)
        return self._scaled(b / self._variance(x, t), self._rest(x, t))

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x)."""
        return self._scaled(-1 / self._variance(x, t), self._rest(x, t))

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt of the probability-flow ODE."""
        return self.path.velocity(self.denoiser(x, t), self.noise(x, t), _float64(t))

    def flow_map(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """X_{t->s}(x); s may lie on either side of t."""
        gain = (self._variance(x, s) / self._variance(x, t)).sqrt()
        return expand(self.path.a(_float64(s)), x) * self.mean + self._scaled(
            gain, self._rest(x, t)
        )

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Data [*shape], the batch first."""
        z = torch.randn(shape, dtype=torch.float64, generator=generator)
        return self.mean + self._from_basis(self._variances.sqrt() * z)

    def _variance(self, x: Tensor, t: Tensor) -> Tensor:
        """Eigenvalues of C_t."""
        t = _float64(t)
        return expand(self.path.a(t), x) ** 2 * self._variances + expand(self.path.b(t), x) ** 2

    def _rest(self, x: Tensor, t: Tensor) -> Tensor:
        """x - m_t, in the coordinates of the basis."""
        rest = _float64(x) - expand(self.path.a(_float64(t)), x) * self.mean
        return rest if self._basis is None else rest @ self._basis

    def _scaled(self, factors: Tensor, rest: Tensor) -> Tensor:
        return self._from_basis(factors * rest)

    def _from_basis(self, y: Tensor) -> Tensor:
        return y if self._basis is None else y @ self._basis.T


@dataclass(frozen=True, eq=False)
class Mixture:
    """Data from K Gaussians in D dimensions. x is [B, D]; component k is class k.

    Attributes:
        weights: probabilities [K], positive, of sum 1.
        means: [K, D].
        covs: covariance matrices [K, D, D], positive definite.
        path: the interpolant.
        steps: Runge-Kutta steps of a flow map; 1024 give 1e-8 from sigma 80 to 0.002.

    Raises:
        ConfigError: weights or covariances that are not as said.
    """

    weights: Tensor
    means: Tensor
    covs: Tensor
    path: Path = _VE
    steps: int = 1024
    _variances: Tensor = field(init=False, repr=False)
    _bases: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        weights, means, covs = (_float64(v) for v in (self.weights, self.means, self.covs))
        _check_weights(weights)
        variances, bases = torch.linalg.eigh(covs)
        if not (variances > 0).all():
            raise ConfigError(
                f"mixture covariances with eigenvalues down to {variances.min().item():g} given; "
                f"positive definite ones accepted"
            )
        _set(self, weights=weights, means=means, covs=covs, _variances=variances, _bases=bases)

    @classmethod
    def isotropic(cls, weights: Tensor, means: Tensor, stds: Tensor) -> Mixture:
        """From one standard deviation per component [K]."""
        eye = torch.eye(means.shape[1], dtype=torch.float64)
        return cls(weights, means, _float64(stds)[:, None, None] ** 2 * eye)

    def on(self, path: Path) -> Mixture:
        """The same data on another path."""
        return replace(self, path=path)

    def component(self, k: int) -> Gaussian:
        """Component k alone, on the same path: its maps are those of class k."""
        return Gaussian(self.means[k], self.covs[k], self.path)

    def moments(self) -> Gaussian:
        """The Gaussian of the same mean and covariance, on the same path."""
        mean = self.weights @ self.means
        centred = self.means - mean
        inside = torch.einsum("k,kij->ij", self.weights, self.covs)
        between = torch.einsum("k,ki,kj->ij", self.weights, centred, centred)
        return Gaussian(mean, inside + between, self.path)

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t(x), [B]; at t = 0 that of the data."""
        return self._log_joint(*self._coordinates(x, t)).logsumexp(1)

    def responsibilities(self, x: Tensor, t: Tensor) -> Tensor:
        """Probability of each component given x at time t, [B, K]."""
        return self._log_joint(*self._coordinates(x, t)).softmax(1)

    def denoiser(self, x: Tensor, t: Tensor) -> Tensor:
        """D = E[x0 | x_t]."""
        rest, variance = self._coordinates(x, t)
        a = self.path.a(_float64(t)).reshape(-1, 1, 1)
        shares = self._log_joint(rest, variance).softmax(1)
        weighted = shares[:, :, None] * (a * self._variances / variance * rest)
        return shares @ self.means + torch.einsum("bke,kde->bd", weighted, self._bases)

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[eps | x_t]."""
        return -expand(self.path.b(_float64(t)), x) * self.score(x, t)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x), also at t = 0."""
        rest, variance = self._coordinates(x, t)
        shares = self._log_joint(rest, variance).softmax(1)
        return -torch.einsum("bke,kde->bd", shares[:, :, None] * rest / variance, self._bases)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt of the probability-flow ODE."""
        return self.path.velocity(self.denoiser(x, t), self.noise(x, t), _float64(t))

    def flow_map(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """X_{t->s}(x), s on either side of t, to about 1e-8 of the data's scale.

        By Runge-Kutta in ln sigma, except beyond all scales of the data: far below them (down to
        t = 0) x is expanded in sigma^2, and far above (up to pure noise, where a = 0) only the
        data's mean and covariance count.
        """
        x, t, s = _float64(x), _float64(t), _float64(s)
        moments = self.moments()
        lowest = _NARROW * self._variances.min().sqrt()
        highest = _WIDE * moments._variances.max().sqrt()
        low, high = (self.path.t_of_nsr(k) for k in (lowest, highest))
        start, end = t.clamp(low, high), s.clamp(low, high)
        x = self._beyond(x, t, start, low, high, moments)
        inner, sigma = self.path.convert(x, start, _VE)
        inner = integrate(self.on(_VE).denoiser, inner, sigma, self.path.nsr(end), self.steps)
        x, _ = _VE.convert(inner, self.path.nsr(end), self.path)
        return self._beyond(x, end, s, low, high, moments)

    def _beyond(
        self, x: Tensor, t: Tensor, s: Tensor, low: Tensor, high: Tensor, moments: Gaussian
    ) -> Tensor:
        """The map t -> s of the rows that lie above `high` or below `low`; others stay."""
        above = expand(torch.maximum(t, s) > high, x)
        below = expand(torch.minimum(t, s) < low, x)
        x = torch.where(above, moments.flow_map(x, t, s), x)
        # In VE, dx/d(sigma^2) = -score/2. The clamp keeps the unused rows finite.
        t, s = t.clamp(max=low), s.clamp(max=low)
        gap = self.path.nsr(t) ** 2 - self.path.nsr(s) ** 2
        a_t, a_s = self.path.a(t), self.path.a(s)
        cleaner = expand(a_s / a_t, x) * x + expand(a_s * a_t * gap / 2, x) * self.score(x, t)
        return torch.where(below, cleaner, x)

    def conditional_denoiser(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """D of each row's class, labels [B]."""
        rest, variance = self._coordinates(x, t)
        a = self.path.a(_float64(t)).reshape(-1, 1, 1)
        each = self.means + self._from_bases(a * self._variances * rest / variance)
        return each[torch.arange(len(x)), labels]

    def conditional_flow_map(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        """X_{t->s}(x) of each row's class, labels [B]; exact."""
        rest, variance = self._coordinates(x, t)
        _, after = self._coordinates(x, s)
        moved = self._from_bases((after / variance).sqrt() * rest)
        maps = self.path.a(_float64(s)).reshape(-1, 1, 1) * self.means + moved
        return maps[torch.arange(len(x)), labels]

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Data [count, D] and their classes [count]."""
        labels = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        spread = torch.einsum("bde,be->bd", self._bases[labels], self._variances[labels].sqrt() * z)
        return self.means[labels] + spread, labels

    def _coordinates(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x - m_t in each component's basis and the eigenvalues of C_t, both [B, K, D]."""
        t = _float64(t)
        a, b = (c.reshape(-1, 1, 1) for c in (self.path.a(t), self.path.b(t)))
        rest = torch.einsum("bkd,kde->bke", _float64(x)[:, None] - a * self.means, self._bases)
        return rest, a**2 * self._variances + b**2

    def _from_bases(self, y: Tensor) -> Tensor:
        return torch.einsum("bke,kde->bkd", y, self._bases)

    def _log_joint(self, rest: Tensor, variance: Tensor) -> Tensor:
        """log of weight times density of each component, [B, K]."""
        quadratic = rest**2 / variance + variance.log() + math.log(2 * math.pi)
        return self.weights.log() - 0.5 * quadratic.sum(2)


def integrate(
    denoiser: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, s: Tensor, steps: int
) -> Tensor:
    """The ODE of a VE denoiser from sigma t to sigma s, both > 0 and [B] or [1], by RK4.

    In l = ln sigma the ODE is dx/dl = x - D, smooth over all scales. Serves what has no closed
    form at all, such as guided denoisers.
    """
    start, h = t.log(), (s.log() - t.log()) / steps

    def slope(x: Tensor, level: Tensor) -> Tensor:
        return x - denoiser(x, level.exp())

    step = expand(h, x)
    for i in range(steps):
        level = start + i * h
        k1 = slope(x, level)
        k2 = slope(x + step / 2 * k1, level + h / 2)
        k3 = slope(x + step / 2 * k2, level + h / 2)
        k4 = slope(x + step * k3, level + h)
        x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@dataclass(frozen=True, eq=False)
class Mixture1D:
    """Numbers from K Gaussians; the dimensions of x [B, ...] are independent and alike.

    The ODE preserves order, so X_{t->s}(x) = Phi_s^-1(Phi_t(x)) with the mixture's CDF: exact to
    rounding, without an ODE, between any two times of any path.

    Attributes:
        weights: probabilities [K], positive, of sum 1.
        means: [K].
        stds: [K], > 0.
        path: the interpolant.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    path: Path = _VE

    def __post_init__(self) -> None:
        weights, means, stds = (_float64(v) for v in (self.weights, self.means, self.stds))
        _check_weights(weights)
        if not (stds > 0).all():
            raise ConfigError(f"mixture stds {stds.tolist()} given; values above 0 accepted")
        _set(self, weights=weights, means=means, stds=stds)

    def on(self, path: Path) -> Mixture1D:
        """The same data on another path."""
        return replace(self, path=path)

    def flow_map(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """X_{t->s}(x), s on either side of t."""
        x = _float64(x)
        m_t, std_t = self._components(x, t)
        m_s, std_s = self._components(x, s)
        z = (x[..., None] - m_t) / std_t
        # The smaller tail, in logarithms, keeps its relative precision however small it is.
        below, above = self._log_cdf(z), self._log_cdf(-z)
        side = torch.where(below < above, 1.0, -1.0)[..., None].double()
        wanted = torch.minimum(below, above)
        # The quantile lies between the components' images of the smallest and the largest z.
        low = (m_s + std_s * z.amin(-1, keepdim=True)).amin(-1)
        high = (m_s + std_s * z.amax(-1, keepdim=True)).amax(-1)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            tail = self._log_cdf(side * (middle[..., None] - m_s) / std_s)
            too_low = (tail < wanted) == (side[..., 0] > 0)
            low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
        return (low + high) / 2

    def _components(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations at t, broadcastable to [*x.shape, K]."""
        t = _float64(t)
        a, b = (expand(c, x)[..., None] for c in (self.path.a(t), self.path.b(t)))
        return a * self.means, torch.sqrt((a * self.stds) ** 2 + b**2)

    def _log_cdf(self, z: Tensor) -> Tensor:
        return torch.logsumexp(self.weights.log() + torch.special.log_ndtr(z), -1)


def _float64(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _set(instance: Gaussian | Mixture | Mixture1D, **values: Tensor | None) -> None:
    for name, value in values.items():
        object.__setattr__(instance, name, value)


def _check_weights(weights: Tensor) -> None:
    if not (weights > 0).all() or abs(weights.sum().item() - 1) > 1e-6:
        raise ConfigError(
            f"mixture weights {weights.tolist()} given; positive values of sum 1 accepted"
        )
