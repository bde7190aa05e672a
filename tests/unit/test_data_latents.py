"""Latents in the layout of EDM2's dataset tool."""

import io
import json

import numpy as np
import pytest
import torch

from data_files import write_zip
from fastflow.data.latents import LatentZip
from fastflow.errors import ConfigError, DataError

RANDOM = np.random.RandomState(0)
MEAN = RANDOM.randn(5, 4, 8, 8).astype(np.float32)
STD = RANDOM.rand(5, 4, 8, 8).astype(np.float32)
NAMES = [f"00000/img-mean-std-{i:08d}.npy" for i in range(5)]


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def written(path, arrays):
    members = {name: npy(array) for name, array in zip(NAMES, arrays, strict=False)}
    labels = [[name, i % 3] for i, name in enumerate(members)]
    members["dataset.json"] = json.dumps({"labels": labels}).encode()
    return str(write_zip(path, members))


@pytest.mark.parametrize("name", ["latents.zip", "latents"])
def test_a_sample_of_each_distribution_the_same_at_every_visit(tmp_path, name):
    path = written(tmp_path / name, np.concatenate([MEAN, STD], 1))
    data = LatentZip(path)
    rows = torch.tensor([4, 0, 4])
    x, labels = data.fetch(rows)
    assert (len(data), data.shape, data.num_classes, data.flip) == (5, (4, 8, 8), 3, False)
    assert (x.dtype, x.shape, labels.tolist()) == (torch.float32, (3, 4, 8, 8), [1, 0, 1])
    assert torch.equal(x[0], x[2])
    assert torch.equal(x, LatentZip(path).fetch(rows)[0])
    noise = (x.numpy() / 0.18215 - MEAN[[4, 0, 4]]) / STD[[4, 0, 4]]
    assert abs(noise[:2].mean()) < 0.1
    assert 0.9 < noise[:2].std() < 1.1
    assert not np.allclose(noise[0], noise[1], atol=0.1)


def test_without_spread_the_mean_is_the_latent(tmp_path):
    path = written(tmp_path / "a.zip", np.concatenate([MEAN, 0 * STD], 1))
    x, _ = LatentZip(path, scale=0.5).fetch(torch.arange(5))
    assert torch.equal(x, torch.from_numpy(MEAN) * 0.5)


def test_latents_are_taken_as_they_are(tmp_path):
    path = written(tmp_path / "a.zip", MEAN.astype(np.float16))
    x, labels = LatentZip(path, labels=False, scale=1.0).fetch(torch.arange(5))
    assert torch.equal(x, torch.from_numpy(MEAN.astype(np.float16)).float())
    assert labels is None


def test_the_fingerprint_tells_the_scale(tmp_path):
    path = written(tmp_path / "a.zip", MEAN)
    marks = {LatentZip(path, scale=scale).fingerprint() for scale in (0.5, 1.0, 1.0)}
    assert len(marks) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(MEAN[0, :3]), r"is float32 of shape \(3, 8, 8\), accepted: floats of \(4, H, W\)"),
        (npy(MEAN[0].astype(np.int32)), "is int32 of shape"),
        (npy(MEAN[0] * np.nan), "has a value that is NaN or infinite"),
        (npy(np.array([{}], dtype=object)), "is unreadable"),
        (b"no array", "is unreadable"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = write_zip(tmp_path / "a.zip", {"a.npy": content})
    with pytest.raises(DataError, match=rf"a\.zip: a\.npy {message}"):
        LatentZip(str(path), labels=False)


def test_a_file_of_another_shape_is_named(tmp_path):
    path = written(tmp_path / "a.zip", [MEAN[0], MEAN[1, :, :4]])
    with pytest.raises(DataError, match="img-mean-std-00000001.npy has shape"):
        LatentZip(path).fetch(torch.tensor([1]))


def test_wrong_arguments_and_an_empty_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"scale=0 given"):
        LatentZip("a.zip", scale=0)
    with pytest.raises(ConfigError, match=r"channels=0"):
        LatentZip("a.zip", channels=0)
    with pytest.raises(DataError, match=r"accepted: \.npy"):
        LatentZip(str(write_zip(tmp_path / "a.zip", {"a.png": b""})))
