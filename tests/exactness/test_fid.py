"""The Frechet distance: stored numbers of the official code, closed forms, invariances."""

import math

import pytest
import torch

from fastflow.errors import DataError
from fastflow.evaluation.frechet import frechet_distance
from fastflow.evaluation.statistics import FeatureStatistics, Moments
from reference_data import reference


def moments(features, batches=1):
    statistics = FeatureStatistics(features.shape[1])
    for batch in features.chunk(batches):
        statistics.update(batch)
    return statistics.moments()


def gaussian(mean, cov):
    return Moments(torch.as_tensor(mean).double(), torch.as_tensor(cov).double())


def random_cov(dim, seed):
    a = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / dim


@pytest.mark.parametrize("batches", [1, 7])
def test_statistics_equal_the_official_ones(batches):
    ref = reference("fid")
    for name in ("a", "b"):
        found = moments(ref[f"features_{name}"], batches)
        ref.check(f"mu_{name}", found.mean)
        ref.check(f"sigma_{name}", found.cov)


def test_distance_equals_the_official_one():
    ref = reference("fid")
    a, b = moments(ref["features_a"]), moments(ref["features_b"])
    assert math.isclose(frechet_distance(a, b), ref["fid"].item(), rel_tol=1e-9)
    ref.check("fid_self", torch.tensor(frechet_distance(a, a)))
    few = moments(ref["features_a"][:16])
    assert math.isclose(frechet_distance(few, b), ref["fid_rank_deficient"].item(), rel_tol=1e-9)


def test_gaussians_in_closed_form():
    cov = random_cov(12, 0)
    mean, shift = torch.zeros(12).double(), torch.arange(12).double()
    here = gaussian(mean, cov)
    assert frechet_distance(here, here) < 1e-10
    shifted = frechet_distance(here, gaussian(mean + shift, cov))
    assert math.isclose(shifted, shift.square().sum().item(), rel_tol=1e-12)
    # tr(S + c^2 S - 2 c S) = (c - 1)^2 tr S
    scaled = frechet_distance(here, gaussian(mean, 9 * cov))
    assert math.isclose(scaled, 4 * cov.trace().item(), rel_tol=1e-10)


def test_commuting_covariances():
    """With common eigenvectors the distance is that of the standard deviations."""
    q, _ = torch.linalg.qr(random_cov(6, 1))
    s, r = torch.rand(6).double() + 0.1, torch.rand(6).double() + 0.1
    a, b = (gaussian(torch.zeros(6), (q * v**2) @ q.T) for v in (s, r))
    assert math.isclose(frechet_distance(a, b), (s - r).square().sum().item(), rel_tol=1e-9)


def test_symmetric_and_invariant_to_rotation():
    a, b = gaussian(torch.zeros(8), random_cov(8, 2)), gaussian(torch.ones(8), random_cov(8, 3))
    value = frechet_distance(a, b)
    assert math.isclose(value, frechet_distance(b, a), rel_tol=1e-10)
    q, _ = torch.linalg.qr(random_cov(8, 4))
    turned = [gaussian(q @ m.mean, q @ m.cov @ q.T) for m in (a, b)]
    assert math.isclose(value, frechet_distance(*turned), rel_tol=1e-10)


def test_order_and_batching_change_nothing():
    features = reference("fid")["features_a"]
    other = moments(reference("fid")["features_b"])
    value = frechet_distance(moments(features), other)
    shuffled = features[torch.randperm(len(features))]
    assert math.isclose(frechet_distance(moments(shuffled, 13), other), value, rel_tol=1e-11)


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_any_division_and_order_stay_within_the_stated_bound(shift):
    """1e-12 of the largest second moment: also for means far larger than deviations."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2000, 16, generator=generator, dtype=torch.float64) + shift
    whole = moments(features)
    bound = 1e-12 * features.square().mean(0).max()
    for batches in (2, 7, 2000):
        shuffled = features[torch.randperm(2000, generator=generator)]
        found = moments(shuffled, batches)
        assert (found.cov - whole.cov).abs().max() <= bound
        assert (found.mean - whole.mean).abs().max() <= bound


def test_covariance_equals_numpys():
    features = torch.randn(50, 5, dtype=torch.float64) + 3
    found = moments(features, 4)
    torch.testing.assert_close(found.cov, torch.cov(features.T), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.mean, features.mean(0), rtol=1e-13, atol=1e-13)


def test_equal_samples_have_a_distance():
    """A collapsed model: its covariance is rounding, with eigenvalues of either sign."""
    same = torch.full((70, 12), 0.3).double() + torch.arange(12)
    found = moments(same, 3)
    other = gaussian(torch.zeros(12), random_cov(12, 5))
    expected = same[0].square().sum() + other.cov.trace()
    for a, b in ((found, other), (other, found)):
        assert math.isclose(frechet_distance(a, b), expected.item(), rel_tol=1e-6)
    assert frechet_distance(found, found) < 1e-10


def test_refusals():
    a = gaussian(torch.zeros(3), torch.eye(3))
    with pytest.raises(DataError, match="3 and of 4 features"):
        frechet_distance(a, gaussian(torch.zeros(4), torch.eye(4)))
    with pytest.raises(DataError, match="damaged"):
        frechet_distance(a, gaussian(torch.zeros(3), torch.diag(torch.tensor([1.0, -0.5, 1.0]))))
    single = FeatureStatistics(3)
    single.update(torch.zeros(1, 3))
    with pytest.raises(DataError, match="at least 2"):
        single.moments()
    single.update(torch.full((2, 3), math.nan))
    with pytest.raises(DataError, match="NaN"):
        single.moments()
