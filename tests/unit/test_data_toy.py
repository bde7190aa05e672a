"""Toys: the points follow the law that the oracle states, and arguments are checked."""

import math

import pytest
import torch

from fastflow.data.toy import Gaussian2D, GaussianMixture2D
from fastflow.errors import ConfigError


def points(toy):
    return toy.fetch(torch.arange(len(toy)))


def test_gaussian_has_the_moments_asked_for():
    toy = Gaussian2D(mean=(1.0, -2.0), std=(0.5, 2.0), size=200_000)
    x, labels = points(toy)
    assert labels is None
    assert (toy.shape, toy.num_classes, toy.flip) == ((2,), 0, False)
    assert x.mean(0).tolist() == pytest.approx([1.0, -2.0], abs=0.02)
    assert torch.cov(x.T).flatten().tolist() == pytest.approx([0.25, 0, 0, 4.0], abs=0.03)


def test_mixture_components_have_the_moments_asked_for():
    toy = GaussianMixture2D(
        modes=4, radius=3.0, radial_std=0.4, tangential_std=0.1, weights=(1, 2, 3, 4), size=200_000
    )
    x, labels = points(toy)
    assert toy.num_classes == 4
    share = torch.bincount(labels) / len(labels)
    assert share.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.005)
    for mode in range(4):
        part = x[labels == mode].double()
        angle = mode * math.pi / 2
        centre = [3 * math.cos(angle), 3 * math.sin(angle)]
        assert part.mean(0).tolist() == pytest.approx(centre, abs=0.02)
        outward = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        along = torch.tensor([-math.sin(angle), math.cos(angle)], dtype=torch.float64)
        assert float((part @ outward).std()) == pytest.approx(0.4, rel=0.03)
        assert float((part @ along).std()) == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize("toy", [Gaussian2D(size=100_000), GaussianMixture2D(size=100_000)])
@pytest.mark.parametrize("t", [0.05, 0.5])
def test_oracle_is_the_best_denoiser_of_the_points(toy, t):
    """E[(x0 - D(x_t)) g(x_t)] = 0 for any g; a wrong law in the oracle breaks it."""
    x0 = points(toy)[0].double()
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x0 + t * noise
    residual = x0 - toy.oracle.denoiser(x, torch.full((len(x),), t, dtype=torch.float64))
    for probe in (torch.ones_like(x), x, x.flip(1), x.pow(3), (4 * x).sin()):
        terms = residual * probe
        error = terms.mean(0).abs() / (terms.std(0) / len(x) ** 0.5)
        assert float(error.max()) < 4.5


@pytest.mark.parametrize("kind", [Gaussian2D, GaussianMixture2D])
def test_points_are_drawn_once_from_the_data_seed(kind):
    one = kind(size=1000)
    torch.manual_seed(3)
    assert one.fingerprint() == kind(size=1000).fingerprint()
    assert one.fingerprint() != kind(size=1000, data_seed=1).fingerprint()
    assert len(kind()) == 2**20


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Gaussian2D(size=10)
    GaussianMixture2D(size=10)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("kind", "arguments", "key"),
    [
        (Gaussian2D, {"std": (0.0, 1.0)}, "std"),
        (Gaussian2D, {"std": (1.0, math.nan)}, "std"),
        (Gaussian2D, {"mean": (math.inf, 1.0)}, "mean"),
        (Gaussian2D, {"size": 0}, "size"),
        (GaussianMixture2D, {"modes": 0}, "modes"),
        (GaussianMixture2D, {"radius": math.nan}, "radius"),
        (GaussianMixture2D, {"radial_std": -0.1}, "radial_std"),
        (GaussianMixture2D, {"tangential_std": math.inf}, "std"),
        (GaussianMixture2D, {"weights": (1.0, 2.0)}, "weights"),
        (GaussianMixture2D, {"modes": 2, "weights": (1.0, -2.0)}, "weights"),
        (GaussianMixture2D, {"modes": 2, "weights": (1.0, math.nan)}, "weights"),
    ],
)
def test_impossible_values_are_refused_by_name(kind, arguments, key):
    with pytest.raises(ConfigError, match=rf"data\.{key}: .* accepted"):
        kind(**arguments)
