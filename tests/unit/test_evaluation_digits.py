"""The digits FID: its classifier, its quantisation and its yardstick, the halves of the data."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evaluation_fakes import GaussianMap, PictureModel
from fastflow.data.dataset import Table
from fastflow.data.digits import Digits
from fastflow.distributed import World
from fastflow.errors import DataError
from fastflow.evaluation.digits_features import (
    WEIGHTS,
    DigitFeatureNet,
    load_classifier,
    quantise_levels,
)
from fastflow.evaluation.evaluate import evaluate
from fastflow.evaluation.extractors import DigitFeatures, quantise
from fastflow.evaluation.metrics import FID, RealHalves, stratified_half
from fastflow.evaluation.spec import Evaluation

SCRIPT = Path(__file__).parents[2] / "tools" / "train_digit_classifier.py"
DIGITS = Digits()
IMAGES, LABELS = DIGITS.fetch(torch.arange(len(DIGITS)))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_digit_classifier", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_classifier_reads_digits_it_was_not_trained_on(script):
    images, labels = script.load_digits()
    assert torch.equal(images.float(), IMAGES)
    training, held_out = script.split(labels)
    assert not set(training.tolist()) & set(held_out.tolist())
    assert len(training) + len(held_out) == 1797
    net = load_classifier()
    assert script.accuracy(net, images[held_out], labels[held_out]) >= 0.97
    assert script.accuracy(net, images[training], labels[training]) >= 0.99


def test_the_weights_are_small():
    assert WEIGHTS.stat().st_size < 300_000


@pytest.mark.slow
def test_the_script_makes_the_weights_that_are_kept(script):
    images, labels = script.load_digits()
    training, _ = script.split(labels)
    made = script.train(images[training], labels[training]).state_dict()
    kept = load_file(WEIGHTS)
    assert made.keys() == kept.keys()
    for name, value in made.items():
        torch.testing.assert_close(value, kept[name], rtol=1e-4, atol=1e-5)


def test_levels():
    assert torch.equal(quantise_levels(IMAGES), IMAGES)
    levels = quantise_levels(torch.linspace(-1.5, 1.5, 1001)).unique()
    assert torch.equal(levels, torch.arange(17) / 8 - 1)
    assert quantise_levels(torch.tensor([0.06, 0.065])).tolist() == [0.0, 0.125]


def test_features_are_the_same_from_bytes_and_floats():
    net = DigitFeatureNet()
    features, logits = net(IMAGES[:50])
    assert features.shape == (50, net.dim) == (50, 64)
    assert features.dtype == logits.dtype == net.dtype == torch.float64
    assert (logits.argmax(1) == LABELS[:50]).all()
    for rule in ("truncate", "floor"):  # both are finer than the 17 levels
        torch.testing.assert_close(net(quantise(IMAGES[:50], rule)).features, features)
    torch.testing.assert_close(net(IMAGES[10:11]).features, features[10:11], rtol=1e-12, atol=1e-12)
    with pytest.raises(DataError, match="InceptionV3"):
        net(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("number", range(4))
def test_halves_are_stratified(number):
    first = stratified_half(LABELS, number)
    assert abs(2 * int(first.sum()) - 1797) == 1
    for digit in range(10):
        of_digit = digit == LABELS
        assert abs(2 * int(of_digit[first].sum()) - int(of_digit.sum())) <= 1
    assert torch.equal(first, stratified_half(LABELS, number))
    assert not torch.equal(first, stratified_half(LABELS, number + 1))


def measured(change, samples, folder, data=DIGITS):
    model = PictureModel(GaussianMap(), shape=(1, 8, 8), pictures=data, change=change)
    metric = FID(extractor=DigitFeatures(), baseline=RealHalves())
    evaluation = Evaluation(metrics=(metric,), samples=samples, steps=(1,), batch_size=1000)
    return {r.metric: r for r in evaluate(model, evaluation, data, World(), cache=folder)}


def test_fid_against_the_halves(tmp_path):
    rows = measured(lambda x: x, 1797, tmp_path)
    fid, half = rows["fid"], rows["fid_half"]
    assert fid.value < 1e-6
    assert half.samples == 898
    assert half.label == "FID half-898"
    assert 1.5 < fid.baseline < 4.5
    assert fid.baseline_name == half.baseline_name == "FID between halves of the real data"
    assert math.isclose(half.ratio, half.value / half.baseline)
    # The data in its stored order, cut in the middle: other writers, so not zero but no disaster.
    assert 0.1 < half.value < 10 * half.baseline

    generator = torch.Generator().manual_seed(0)
    low, high = (
        measured(lambda x, s=s: x + s * torch.randn(x.shape, generator=generator), 1797, tmp_path)
        for s in (0.1, 0.4)
    )
    assert fid.value < low["fid"].value < fid.baseline < high["fid"].value


def test_too_few_samples_for_a_half_give_no_such_row(tmp_path):
    data = Table("some", IMAGES[:201], LABELS[:201], num_classes=10, flip=False)
    assert list(measured(lambda x: x, 99, tmp_path, data)) == ["fid"]
    assert set(measured(lambda x: x, 100, tmp_path, data)) == {"fid", "fid_half"}
