"""Inception through torch-fidelity, for real: with random weights in its file format.

The published weights need a download, so the numbers mean nothing here, but every line that a
real evaluation runs through is run.
"""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation_fakes import GaussianMap, PictureModel
from fastflow.data.dataset import Table
from fastflow.distributed import World
from fastflow.errors import DataError
from fastflow.evaluation import extractors
from fastflow.evaluation.evaluate import evaluate
from fastflow.evaluation.extractors import InceptionV3, load_inception
from fastflow.evaluation.metrics import FID
from fastflow.evaluation.spec import Evaluation

CPU = torch.device("cpu")


@pytest.fixture
def weights(inception_weights: Path) -> Path:
    return inception_weights


@pytest.mark.slow  # eigenvalues of 2048 x 2048 matrices, four times
def test_fid_of_pictures(weights, tmp_path):
    """Small pictures through the whole evaluation: equal ones have no distance, others have."""
    levels = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    data = Table("pictures", levels.to(torch.uint8), None, num_classes=0, flip=False)
    evaluation = Evaluation(
        metrics=(FID(extractor=InceptionV3(weights=str(weights))),),
        samples=6,
        steps=(1,),
        batch_size=4,
    )
    values = []
    for change in (lambda x: x, lambda x: x / 2):
        model = PictureModel(GaussianMap(), shape=(3, 32, 32), pictures=data, change=change)
        (row,) = evaluate(model, evaluation, data, World(), cache=tmp_path)
        values.append(row.value)
        assert row.extractor == "inception-v3 with other weights, 2048"
        assert len(row.extractor_hash) == 64
        assert row.quantisation == "truncate"
    assert values[0] < 1e-6
    assert values[1] > 10 * values[0]


def test_grey_pictures_become_rgb_and_batches_do_not_matter(weights):
    extractor = InceptionV3(weights=str(weights)).build(CPU)
    grey = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    features = extractor(grey)
    assert features.shape == (3, extractor.dim)
    assert features.std() > 1e-4
    torch.testing.assert_close(extractor(grey[1:2]), features[1:2], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(extractor(grey[:1].expand(-1, 3, -1, -1)), features[:1])
    for wrong in (grey.float(), grey[0], grey.expand(-1, 2, -1, -1)):
        with pytest.raises(DataError, match="uint8"):
            extractor(wrong)


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_runs_code_is_refused(tmp_path, legacy):
    trace = tmp_path / "was here"
    path = tmp_path / "evil.pth"
    if legacy:
        path.write_bytes(pickle.dumps({"w": Evil(trace)}, protocol=2))
    else:
        torch.save({"w": torch.zeros(1), "x": Evil(trace)}, path)
    with pytest.raises(DataError, match="refused"):
        InceptionV3(weights=str(path)).build(CPU)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, "does not fit"),
        ([torch.zeros(1)], "no dictionary"),
        ({"w": 3}, "no dictionary"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, text):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(DataError, match=text):
        load_inception(tmp_path / "w.pth")


def test_damaged_files_are_refused(tmp_path, weights):
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "empty.pth").write_bytes(b"")
    np.savez(tmp_path / "other.pth.npz", a=np.zeros(3))
    for name in ("cut.pth", "empty.pth", "other.pth.npz"):
        with pytest.raises(DataError, match="refused"):
            load_inception(tmp_path / name)


def test_missing_weights_name_the_ways_to_provide_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(DataError) as caught:
        InceptionV3().build(CPU)
    for part in ("no network", extractors.INCEPTION_URL, str(tmp_path), "weights=FILE"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="no file /nowhere"):
        InceptionV3(weights="/nowhere").build(CPU)


def test_weights_in_the_cache_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir()
    cached.write_bytes(b"x")
    assert extractors.inception_weights(None) == cached
