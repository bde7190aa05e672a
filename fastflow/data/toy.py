"""Points in the plane whose flow map is known, to measure methods against the truth."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastflow.data.dataset import Table
from fastflow.errors import ConfigError
from fastflow.oracle import Gaussian, Mixture
from fastflow.rng import fold_in

Pair = tuple[float, float]


class Toy(Table):
    """Points [2] drawn once from a known law.

    Attributes:
        oracle: the law itself, with its denoiser and flow map in closed form or to 1e-8.
    """

    oracle: Gaussian | Mixture


class Gaussian2D(Toy):
    """One Gaussian with independent coordinates; no labels.

    Args:
        mean: mean of each coordinate.
        std: standard deviation of each coordinate.
        size: number of points.
        data_seed: of the points; the run's seed does not change them.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        mean: Pair = (0.3, -0.2),
        std: Pair = (0.5, 0.25),
        size: int = 2**20,
        data_seed: int = 0,
    ) -> None:
        _check(size=size, std=min(std))
        _check_finite(mean=mean, std=std)
        centre, spread = (torch.tensor(v, dtype=torch.float64) for v in (mean, std))
        points = centre + spread * _normal(size, _generator("gaussian", data_seed))
        super().__init__("gaussian2d", points.float(), None, num_classes=0, flip=False)
        self.oracle = Gaussian(mean=centre, cov=torch.diag(spread**2))


class GaussianMixture2D(Toy):
    """Gaussians on a ring, wide or narrow along the circle; the label is the component.

    Args:
        modes: number of components; also of classes.
        radius: of the ring.
        radial_std: standard deviation of a component away from the centre.
        tangential_std: the same along the circle; equal to the radial one it is isotropic.
        weights: of the components, positive, normalised to sum to 1; None makes them equal.
        size: number of points.
        data_seed: of the points; the run's seed does not change them.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        modes: int = 8,
        radius: float = 1.0,
        radial_std: float = 0.1,
        tangential_std: float = 0.1,
        weights: tuple[float, ...] | None = None,
        size: int = 2**20,
        data_seed: int = 0,
    ) -> None:
        _check(modes=modes, size=size, radial_std=radial_std, tangential_std=tangential_std)
        _check_finite(radius=(radius,), std=(radial_std, tangential_std))
        share = _normalised(weights, modes)
        angles = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
        outward = torch.stack([angles.cos(), angles.sin()], 1)
        along = torch.stack([-angles.sin(), angles.cos()], 1)
        # Columns span each component: its covariance is axes @ axes^T.
        axes = torch.stack([radial_std * outward, tangential_std * along], 2)
        means = radius * outward

        generator = _generator("mixture", data_seed)
        labels = torch.multinomial(share, size, replacement=True, generator=generator)
        noise = _normal(size, generator)
        points = means[labels] + (axes[labels] @ noise.unsqueeze(2)).squeeze(2)
        super().__init__("gaussian_mixture2d", points.float(), labels, modes, flip=False)
        self.oracle = Mixture(weights=share, means=means, covs=axes @ axes.mT)


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(fold_in(seed, name))


def _normal(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, 2, dtype=torch.float64, generator=generator)


def _check(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"data.{name}: {value} given, a positive number accepted")


def _check_finite(**values: tuple[float, ...]) -> None:
    for name, value in values.items():
        if not all(map(math.isfinite, value)):
            raise ConfigError(f"data.{name}: {value} given, finite numbers accepted")


def _normalised(weights: tuple[float, ...] | None, modes: int) -> Tensor:
    if weights is None:
        return torch.full((modes,), 1 / modes, dtype=torch.float64)
    if len(weights) != modes or not all(0 < w < math.inf for w in weights):
        raise ConfigError(
            f"data.weights: {weights} given, accepted: {modes} positive numbers, one per mode"
        )
    share = torch.tensor(weights, dtype=torch.float64)
    return share / share.sum()
