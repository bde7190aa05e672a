"""Inception and the other networks, for real: with random weights in the published file formats.

The published weights need a download, so the numbers mean nothing here, but every line that a
real evaluation runs through is run.
"""

import dataclasses
import hashlib
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation_fakes import measured_by_inception
from fastflow.distributed import World
from fastflow.errors import DataError
from fastflow.evaluation import published
from fastflow.evaluation.dinov2 import DINOv2ViT
from fastflow.evaluation.extractors import VGG16, DINOv2, InceptionV3
from fastflow.torchvision_shim import import_beside_torchvision
from processes import Processes

CPU = torch.device("cpu")


@pytest.fixture
def weights(inception_weights: Path) -> Path:
    return inception_weights


def noise(shape):
    """Weights of a sane scale, as overlapping views of few numbers: small files."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    flat = (shape[0], math.prod(shape[1:]))
    numbers = torch.randn(sum(flat), generator=generator) * (2 / flat[1]) ** 0.5
    if len(shape) == 1:
        return 0.1 * numbers[: shape[0]]
    inner = [math.prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
    return numbers.as_strided(shape, (1, *inner))


def vgg16_shapes():
    module = import_beside_torchvision("torchvision.models", "this test", "eval")
    with torch.device("meta"):
        return {name: value.shape for name, value in module.vgg16().state_dict().items()}


def dinov2_shapes():
    with torch.device("meta"):
        return {name: value.shape for name, value in DINOv2ViT().state_dict().items()}


@pytest.mark.slow  # eigenvalues of 2048 x 2048 matrices, several times
def test_all_metrics_of_pictures(weights, tmp_path):
    """Small pictures through the whole evaluation: equal ones have no distance, others have."""
    same = measured_by_inception(World(), str(weights), str(tmp_path))
    dark = measured_by_inception(World(), str(weights), str(tmp_path), scale=0.5)
    assert list(same) == ["fid", "kid", "inception_score", "precision", "recall"]
    for row in same.values():
        assert row.extractor == "inception-v3 with other weights, 2048"
        assert len(row.extractor_hash) == 64
        assert row.quantisation == "truncate"
        assert row.label.endswith("-6")
    assert same["fid"].value < 1e-6
    assert dark["fid"].value > 10 * same["fid"].value
    assert dark["kid"].value > same["kid"].value
    assert same["precision"].value == same["recall"].value == 1
    assert 1 <= same["inception_score"].value <= 3  # three pictures in each split

    # The same in two processes, which have one and two batches.
    processes = Processes(2)
    try:
        folder = str(tmp_path / "two")
        shared = processes.run(measured_by_inception, str(weights), folder, scale=0.5)
    finally:
        processes.close()
    for rows in shared:
        for name, row in dark.items():
            assert rows[name].value == pytest.approx(row.value, rel=1e-6)


@pytest.mark.slow  # files of 0.5 and 1.2 GB, were their tensors not views of a few numbers
@pytest.mark.parametrize(
    ("features", "network", "dim", "frechet"),
    [(VGG16, vgg16_shapes, 4096, "fd_vgg16"), (DINOv2, dinov2_shapes, 1024, "fd_dinov2")],
)
def test_other_networks_from_files(tmp_path, features, network, dim, frechet):
    torch.save({name: noise(shape) for name, shape in network().items()}, tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").stat().st_size < 10_000_000
    extractor = features(weights=str(tmp_path / "weights.pth")).build(CPU)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = extractor(images)
    assert found.features.shape == (2, dim) == (2, extractor.dim)
    assert found.features.dtype == extractor.dtype
    assert found.features.isfinite().all()
    assert (found.features[0] - found.features[1]).abs().max() > 1e-6
    assert found.logits is None
    assert (extractor.frechet, extractor.classes) == (frechet, 0)
    assert "with other weights" in extractor.name


def test_grey_pictures_become_rgb_and_batches_do_not_matter(weights):
    extractor = InceptionV3(weights=str(weights)).build(CPU)
    grey = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    features, logits = extractor(grey)
    assert features.shape == (3, extractor.dim)
    assert logits.shape == (3, extractor.classes) == (3, 1008)
    assert features.std() > 1e-4
    torch.testing.assert_close(extractor(grey[1:2]).features, features[1:2], rtol=1e-3, atol=1e-5)
    rgb = grey[:1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(extractor(rgb).features, features[:1])


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
@pytest.mark.parametrize("features", [InceptionV3, DINOv2])
def test_other_contents_are_refused(tmp_path, features, content, text):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(DataError, match=text):
        features(weights=str(tmp_path / "w.pth")).build(CPU)


def test_damaged_files_are_refused(tmp_path, weights):
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "empty.pth").write_bytes(b"")
    np.savez(tmp_path / "other.pth.npz", a=np.zeros(3))
    for name in ("cut.pth", "empty.pth", "other.pth.npz"):
        with pytest.raises(DataError, match="refused"):
            published.load_inception(tmp_path / name)


@pytest.mark.parametrize(
    ("features", "network"),
    [
        (InceptionV3, published.INCEPTION_V3),
        (VGG16, published.VGG16),
        (DINOv2, published.DINOV2_L),
    ],
)
def test_missing_weights_name_the_ways_to_provide_them(tmp_path, monkeypatch, features, network):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(remote, folder):
        raise DataError("no network")

    monkeypatch.setattr(published, "download", offline)
    with pytest.raises(DataError) as caught:
        features().build(CPU)
    for part in ("no network", network.weights.url, str(tmp_path), f"{network.part}(weights=FILE)"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="no file /nowhere"):
        features(weights="/nowhere").build(CPU)


def test_weights_in_torchs_cache_are_found_and_compared_with_the_published_ones(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir()
    cached.write_bytes(b"x")
    with pytest.raises(DataError, match="inception-v3 weights: .* expected is 6726825d"):
        published.weights_file(None, published.INCEPTION_V3)
    digest = hashlib.sha256(b"x").hexdigest()
    remote = dataclasses.replace(published.INCEPTION_V3.weights, sha256=digest)
    network = dataclasses.replace(published.INCEPTION_V3, weights=remote)
    assert published.weights_file(None, network) == cached
    assert network.label(digest) == "inception-v3 2015-12-05"
    assert network.label("0" * 64) == "inception-v3 with other weights"
