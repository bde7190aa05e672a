"""The headline command on a small CIFAR-10 archive in the original format, from end to end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data_files import write_cifar10_python
from fastflow import cli
from fastflow.evaluation.extractors import Extracted, InceptionV3
from fastflow.evaluation.results import read

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "experiments" / "EDM" / "config_cm_cifar10.py"
SMALL = (
    "init_from=null",
    *("network.model.channels=16", "network.model.num_blocks=1", "batch_size=8", "steps=6"),
    *("callbacks.8.every=1", "callbacks.9.every=100", "callbacks.9.count=4"),
    "callbacks.10.every=2",
)


def command(*words: object) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), "--config", str(CONFIG), *map(str, words)]


def environment(**changes: object) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in changes.items()}}


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return write_cifar10_python(tmp_path_factory.mktemp("data") / "cifar-10-python.tar.gz", 50)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, archive):
    """Interrupted by SIGINT after a step or two, and gone on by the same command."""
    folder = tmp_path_factory.mktemp("headline")
    words = command(*SMALL, f"data.path={archive}")
    process = subprocess.Popen(
        words,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = folder / "runs" / "cm_cifar10" / "log.jsonl"
    while not log.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    first = process.communicate(timeout=200)
    assert process.returncode == 130, first
    second = subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert second.returncode == 0, second
    return folder / "runs" / "cm_cifar10", first, (second.stdout, second.stderr)


def test_it_trains_is_interrupted_and_resumes_to_the_bit(trained, archive, tmp_path, capsys):
    run, (out, err), (out2, _) = trained
    assert "stopping after this step" in err
    assert "stopped by SIGINT after step" in out
    assert "resumed at step" in " ".join(out2.split())
    assert "trained 6 steps" in out2
    assert "50 samples of 3x32x32, 10 classes" in " ".join(out.split())
    straight = ("--run-dir", tmp_path / "straight", *SMALL, f"data.path={archive}")
    assert cli.main(["train", "--config", str(CONFIG), *map(str, straight)]) == 0
    files = sorted(path.name for path in (run / "weights").glob("*.safetensors"))
    emas = ["ema_0.9996", "ema_0.9999", "ema_0.99995"]
    assert files == [f"{name}.safetensors" for name in (*emas, "student")]
    for name in files:
        ours, theirs = (load_file(p / "weights" / name) for p in (run, tmp_path / "straight"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (run / "samples" / "step_00000006.png").exists()
    assert len(list((run / "checkpoints").glob("step_*"))) <= 4


def test_it_samples(trained, tmp_path, capsys):
    out = tmp_path / "samples.png"
    assert cli.main(["sample", str(trained[0]), "--steps=2", "--seeds=0-3", f"--out={out}"]) == 0
    assert "4 samples, NFE 2, t = 80, 0.821" in capsys.readouterr().out
    assert np.asarray(Image.open(out)).std() > 0


class Patches:
    """Stands in for Inception: means over patches of 8x8."""

    name, weights_hash, dim, quantisation = "patch means", "0" * 64, 48, ""
    dtype, classes, frechet = torch.float64, 0, "fid"

    def require(self, shape):
        assert shape == (3, 32, 32)

    def __call__(self, images):
        assert images.dtype == torch.uint8
        return Extracted(torch.nn.functional.avg_pool2d(images.double(), 8).flatten(1))


EVALUATE = ("evaluation.samples=64", "evaluation.steps=[1,2]", "evaluation.blocks=2")


def test_it_evaluates(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTFLOW_DATA", str(tmp_path))
    monkeypatch.setattr(InceptionV3, "build", lambda self, device: Patches())
    assert cli.main(["evaluate", str(trained[0]), *EVALUATE]) == 0
    rows = read(trained[0] / "results.json")
    assert [(r.metric, r.steps, r.nfe, r.blocks, r.weights) for r in rows] == [
        ("fid", 1, 1, 2, "ema_0.9999"),
        ("fid", 2, 2, 2, "ema_0.9999"),
    ]
    assert rows[1].times == (80.0, 0.821)
    assert (rows[0].step, rows[0].images, rows[0].extractor) == (6, 48, "patch means")
    assert cli.main(["compare", str(trained[0].parent)]) == 0
    out = capsys.readouterr().out
    for part in ("cm_cifar10: CM on cifar10, ema_0.9999", "2.92", "3.60", "2.11", "FID-64"):
        assert part in out


@pytest.mark.slow  # eigenvalues of 2048 x 2048 matrices
def test_it_evaluates_with_inception(trained, inception_weights, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFLOW_DATA", str(tmp_path))
    extractor = (
        f"{{_target_: fastflow.evaluation.extractors:InceptionV3, weights: {inception_weights}}}"
    )
    metric = "{_target_: fastflow.evaluation.metrics:FID, extractor: " + extractor + "}"
    metric = f"evaluation.metrics=[{metric}]"
    few = ("evaluation.samples=8", "evaluation.steps=[1]", "evaluation.blocks=1")
    assert cli.main(["evaluate", str(trained[0]), metric, *few]) == 0
    rows = read(trained[0] / "results.json")
    found = [row for row in rows if row.extractor == "inception-v3 with other weights, 2048"]
    assert [row.samples for row in found] == [8]
    assert found[0].value > 0


def test_without_the_initial_weights_it_says_what_to_do(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTFLOW_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nothing answers
    monkeypatch.setenv("no_proxy", "")
    run_dir = f"--run-dir={tmp_path / 'run'}"
    assert cli.main(["train", "--config", str(CONFIG), run_dir, f"data.path={archive}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    url = "nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl"
    assert line.startswith(f"fastflow: init_from: https://{url}: download to ")
    assert f"a copy from elsewhere belongs at {tmp_path / 'data' / 'weights' / url}" in line
    assert not (tmp_path / "run").exists()


def test_without_data_it_says_what_to_do(tmp_path):
    """No data, and no network: an address of this machine where nothing answers is the proxy."""
    (tmp_path / "empty").mkdir()
    nobody = "http://127.0.0.1:9"
    done = subprocess.run(
        command(),
        cwd=tmp_path,
        env=environment(
            HOME=tmp_path / "empty",
            FASTFLOW_DATA=tmp_path / "empty",
            http_proxy=nobody,
            https_proxy=nobody,
            no_proxy="",
        ),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("fastflow: CIFAR-10 is not in ")
    for part in (
        "three ways",
        "(1) download https://",
        "(2) set FASTFLOW_DATA",
        "(3) set data.path",
    ):
        assert part in line
    assert not (tmp_path / "runs").exists()
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"] == []
