"""Reference statistics: EDM's convention, provenance, refusal of those of something else."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from evaluation_fakes import GaussianMap, PictureModel, Pixels, pictures, together
from fastflow.data.dataset import Table
from fastflow.distributed import World
from fastflow.errors import DataError
from fastflow.evaluation.evaluate import evaluate
from fastflow.evaluation.metrics import FID
from fastflow.evaluation.reference import dataset_moments
from fastflow.evaluation.spec import Evaluation
from fastflow.evaluation.statistics import load_moments, save_moments

CPU = torch.device("cpu")
DATA = pictures(600)  # three batches
EXTRACTOR = Pixels().build(CPU)


def built(data=DATA, rule="truncate", world=None, extractor=EXTRACTOR):
    return dataset_moments(extractor, data, rule, world or World())


def test_statistics_are_of_all_images_as_stored():
    """EDM's fid.py: mean and unbiased covariance of every image's features, none mirrored."""
    found = built()
    x = DATA.fetch(torch.arange(600))[0].flatten(1).double()
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.cov, np.cov(x.T), rtol=1e-5, atol=1e-6)
    assert found.count == 600
    mirrored = Table("noise", DATA.fetch(torch.arange(600))[0], None, num_classes=0, flip=True)
    torch.testing.assert_close(built(mirrored).mean, found.mean)


def test_real_images_are_their_nearest_bytes():
    """Also those between two bytes where generated ones are rounded down."""
    levels = torch.linspace(-1, 1, 101).repeat_interleave(48).view(101, 3, 4, 4)
    data = Table("levels", levels, None, num_classes=0, flip=False)
    nearest = (levels.flatten(1) * 127.5 + 127.5).round() / 127.5 - 1
    for rule in ("truncate", "floor"):
        expected = nearest.double().mean(0)
        torch.testing.assert_close(built(data, rule).mean, expected, rtol=0, atol=5e-4)


def test_any_number_of_processes_builds_the_same():
    alone, told = built(), []
    for found in together(4, lambda world: built(world=world)):  # one of them has no batch
        torch.testing.assert_close(found.cov, alone.cov, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.mean, alone.mean, rtol=0, atol=1e-12)
        assert (found.count, found.info) == (alone.count, alone.info)
    dataset_moments(EXTRACTOR, DATA, "truncate", World(), told.append)
    assert told == [256, 512, 600]


def test_files_tell_their_origin(tmp_path):
    save_moments(built(), tmp_path / "ref.safetensors")
    info = load_moments(tmp_path / "ref.safetensors").info
    made_by = info.pop("made_by")
    assert made_by.startswith("fastflow ")
    assert info == {
        "dataset": "noise",
        "fingerprint": DATA.fingerprint(),
        "shape": "3x4x4",
        "images": "all, as stored, not mirrored",
        "quantisation": "uint8",
        "extractor": "pixels 4",
        "extractor_hash": "none",
    }


def measured(path, data=DATA, shape=None, **change):
    metric = FID(extractor=Pixels(), reference=str(path))
    plan = Evaluation(metrics=(metric,), samples=60, steps=(1,))
    model = PictureModel(GaussianMap(), shape=shape or data.shape, pictures=data)
    (row,) = evaluate(model, dataclasses.replace(plan, **change), data, World())
    return row


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_rows_name_file_and_origin(tmp_path, suffix):
    path = tmp_path / f"ref.{suffix}"
    save_moments(built(), path)
    row = measured(path)
    origin = "noise, all 600" if suffix == "safetensors" else "provenance unknown"
    assert row.reference == f"ref.{suffix} ({origin})"
    metric = FID(extractor=Pixels())
    model = PictureModel(GaussianMap(), shape=DATA.shape, pictures=DATA)
    plan = Evaluation(metrics=(metric,), samples=60, steps=(1,))
    (own,) = evaluate(model, plan, DATA, World(), cache=tmp_path / "cache")
    assert math.isclose(row.value, own.value, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: built(pictures(50, name="cifar10")),
            "is of the dataset 'cifar10', this evaluation needs the dataset 'noise'",
        ),
        (
            lambda: built(rule="none", extractor=Floats()),
            "is of images quantised to none, this evaluation needs images quantised to uint8",
        ),
        (
            lambda: built(extractor=Pixels(weights="others").build(CPU)),
            "features by weights of SHA-256 others, this evaluation needs .* none",
        ),
        (lambda: named("inception"), "is of features of inception, .* features of pixels 4"),
        (lambda: resized(), "is of images of 3x64x64, this evaluation needs images of 3x4x4"),
        (
            lambda: built(pictures(50, side=2), extractor=Pixels(side=2).build(CPU)),
            "is of 12 features, but pixels 4 has 48",
        ),
    ],
)
def test_statistics_of_something_else_are_refused(tmp_path, make, text):
    save_moments(make(), tmp_path / "ref.safetensors")
    with pytest.raises(DataError, match=text):
        measured(tmp_path / "ref.safetensors")


class Floats:
    """The extractor, fed with floats."""

    def __getattr__(self, name):
        return getattr(EXTRACTOR, name)

    def __call__(self, images):
        return EXTRACTOR((images * 127.5 + 128).to(torch.uint8))


def named(name):
    moments = built()
    return dataclasses.replace(moments, info={**moments.info, "extractor": name})


def resized():
    moments = built()
    return dataclasses.replace(moments, info={**moments.info, "shape": "3x64x64"})


def test_renamed_data_are_the_same_data(tmp_path):
    save_moments(built(), tmp_path / "ref.safetensors")
    renamed = pictures(600, name="img4")
    assert renamed.fingerprint() == DATA.fingerprint()
    assert measured(tmp_path / "ref.safetensors", renamed).reference.endswith("(noise, all 600)")


def test_missing_statistics_are_named(tmp_path):
    with pytest.raises(DataError, match=f"no file {tmp_path}/none.npz; accepted: an .npz with mu"):
        measured(tmp_path / "none.npz")
