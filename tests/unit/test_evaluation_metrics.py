"""Metrics on features: one pass, the same for any division, rows that tell all, refusals."""

import dataclasses
import math

import pytest
import torch

from evaluation_fakes import (
    GaussianMap,
    PictureModel,
    PixelExtractor,
    Pixels,
    pictures,
    together,
)
from fastflow.data.dataset import Table
from fastflow.distributed import World
from fastflow.errors import ConfigError, DataError
from fastflow.evaluation.evaluate import evaluate
from fastflow.evaluation.extractors import ImageNetwork
from fastflow.evaluation.features import features_of
from fastflow.evaluation.metrics import FID, KID, InceptionScore, PrecisionRecall, RealHalves
from fastflow.evaluation.reference import drawn
from fastflow.evaluation.spec import Evaluation
from fastflow.evaluation.toy_metrics import EnergyDistance

ALL = (
    FID(extractor=Pixels()),
    KID(extractor=Pixels(), subset_size=40),
    InceptionScore(extractor=Pixels()),
    PrecisionRecall(extractor=Pixels(), real=60),
)
DATA = pictures(100)
PLAN = Evaluation(metrics=ALL, samples=70, steps=(1,), batch_size=20)


def model_of(data=DATA, change=lambda x: 1.1 * x):
    return PictureModel(GaussianMap(), shape=data.shape, pictures=data, change=change)


def run(plan, tmp_path, data=DATA, model=None, world=None):
    return evaluate(model or model_of(data), plan, data, world or World(), cache=tmp_path)


def test_each_image_goes_through_an_extractor_once(tmp_path):
    """Whatever is measured: generated ones, and the real ones for moments and for features."""
    run(PLAN, tmp_path)  # fills the cache of moments
    PixelExtractor.seen = 0
    run(PLAN, tmp_path)
    assert PixelExtractor.seen == 70 + 100
    PixelExtractor.seen = 0
    run(dataclasses.replace(PLAN, metrics=ALL[::2]), tmp_path)
    assert PixelExtractor.seen == 70


def test_different_extractors_do_not_share(tmp_path):
    other = FID(extractor=Pixels(classes=0, weights="other"))
    rows = run(dataclasses.replace(PLAN, metrics=(*ALL[:2], other)), tmp_path)
    assert [(r.metric, r.extractor_hash) for r in rows] == [
        ("fd_pixels", "none"),
        ("kid", "none"),
        ("fd_pixels", "other"),
    ]


def test_rows_tell_what_was_measured(tmp_path):
    plan = dataclasses.replace(PLAN, blocks=2)
    rows = {row.metric: row for row in run(plan, tmp_path)}
    assert list(rows) == ["fd_pixels", "kid", "inception_score", "precision", "recall"]
    labels = ["fd pixels-70", "KID-70", "IS-70", "precision-70", "recall-70"]
    assert [row.label for row in rows.values()] == labels
    higher = ("inception_score", "precision", "recall")
    for name, row in rows.items():
        assert row.better == ("higher" if name in higher else "lower")
        assert row.best == (max if name in higher else min)(row.values)
        assert len(row.values) == 2
        assert (row.spread is not None) == (name in ("kid", "inception_score"))
        assert (row.extractor, row.extractor_hash, row.quantisation) == (
            "pixels 4",
            "none",
            "truncate",
        )
    assert rows["kid"].spread > 0
    assert rows["precision"].best > rows["precision"].min
    references = [row.reference for row in rows.values()]
    assert references == ["noise, all 100"] * 2 + [""] + ["noise, 60 of 100"] * 2
    assert rows["kid"].reference_hash == DATA.fingerprint()


def test_the_number_of_processes_changes_nothing_but_float64_sums(tmp_path):
    """Features come together in the order of the samples, to the bit."""
    alone = run(PLAN, tmp_path / "one")
    for size in (2, 3, 7):  # 7 is more than there are batches
        folder = tmp_path / str(size)
        for rows in together(size, lambda world, f=folder: run(PLAN, f, world=world)):
            for row, single in zip(rows, alone, strict=True):
                if row.metric == "fd_pixels":
                    assert math.isclose(row.value, single.value, rel_tol=1e-9)
                else:
                    assert (row.value, row.spread) == (single.value, single.spread)


def test_the_batch_size_changes_nothing_but_float64_sums(tmp_path):
    alone = run(PLAN, tmp_path)
    for size in (1, 13, 70):
        for row, single in zip(
            run(dataclasses.replace(PLAN, batch_size=size), tmp_path), alone, strict=True
        ):
            if row.metric == "fd_pixels":
                assert math.isclose(row.value, single.value, rel_tol=1e-9)
            else:
                assert row.value == single.value


def test_drawn_rows_are_nested_different_and_always_the_same():
    rows = drawn(1000, 100)
    assert len(rows.unique()) == 100
    assert rows.max() > 500
    assert torch.equal(drawn(1000, 30), rows[:30])
    assert torch.equal(drawn(50, 100).sort().values, torch.arange(50))


def test_metrics_on_features_and_others_together(tmp_path):
    metrics = (*ALL[:1], EnergyDistance(samples=20), *ALL[2:3])
    rows = run(dataclasses.replace(PLAN, metrics=metrics), tmp_path)
    assert {row.metric for row in rows} == {"fd_pixels", "energy_distance", "inception_score"}


def test_halves_in_other_features_are_named_after_them(tmp_path):
    metric = FID(extractor=Pixels(), baseline=RealHalves(splits=2))
    rows = run(dataclasses.replace(PLAN, metrics=(metric,)), tmp_path)
    assert [(r.metric, r.samples) for r in rows] == [("fd_pixels", 70), ("fd_pixels_half", 50)]


@pytest.mark.parametrize(
    ("metric", "samples", "text"),
    [
        (KID(extractor=Pixels()), 70, "KID: evaluation.samples=70 given, 1000 or more needed"),
        (KID(extractor=Pixels(), subset_size=150), 150, "KID: 100 images of noise given, 150"),
        (InceptionScore(extractor=Pixels(), splits=8), 7, "samples=7 given, 8 or more"),
        (PrecisionRecall(extractor=Pixels()), 3, "evaluation.samples=3 given, 4 or more needed"),
        (PrecisionRecall(extractor=Pixels(), neighbours=100), 120, "100 images of noise given"),
        (InceptionScore(extractor=Pixels(classes=0)), 70, "pixels 4 has no classes"),
    ],
)
def test_too_few_samples_and_no_classes_are_refused(tmp_path, metric, samples, text):
    model = model_of()
    with pytest.raises(ConfigError, match=text):
        run(Evaluation(metrics=(metric,), samples=samples, steps=(1,)), tmp_path, model=model)
    assert model.asked == []  # before anything was sampled


def test_fewer_samples_than_features_are_said_to_be_few(tmp_path, capsys):
    few = dataclasses.replace(PLAN, metrics=ALL[:1], samples=48)
    run(few, tmp_path)
    assert "48 samples are no more than the 48 features" in capsys.readouterr().err
    run(dataclasses.replace(few, samples=49), tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "make",
    [
        lambda: KID(subsets=0),
        lambda: KID(subset_size=1),
        lambda: KID(real=999),
        lambda: InceptionScore(splits=0),
        lambda: PrecisionRecall(neighbours=0),
        lambda: PrecisionRecall(real=3),
    ],
)
def test_impossible_metrics_are_refused(make):
    with pytest.raises(ConfigError, match="given, .* or more accepted"):
        make()


def test_images_that_an_extractor_cannot_take_are_refused_first(tmp_path):
    large = pictures(20, side=8)
    model = model_of(large)
    with pytest.raises(DataError, match=r"shape \(3, 8, 8\)"):
        run(dataclasses.replace(PLAN, metrics=ALL[:1]), tmp_path, data=large, model=model)
    assert model.asked == []


class Damaged(Table):
    """Has a NaN that no reader found."""

    def fetch(self, indices):
        x, labels = super().fetch(indices)
        x[indices == 33] = math.nan
        return x, labels


@pytest.mark.parametrize("metric", [ALL[0], ALL[1]])
def test_a_nan_in_a_real_image_is_named(tmp_path, metric):
    images = torch.zeros(100, 3, 4, 4, dtype=torch.uint8)
    data = Damaged("holes", images, None, num_classes=0, flip=False)
    with pytest.raises(DataError, match="holes: image 33 has a value that is NaN"):
        run(dataclasses.replace(PLAN, metrics=(metric,)), tmp_path, data=data)


def network(**change):
    fields = {"name": "net", "weights_hash": "", "dim": 3, "classes": 0, "frechet": "fd_net"}
    return ImageNetwork(
        **fields, net=lambda x: (x.float().mean((2, 3)),), device=torch.device("cpu"), **change
    )


def test_grey_images_become_rgb_and_others_are_refused():
    grey = torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8)
    features = network()(grey).features
    assert torch.equal(features, grey.float().mean((2, 3)).expand(-1, 3))
    assert torch.equal(network()(grey.expand(-1, 3, -1, -1)).features, features)
    with pytest.raises(DataError, match="uint8 accepted: set evaluation.quantisation=truncate"):
        network()(grey.float())
    for wrong in (grey[0], grey.expand(-1, 2, -1, -1)):
        with pytest.raises(DataError, match="grey or RGB"):
            network()(wrong)


def test_extractors_of_metrics_by_name():
    assert features_of(ALL, None) == features_of(ALL, "Pixels") == Pixels()
    with pytest.raises(ConfigError, match="'Pixel' given, did you mean 'Pixels'"):
        features_of(ALL, "Pixel")
    with pytest.raises(ConfigError, match="none is measured on features"):
        features_of((EnergyDistance(),), None)
