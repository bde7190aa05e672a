"""Samples in files are what other readers of these formats find there."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fastflow.data.edm_zip import ImageZip
from fastflow.errors import ConfigError
from fastflow.evaluation.extractors import quantise
from fastflow.evaluation.interface import Samples
from fastflow.sample_files import check_target, write_samples


def samples(shape=(3, 4, 5), labels=True, first=998, count=5):
    """In batches of two; the seeds pass a thousand, where folders change."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(count, *shape, generator=draw) * 0.6
    classes = torch.arange(count) % 3 if labels else None
    return x, [
        Samples(
            x=x[start : start + 2],
            indices=range(start, min(start + 2, count)),
            seeds=range(first + start, first + min(start + 2, count)),
            labels=None if classes is None else classes[start : start + 2],
            times=(),
        )
        for start in range(0, count, 2)
    ]


def write(path, shape=(3, 4, 5), labels=True, rule="truncate"):
    x, batches = samples(shape, labels)
    about = {"steps": 1}
    write_samples(path, iter(batches), shape=shape, count=len(x), rule=rule, about=about)
    return x


@pytest.mark.parametrize("rule", ["truncate", "floor"])
def test_npz_is_as_adm_writes_it(rule, tmp_path):
    x = write(tmp_path / "new" / "a.npz", rule=rule)
    with np.load(tmp_path / "new" / "a.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.dtype == np.uint8
    assert images.shape == (5, 4, 5, 3)
    assert np.array_equal(images.transpose(0, 3, 1, 2), quantise(x, rule).numpy())
    assert (labels.dtype, labels.tolist()) == (np.int64, [0, 1, 2, 0, 1])
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.npz"]


def test_npz_without_classes_has_no_labels(tmp_path):
    write(tmp_path / "a.npz", labels=False)
    assert np.load(tmp_path / "a.npz").files == ["arr_0"]


@pytest.mark.parametrize("name", ["a.zip", "folder"])
@pytest.mark.parametrize("channels", [1, 3])
def test_zip_and_folder_are_datasets(name, channels, tmp_path):
    if name == "folder":
        (tmp_path / name).mkdir()  # an empty one may be there
    x = write(tmp_path / name, (channels, 4, 5))
    data = ImageZip(str(tmp_path / name))
    assert data.members[1:3] == ("00000/img00000999.png", "00001/img00001000.png")
    assert torch.equal(data.read(torch.arange(5)), quantise(x, "truncate"))
    assert data.labels.tolist() == [0, 1, 2, 0, 1]


def test_zip_without_classes(tmp_path):
    write(tmp_path / "a.zip", labels=False)
    assert len(ImageZip(str(tmp_path / "a.zip"), labels=False)) == 5


def test_numbers_are_as_sampled(tmp_path):
    x = write(tmp_path / "a.safetensors", shape=(7,))
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("x"), x)
        assert file.get_tensor("seeds").tolist() == list(range(998, 1003))
        assert file.get_tensor("labels").tolist() == [0, 1, 2, 0, 1]
        assert json.loads(file.metadata()["fastflow_samples"]) == {"steps": 1}


@pytest.mark.parametrize("name", ["a.npz", "a.zip", "folder"])
def test_what_fails_leaves_what_was_there(name, tmp_path):
    def broken():
        yield samples()[1][0]
        raise OSError("the batch is gone")

    if name != "folder":
        (tmp_path / name).write_text("before")
    with pytest.raises(OSError, match="gone"):
        write_samples(
            tmp_path / name, broken(), shape=(3, 4, 5), count=5, rule="truncate", about={}
        )
    assert [file.name for file in tmp_path.iterdir()] == ([name] if name != "folder" else [])
    assert name == "folder" or (tmp_path / name).read_text() == "before"


@pytest.mark.parametrize(
    ("name", "shape", "count", "text"),
    [
        ("a.gif", (3, 8, 8), 5, ".png, .npz, .zip or .safetensors file, or a folder"),
        ("a.png", (4, 8, 8), 5, "(4, 8, 8); pictures are of images of 1 or 3 channels"),
        ("a.png", (3, 8, 8), 4097, "4,097 samples, accepted in a picture: up to 4,096"),
        ("a.npz", (2,), 5, "samples of shape (2,)"),
        ("a.zip", (4, 8, 8), 5, "give a .safetensors file"),
        ("full", (3, 8, 8), 5, "is a folder that is there already"),
        ("full.npz", (3, 8, 8), 5, "is a folder that is there already"),
    ],
)
def test_what_cannot_be_written_is_refused_before(name, shape, count, text, tmp_path):
    for folder in ("full", "full.npz"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "something").touch()
    with pytest.raises(ConfigError, match=re.escape(text)):
        check_target(tmp_path / name, shape, count)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("a.png", (2,)), ("a.png", (1, 8, 8)), ("a.npz", (3, 8, 8)), ("a.safetensors", (4, 2, 2))],
)
def test_what_can_be_written_is_accepted(name, shape, tmp_path):
    check_target(tmp_path / name, shape, 4096)
