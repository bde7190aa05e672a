"""`fastflow evaluate --reference`: statistics from a dataset to a file, and from there to a FID."""

import dataclasses

import numpy as np
import pytest

from fastflow import cli
from fastflow.config import save_yaml
from fastflow.download import sha256_of
from fastflow.evaluation.extractors import DigitFeatures
from fastflow.evaluation.metrics import FID
from fastflow.evaluation.results import read
from fastflow.evaluation.spec import Evaluation
from fastflow.evaluation.statistics import load_moments
from tiny import digits, drivers, toy, train

PLAN = Evaluation(
    metrics=(FID(extractor=DigitFeatures()),), samples=70, steps=(1,), quantisation="none"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFLOW_DATA", str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path):
    save_yaml(dataclasses.replace(digits(), evaluation=PLAN), tmp_path / "config.yaml")
    return tmp_path / "config.yaml"


@pytest.fixture
def call(capsys):
    def run(*words):
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def test_from_a_dataset_to_a_fid(call, config, tmp_path):
    """A run measured against the file has the FID that it has against its dataset."""
    run, out = tmp_path / "run", tmp_path / "deep" / "digits.safetensors"
    experiment = digits(steps=1, callbacks=drivers())
    train(dataclasses.replace(experiment, evaluation=PLAN), run)
    status, said, err = call("evaluate", config, "--reference", out)
    assert (status, err.splitlines()[-1].partition(", ")[0]) == (
        0,
        "features of digits: 1,797 of 1,797 samples",
    )
    assert "64 features (digit-classifier-64, 17 levels) of 1,797 images (digits, 1x8x8" in said
    assert said.endswith(f"{out}, sha256 {sha256_of(out)}\n")
    assert load_moments(out).count == 1797

    key = "evaluation.metrics.0.reference"
    assert call("evaluate", run)[0] == 0
    assert call("evaluate", run, f"{key}={out}")[0] == 0
    plain, other = read(run / "results.json")
    assert plain.value == pytest.approx(other.value, rel=1e-9)
    assert {plain.reference, other.reference} == {
        "digits, all 1797",
        "digits.safetensors (digits, all 1797)",
    }
    assert sha256_of(out) in (plain.reference_hash, other.reference_hash)

    status, _, err = call("evaluate", run, f"{key}={out}", "evaluation.quantisation=truncate")
    assert status == 2
    assert "is of images quantised to none, this evaluation needs images quantised to uint8" in err
    assert "'fastflow evaluate CONFIG --reference FILE'" in err

    # The data of a run; EDM's format.
    assert call("evaluate", run, "--reference", tmp_path / "edm.npz")[0] == 0
    with np.load(tmp_path / "edm.npz") as file:
        np.testing.assert_array_equal(file["mu"], load_moments(out).mean)


def test_overrides_choose_data_and_quantisation(call, config, tmp_path):
    out = tmp_path / "half.safetensors"
    words = ("evaluation.quantisation=truncate", "data.split=first_half")
    assert call("evaluate", config, "--reference", out, *words)[0] == 0
    info = load_moments(out).info
    assert (info["quantisation"], info["dataset"]) == ("uint8", "digits (first half)")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("{config} --reference x.pkl", "'x.pkl' given, accepted: a .safetensors or .npz file"),
        ("{config} --reference {config}.npz --extractor DINOv2", "extractor: 'DINOv2' given, "),
        ("{config} --reference {there}", "is there already; name another file"),
        ("{config} --reference a.npz --weights student", "it samples nothing"),
        ("{config} --reference a.npz --keep-samples", "it samples nothing"),
        ("{config} --extractor DigitFeatures", "--extractor: given without --reference"),
        ("{config}x --reference a.npz", "config.yamlx"),
        ("{toy} --reference a.npz", "evaluation.metrics: none is measured on features"),
        ("{config} --reference a.npz nothing=3", "nothing: "),
        (
            "{config} --reference a.npz "
            "evaluation.metrics.0.extractor=fastflow.evaluation.extractors:InceptionV4",
            "has no class 'InceptionV4'; did you mean 'InceptionV3'",
        ),
        (
            "{config} --reference a.npz "
            "evaluation.metrics.0.extractor=fastflow.evaluation.extractors:InceptionV3 "
            "evaluation.metrics.0.extractor.weights=/nowhere",
            "inception-v3 weights: no file /nowhere; download https://github.com/toshas",
        ),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    call, config, tmp_path, monkeypatch, words, text
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.npz").touch()
    save_yaml(toy(), tmp_path / "toy.yaml")
    before = sorted(tmp_path.iterdir())
    places = {"config": config, "there": tmp_path / "there.npz", "toy": tmp_path / "toy.yaml"}
    status, out, err = call("evaluate", *words.format(**places).split())
    assert (status, out) == (2, "")
    assert text in err
    assert sorted(tmp_path.iterdir()) == before
