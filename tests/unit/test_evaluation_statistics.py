import numpy as np
import pytest
import torch

from evaluation_fakes import together
from fastflow.errors import DataError
from fastflow.evaluation.statistics import FeatureStatistics, Moments, load_moments, save_moments

FEATURES = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def some_moments():
    statistics = FeatureStatistics(4)
    statistics.update(FEATURES)
    return statistics.moments({"dataset": "digits"})


def test_safetensors_keep_everything(tmp_path):
    path = tmp_path / "deep" / "stats.safetensors"
    save_moments(some_moments(), path)
    back = load_moments(path)
    assert torch.equal(back.mean, some_moments().mean)
    assert torch.equal(back.cov, some_moments().cov)
    assert (back.count, dict(back.info)) == (30, {"dataset": "digits"})
    assert [p.name for p in path.parent.iterdir()] == ["stats.safetensors"]


def test_npz_is_edms_format(tmp_path):
    save_moments(some_moments(), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        assert sorted(file) == ["mu", "sigma"]
        assert file["sigma"].dtype == np.float64
    np.savez(tmp_path / "b.npz", mu=FEATURES.mean(0), sigma=np.cov(FEATURES.T))
    back = load_moments(tmp_path / "b.npz")
    torch.testing.assert_close(back.cov, some_moments().cov, rtol=1e-12, atol=1e-13)
    assert back.count is None


def test_processes_add_up():
    def share(world):
        statistics = FeatureStatistics(4)
        statistics.update(FEATURES[world.rank :: world.size])
        return statistics.reduced(world).moments()

    for found in together(3, share):
        assert found.count == 30
        torch.testing.assert_close(found.cov, some_moments().cov, rtol=1e-13, atol=1e-14)


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/never", "w"))


@pytest.mark.parametrize(
    ("name", "write", "text"),
    [
        ("a.npz", lambda p: p.write_bytes(b"PK\x03\x04 no"), "unreadable"),
        ("b.npz", lambda p: np.savez(p, mu=np.zeros(3)), "sigma"),
        ("c.npz", lambda p: np.savez(p, mu=np.zeros(3), sigma=np.eye(2)), r"\[D\] and \[D, D\]"),
        ("d.npz", lambda p: np.savez(p, mu=np.full(2, np.nan), sigma=np.eye(2)), "NaN"),
        ("e.npz", lambda p: np.savez(p, mu=np.array([Evil()]), sigma=np.eye(1)), "pickle"),
        ("f.safetensors", lambda p: p.write_bytes(b"xx"), "unreadable"),
        ("g.npz", lambda p: None, "no file"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, write, text):
    write(tmp_path / name)
    with pytest.raises(DataError, match=text):
        load_moments(tmp_path / name)


def test_moments_of_another_dtype_are_float64(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(2, np.float32), sigma=np.eye(2, dtype=np.float32))
    assert load_moments(tmp_path / "a.npz").cov.dtype == torch.float64
    assert Moments(torch.zeros(5), torch.eye(5)).dim == 5
