"""KID, Inception Score, precision and recall: torch-fidelity's numbers, plain formulas, limits."""

import math

import pytest
import torch
from torch import Tensor

from evaluation_fakes import GaussianMap, PictureModel, Pixels, pictures
from fastflow.distributed import World
from fastflow.evaluation.evaluate import evaluate
from fastflow.evaluation.frechet import frechet_distance
from fastflow.evaluation.metrics import FID, KID, InceptionScore, PrecisionRecall
from fastflow.evaluation.reference import drawn
from fastflow.evaluation.spec import Evaluation
from fastflow.evaluation.statistics import FeatureStatistics
from fastflow.torchvision_shim import import_beside_torchvision

REAL = pictures(150, seed=1)
MADE = pictures(120, seed=2)
SUBSETS = {"subsets": 7, "subset_size": 60}


def features(data, count=None):
    x, _ = data.fetch(torch.arange(count or len(data)))
    return ((x * 127.5 + 128).floor() / 127.5 - 1).flatten(1)


def darker(x: Tensor) -> Tensor:
    return x / 2 - 0.2


def measured(metric, tmp_path, made=MADE, real=REAL, change=lambda x: x, samples=None):
    model = PictureModel(GaussianMap(), shape=made.shape, pictures=made, change=change)
    plan = Evaluation(metrics=(metric,), samples=samples or len(made), steps=(1,), batch_size=32)
    return {row.metric: row for row in evaluate(model, plan, real, World(), cache=tmp_path)}


def fidelity(metric):
    return import_beside_torchvision(f"torch_fidelity.metric_{metric}", "this test", "eval")


def real_rows():
    return features(REAL)[drawn(len(REAL), len(REAL))]


def half_brighter(x: Tensor) -> Tensor:
    """Makes some images unlike the real ones, and leaves the others."""
    chosen = x.flatten(1).mean(1) > 0
    return torch.where(chosen[:, None, None, None], (x + 1) / 2, x)


def changed(change):
    x, _ = MADE.fetch(torch.arange(len(MADE)))
    return ((change(x) * 127.5 + 128).floor() / 127.5 - 1).flatten(1)


def darkened():
    return changed(darker)


def test_fid_agrees_with_torch_fidelity(tmp_path):
    row = measured(FID(extractor=Pixels()), tmp_path, change=darker)["fd_pixels"]
    module = fidelity("fid")
    statistics = [module.fid_features_to_statistics(x.double()) for x in (darkened(), real_rows())]
    theirs = module.fid_statistics_to_metric(*statistics, verbose=False)
    assert math.isclose(row.value, theirs["frechet_inception_distance"], rel_tol=1e-6)


def test_kid_agrees_with_torch_fidelity(tmp_path):
    row = measured(KID(extractor=Pixels(), **SUBSETS), tmp_path, change=darker)["kid"]
    theirs = fidelity("kid").kid_features_to_metric(
        darkened(), real_rows(), kid_subsets=7, kid_subset_size=60, verbose=False
    )
    assert math.isclose(row.value, theirs["kernel_inception_distance_mean"], rel_tol=1e-6)
    assert math.isclose(row.spread, theirs["kernel_inception_distance_std"], rel_tol=1e-6)


def test_kid_is_the_unbiased_estimate(tmp_path):
    """With one subset of everything: means over pairs of different images."""
    data = pictures(120, seed=3)
    metric = KID(extractor=Pixels(), subsets=1, subset_size=120)
    row = measured(metric, tmp_path, real=data, change=darker)["kid"]
    x, y = darkened().double(), features(data).double()

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    expected = within(x) + within(y) - 2 * kernel(x, y).mean()
    assert math.isclose(row.value, expected.item(), rel_tol=1e-5)
    assert row.spread == 0


def test_inception_score_agrees_with_torch_fidelity_and_its_definition(tmp_path):
    row = measured(InceptionScore(extractor=Pixels(), splits=4), tmp_path)["inception_score"]
    logits = 4 * features(MADE)[:, :5]
    theirs = fidelity("isc").isc_features_to_metric(logits, splits=4)
    assert math.isclose(row.value, theirs["inception_score_mean"], rel_tol=1e-6)
    assert math.isclose(row.spread, theirs["inception_score_std"], rel_tol=1e-6)

    row = measured(InceptionScore(extractor=Pixels(), splits=1), tmp_path)["inception_score"]
    p = logits.double().softmax(1)
    divergence = (p * (p / p.mean(0)).log()).sum(1).mean()
    assert math.isclose(row.value, divergence.exp().item(), rel_tol=1e-6)


def test_precision_and_recall_agree_with_torch_fidelity_and_their_definition(tmp_path):
    rows = measured(PrecisionRecall(extractor=Pixels()), tmp_path, change=half_brighter)
    x, y = changed(half_brighter), real_rows()
    theirs = fidelity("prc").prc_features_to_metric(x, y, verbose=False)
    sets = {"x": x.double(), "y": y.double()}
    distances = {(a, b): torch.cdist(sets[a], sets[b]) for a in sets for b in sets}

    def share(of, among):
        radius = distances[among, among].sort(1).values[:, 3]
        return (distances[of, among] <= radius).any(1).double().mean().item()

    for name, (of, among) in {"precision": "xy", "recall": "yx"}.items():
        assert math.isclose(rows[name].value, theirs[name], rel_tol=1e-6)
        assert math.isclose(rows[name].value, share(of, among), rel_tol=1e-6)
    assert 0.5 < rows["precision"].value < rows["recall"].value < 1


def test_equal_sets(tmp_path):
    def run(metric, samples=150):
        return measured(metric, tmp_path, made=REAL, samples=samples)

    assert run(FID(extractor=Pixels()))["fd_pixels"].value < 1e-8
    rows = run(PrecisionRecall(extractor=Pixels()))
    assert rows["precision"].value == rows["recall"].value == 1
    # KID takes the two sets for independent, so images in both lower it by O(1 / size).
    kid = run(KID(extractor=Pixels(), subset_size=70))["kid"]
    x = features(REAL).double()
    k = (x @ x.T / 48 + 1) ** 3
    own, others = k.trace() / 150, (k.sum() - k.trace()) / (150 * 149)
    assert abs(kid.value + 2 * (own - others) / 150) < 3 * kid.spread / 100**0.5
    # Independent sets of one distribution: 0 but for chance; another distribution: far from it.
    other = measured(KID(extractor=Pixels(), subset_size=70), tmp_path)["kid"]
    assert abs(other.value) < 0.01
    far = measured(KID(extractor=Pixels(), subset_size=70), tmp_path, change=darker)["kid"]
    assert far.value > 0.1


def constant(level):
    return lambda x: torch.full_like(x, level)


def test_kid_of_constant_images_in_closed_form(tmp_path):
    """k(a, a) + k(b, b) - 2 k(a, b) for images that are all a, all b: bytes 255 and 128."""
    data = pictures(80)
    real = type(data)("white", torch.full((80, 3, 4, 4), 255, dtype=torch.uint8), None, 0, False)
    metric = KID(extractor=Pixels(), subset_size=50)
    row = measured(metric, tmp_path, made=data, real=real, change=constant(0.0))["kid"]
    a, b = 1.0, 128 / 127.5 - 1
    expected = (a * a + 1) ** 3 + (b * b + 1) ** 3 - 2 * (a * b + 1) ** 3
    assert math.isclose(row.value, expected, rel_tol=1e-5)
    assert row.spread < 1e-5


@pytest.mark.parametrize(("sharpness", "expected"), [(0.0, 1.0), (200.0, 5.0)])
def test_inception_score_of_no_and_of_all_information(tmp_path, sharpness, expected):
    """1 where all images look alike, the number of classes where each is surely of one."""

    def one_class_each(x):
        out = torch.zeros_like(x)
        for row in range(len(x)):
            out.view(len(x), -1)[row, :5] = -1.0
            out.view(len(x), -1)[row, row % 5] = 1.0
        return out * min(sharpness, 1.0)

    data = pictures(100)
    model = PictureModel(GaussianMap(), shape=data.shape, pictures=data, change=one_class_each)
    metric = InceptionScore(extractor=Pixels(), splits=1)
    plan = Evaluation(metrics=(metric,), samples=100, steps=(1,), batch_size=100)
    (row,) = evaluate(model, plan, data, World(), cache=tmp_path)
    # Logits 4 and -4: exp(-8) of the probability is elsewhere.
    assert row.value == pytest.approx(expected, rel=0.03)


def test_frechet_distance_of_features_is_that_of_their_moments():
    statistics = FeatureStatistics(48)
    statistics.update(darkened())
    other = FeatureStatistics(48)
    other.update(real_rows())
    value = frechet_distance(statistics.moments(), other.moments())
    x, y = darkened().double(), real_rows().double()
    root = torch.linalg.eigvals(torch.cov(x.T) @ torch.cov(y.T)).sqrt().real.sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + torch.cov(x.T).trace()
    expected += torch.cov(y.T).trace() - 2 * root
    assert math.isclose(value, expected.item(), rel_tol=1e-9)
