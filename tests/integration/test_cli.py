"""The command line: overrides, one-line errors, signals, and each command once."""

import dataclasses
import json
import os
import re
import shutil
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

from callbacks.ct_schedule import CTScheduleCallback
from callbacks.jsonl_log import JsonlLog
from fastflow import cli
from fastflow.config import from_plain, lazy, load_experiment, save_yaml, to_yaml
from fastflow.data.edm_zip import ImageZip
from fastflow.evaluation.extractors import quantise
from fastflow.evaluation.results import read
from fastflow.evaluation.sampling import class_labels
from fastflow.model import Model
from fastflow.schedules import RatioStages
from fastflow.trainer import Trainer
from methods.cm import CM
from tiny import OBSERVERS, digits, drivers, toy, train

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs" / "experiments" / "Digits" / "config_cm_digits.py"


@pytest.fixture
def call(capsys):
    """Run a command; returns its status, stdout and the lines of stderr."""

    def run(*words):
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return run


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    save_yaml(toy(), path)
    return path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "tiny_toy"
    train(toy(), path)
    return path


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "tiny_digits"
    train(digits(steps=1, callbacks=drivers()), path)
    return path


# train


def test_train_resume_and_again(call, config, tmp_path):
    where = tmp_path / "run"
    status, out, _ = call("train", "--config", config, "--run-dir", where)
    assert status == 0
    assert f"{where}, new" in out
    assert "trained 6 steps" in out
    assert max(map(len, out.replace(str(where), "runs/tiny").splitlines())) <= 100
    status, out, _ = call("train", "--config", config, "--run-dir", where)
    assert status == 0
    assert "already finished at step 6" in " ".join(out.split())


@pytest.mark.parametrize(
    "words",
    [
        ("steps=2", "seed=3", "--config", "CONFIG", "--run-dir", "RUN"),
        ("--config", "CONFIG", "steps=2", "--run-dir", "RUN", "seed=3"),
        ("--config=CONFIG", "--run-dir=RUN", "seed=3", "steps=2"),
    ],
)
def test_overrides_go_anywhere(words, call, config, tmp_path):
    run = tmp_path / "run"
    words = [w.replace("CONFIG", str(config)).replace("RUN", str(run)) for w in words]
    assert call("train", *words)[0] == 0
    stored = load_experiment(run / "experiment.yaml")
    assert stored == dataclasses.replace(toy(), steps=2, seed=3)


def test_dry_run_prints_the_experiment_and_writes_nothing(call, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = call("train", "--config", config, "--dry-run", "steps=9")
    assert (status, err) == (0, [])
    import yaml

    assert from_plain(yaml.safe_load(out)) == dataclasses.replace(toy(), steps=9)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_default_run_directory_has_the_name(call, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("train", "--config", config, "steps=1")[0] == 0
    assert Model.load(tmp_path / "runs" / "tiny_toy").step == 1


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ["required: COMMAND"]),
        (("trian",), ["'trian'", "train"]),
        (("train",), ["required: --config"]),
        (("train", "--config", "CONFIG", "--run_dir", "x"), ["'--run_dir'", "--help"]),
        (("train", "--conf", "CONFIG"), ["--config"]),
        (("train", "--config", "CONFIG", "stps=3"), ["stps", "'steps'"]),
        (("train", "--config", "CONFIG", "steps"), ["'steps'", "KEY=VALUE"]),
        (("train", "--config", "CONFIG", "steps=x"), ["steps", "'x'", "int"]),
        (("train", "--config", "CONFIG", "--device", "tpu"), ["'tpu'", "auto, cpu, cuda"]),
        (("train", "--config", "CONFIG", "--device", "cuda:99"), ["cuda:99", "CUDA devices"]),
        (("train", "--config", "CONFIG", "--run-dir", "CONFIG"), ["config.yaml cannot be used"]),
        (("train", "--config", "nowhere.py"), ["nowhere.py", "no such file"]),
        (("sample",), ["required: model"]),
        (("sample", "nowhere"), ["nowhere holds no trained model"]),
        (("sample", "RUN", "steps=2"), ["'steps=2'", "the options"]),
        (("sample", "RUN", "--steps", "two"), ["--steps", "'two'"]),
        (("sample", "RUN", "--steps", "0"), ["steps: 0 given"]),
        (("sample", "RUN", "--seeds", "9-3"), ["--seeds", "'9-3' given, accepted: e.g. 7 or 0-63"]),
        (("sample", "RUN", "--seeds", "a"), ["--seeds", "'a' given"]),
        (("sample", "RUN", "--times", "1,x"), ["--times", "'1,x' given"]),
        (("sample", "RUN", "--times", "1.0"), ["times: (1.0,) given for 1 steps"]),
        (("sample", "RUN", "--weights", "emma_0.9"), ["emma_0.9", "'ema_0.9'"]),
        (("sample", "RUN", "--out", "x.gif"), ["--out", ".png, .npz, .zip or .safetensors"]),
        (("sample", "RUN", "--out", "x.npz"), ["--out", "shape (2,)", ".safetensors"]),
        (("sample", "RUN", "--label", "3"), ["label: 3 given", "unconditional"]),
        (("sample", "RUN", "--per-class", "3"), ["--per-class", "without classes"]),
        (("sample", "DIGITS", "--per-class", "0"), ["--per-class", "'0' given"]),
        (("sample", "DIGITS", "--per-class", "3", "--label", "1"), ["--label", "not allowed"]),
        (("sample", "DIGITS", "--labels", "even"), ["--labels", "'even'"]),
        (("sample", "DIGITS", "--label", "10"), ["label: 10 given", "0 to 9"]),
        (("sample", "DIGITS", "--label", "-1"), ["label: -1 given", "0 to 9"]),
        (("evaluate", "RUN", "batch_size=3"), ["'batch_size=3'", "evaluation.KEY=VALUE"]),
        (("evaluate", "RUN", "evaluation.sample=3"), ["evaluation.sample", "'samples'"]),
        (("evaluate", "RUN", "evaluation.labels=even"), ["evaluation.labels", "'even'"]),
        (("bench-sampling",), ["either a model or --config"]),
        (("bench-sampling", "RUN", "--config", "CONFIG"), ["either a model or --config"]),
        (("bench-sampling", "RUN", "--ancestral", "1001"), ["--ancestral", "1 to 1000"]),
        (("compare", "--format", "pdf"), ["'pdf'", "markdown"]),
        (("compare", "--out", "x.pdf"), ["--out", "'x.pdf'", ".html"]),
        (("compare", "--sort", "fid"), ["--sort", "'fid'", "measured"]),
        (("compare", "--method", "CN"), ["--method", "'CN'", "'CM'"]),
        (("compare", "--overview", "--format", "csv"), ["--overview", "csv", "text, markdown"]),
        (("doctor", "--config", "CONFIG", "stps=3"), ["stps", "'steps'"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    words, parts, call, config, run_dir, digits_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    names = {"CONFIG": config, "RUN": run_dir, "DIGITS": digits_run}
    before = sorted(tmp_path.rglob("*"))
    status, out, err = call(*(names.get(word, word) for word in words))
    assert (status, out) == (2, "")
    assert len(err) == 1
    assert err[0].startswith("fastflow: ")
    for part in parts:
        assert part in err[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_divergence_is_status_3(call, config, tmp_path):
    words = ("--config", config, "--run-dir", tmp_path / "run", "optimizer.lr=1e30")
    status, _, err = call("train", *words, "callbacks.1.every=1")
    assert status == 3
    assert "step" in err[-1]
    assert "non-finite" in err[-1]
    assert not (tmp_path / "run" / "weights").exists()


def test_an_abort_and_a_full_disk_are_one_line(call, config, tmp_path, monkeypatch):
    for error, status, text in (
        (KeyboardInterrupt(), 130, "aborted"),
        (OSError(28, "No space left on device", "log.jsonl"), 2, "No space left on device"),
    ):

        def fail(trainer, error=error):
            raise error

        monkeypatch.setattr(Trainer, "fit", fail)
        got, _, err = call("train", "--config", config, "--run-dir", tmp_path / str(status))
        assert got == status
        assert text in err[-1]
        assert len(err) == 1


def test_help_and_version(call):
    assert call("--version")[:2] == (0, f"fastflow {cli.__version__}\n")
    for command in ("train", "sample", "evaluate", "bench-sampling", "compare", "doctor"):
        status, out, _ = call(command, "--help")
        assert status == 0
        assert "usage: fastflow" in out


def test_a_method_of_ones_own_in_another_folder(call, tmp_path, monkeypatch):
    """Trained, sampled and evaluated once its module is allowed, and refused before."""
    (tmp_path / "my_method.py").write_text(
        "from methods.cm import CM\n\n\nclass Mine(CM):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    saved, run = tmp_path / "mine.yaml", tmp_path / "run"
    saved.write_text(to_yaml(toy()).replace("methods.cm:CM", "my_method:Mine"))
    allow = ("--allow", "my_method")
    try:
        status, _, err = call("train", "--config", saved, "--run-dir", run)
        assert status == 2
        assert "'my_method:Mine' is refused" in err[0]
        assert "--allow PACKAGE" in err[0]
        assert not run.exists()
        status, out, _ = call("train", "--config", saved, "--run-dir", run, *allow)
        assert status == 0
        assert f"fastflow sample {run} --allow my_method" in out
        assert call("sample", run)[0] == 2
        assert call("sample", run, *allow)[0] == 0
        assert call("evaluate", run, "evaluation.samples=32", *allow)[0] == 0
        assert "my_method" in call("doctor", "--config", saved)[2][0]
        assert call("doctor", "--config", saved, *allow)[0] == 0
        assert isinstance(Model.load(run, allow=("my_method",)).method, CM)
    finally:
        sys.modules.pop("my_method", None)


def test_a_class_that_only_its_configuration_file_has_is_refused(call, tmp_path):
    """Trained, it could never be loaded again."""
    path = tmp_path / "config_x.py"
    path.write_text(
        "import dataclasses\nfrom methods.cm import CM\nfrom tiny import toy\n\n\n"
        "class Mine(CM):\n    pass\n\n\n"
        "def experiment():\n    base = toy()\n    parts = vars(base.method)\n"
        "    return dataclasses.replace(base, method=Mine(**parts))\n"
    )
    status, _, err = call("train", "--config", path, "--run-dir", tmp_path / "run")
    assert status == 2
    assert err[0].startswith("fastflow: Mine: defined in the configuration file")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", ["compare --format json", "doctor"])
def test_a_reader_that_has_seen_enough_is_no_error(words):
    command = f"{sys.executable} -m fastflow {words}"
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


# Interrupted in another process


def start(config, run):
    return subprocess.Popen(
        [sys.executable, "train.py", "--config", str(config), "--run-dir", str(run)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(run):
    path = run / "log.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def interrupt(config, run, number):
    """Start, send a signal once three more steps are done, and return the status."""
    process, before = start(config, run), len(lines(run))
    while len(lines(run)) < before + 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert "stopping after this step" in err
    assert f"stopped by {number.name} after step" in out
    assert "the same command goes on from there" in out
    return process.returncode


def test_interrupted_by_signals_and_resumed_by_the_same_command(tmp_path):
    curriculum = lazy(CTScheduleCallback, schedule=RatioStages(q=2.0, kimg_per_stage=1.0))
    callbacks = (*drivers(curriculum), lazy(JsonlLog, every=1))
    experiment = toy(steps=300, callbacks=callbacks)
    save_yaml(experiment, tmp_path / "config.yaml")
    run = tmp_path / "run"
    assert interrupt(tmp_path / "config.yaml", run, signal.SIGINT) == 130
    assert interrupt(tmp_path / "config.yaml", run, signal.SIGTERM) == 143
    last = json.loads(lines(run)[-1])["step"]
    assert 6 <= last < 300
    process = start(tmp_path / "config.yaml", run)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"resumed at step {last:,}" in " ".join(out.split())  # long paths wrap the line
    assert [json.loads(line)["step"] for line in lines(run)] == list(range(1, 301))
    train(experiment, tmp_path / "straight")
    for file in (tmp_path / "straight" / "weights").glob("*.safetensors"):
        ours, theirs = load_file(run / "weights" / file.name), load_file(file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# sample, evaluate, compare, doctor


def test_sample_writes_a_picture_or_numbers(call, run_dir, digits_run, tmp_path):
    status, out, err = call("sample", digits_run, "--seeds", "0-8", "--out", tmp_path / "a.png")
    assert (status, err) == (0, [])
    assert "9 samples, NFE 1, t = 80" in out
    assert Image.open(tmp_path / "a.png").size > (24, 24)
    words = ("--steps", "2", "--times", "0.5", "--seeds", "3-5", "--label", "7")
    out_file = tmp_path / "new" / "a.safetensors"
    status, out, _ = call("sample", digits_run, *words, "--out", out_file)
    assert status == 0
    assert "3 samples, NFE 2, t = 80, 0.5" in out
    stored = load_file(out_file)
    cond = torch.nn.functional.one_hot(torch.full((3,), 7), 10).float()
    expected = Model.load(digits_run).sample(range(3, 6), 2, (0.5,), cond)
    assert torch.equal(stored["x"], expected)
    assert (stored["seeds"].tolist(), stored["labels"].tolist()) == ([3, 4, 5], [7, 7, 7])
    assert [file.name for file in out_file.parent.iterdir()] == ["a.safetensors"]
    # By default beside the model; points in batches of the evaluation.
    status, out, _ = call("sample", run_dir, "--weights", "student", "--seeds", "0-300")
    assert status == 0
    assert (run_dir / "samples" / "student_step00000006_1step.png").exists()


def test_samples_do_not_depend_on_how_they_are_batched(call, run_dir, tmp_path):
    call("sample", run_dir, "--seeds", "0-299", "--out", tmp_path / "all.safetensors")
    words = ("--seeds", "290-299", "--batch", "3", "--out", tmp_path / "some.safetensors")
    call("sample", run_dir, *words)
    many, few = (load_file(tmp_path / f"{name}.safetensors")["x"] for name in ("all", "some"))
    assert many.shape == (300, 2)
    torch.testing.assert_close(many[290:], few, rtol=1e-5, atol=1e-6)


def labels_in(call, run, file, *words):
    status, _, _ = call("sample", run, "--out", file, *words)
    assert status == 0
    return np.load(file)["arr_1"]


def test_classes_of_samples(call, digits_run, tmp_path):
    """Drawn as evaluation draws them, in turn, so many of each, or one for all."""
    file = tmp_path / "a.npz"
    seeds = ("--seeds", "10-39")
    drawn = labels_in(call, digits_run, file, *seeds)
    assert np.array_equal(drawn, class_labels(range(10, 40), 10).numpy())
    assert np.array_equal(labels_in(call, digits_run, file, *seeds, "--labels", "random"), drawn)
    turn = labels_in(call, digits_run, file, *seeds, "--labels", "balanced")
    assert turn.tolist() == [*range(10)] * 3
    many = labels_in(call, digits_run, file, "--seeds", "5", "--per-class", "4")
    assert np.bincount(many).tolist() == [4] * 10
    assert many[0] == 5
    assert set(labels_in(call, digits_run, file, *seeds, "--label", "7")) == {7}


def test_archives_hold_what_evaluation_sees(call, digits_run, tmp_path):
    seeds = ("--seeds", "0-19", "--steps", "2")
    for name in ("a.npz", "a.zip", "folder", "a.safetensors"):
        assert call("sample", digits_run, *seeds, "--out", tmp_path / name)[0] == 0
    floats = load_file(tmp_path / "a.safetensors")
    images = np.load(tmp_path / "a.npz")["arr_0"].transpose(0, 3, 1, 2)
    assert np.array_equal(images, quantise(floats["x"], "truncate").numpy())
    for name in ("a.zip", "folder"):
        data = ImageZip(str(tmp_path / name))
        assert np.array_equal(data.read(torch.arange(20)).numpy(), images)
        assert torch.equal(data.labels, floats["labels"])
    words = (*seeds, "--quantisation", "floor", "--out", tmp_path / "b.npz")
    assert call("sample", digits_run, *words)[0] == 0
    darker = np.load(tmp_path / "b.npz")["arr_0"].transpose(0, 3, 1, 2)
    assert np.array_equal(darker, quantise(floats["x"], "floor").numpy())
    assert not np.array_equal(darker, images)


def stop_after(monkeypatch, count):
    """Have the interpreter interrupted before so many batches and one were computed."""
    calls, sample = [], Model.sample

    def until(self, *args, **kwargs):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(args)
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(Model, "sample", until)
    return calls


def test_interrupted_sampling_goes_on(call, run_dir, tmp_path, monkeypatch):
    words = ("sample", run_dir, "--seeds", "0-99", "--batch", "10")
    assert call(*words, "--out", tmp_path / "straight.safetensors")[0] == 0
    with monkeypatch.context() as patched:
        stop_after(patched, 4)
        assert call(*words, "--out", tmp_path / "a.safetensors")[0] == 130
    assert not (tmp_path / "a.safetensors").exists()
    with monkeypatch.context() as patched:
        calls = stop_after(patched, -1)
        status, _, err = call(*words, "--out", tmp_path / "a.safetensors")
    assert status == 0
    assert [args[0] for args in calls] == [range(n, n + 10) for n in range(40, 100, 10)]
    assert err[-1].startswith("samples: 100 of 100 samples")
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in ("a", "straight"))
    assert torch.equal(a["x"], b["x"])
    assert len(list(tmp_path.iterdir())) == 2


def test_interrupted_evaluation_goes_on_and_samples_stay_where_asked(
    call, run_dir, tmp_path, monkeypatch
):
    run = shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(run / "samples", ignore_errors=True)
    words = ("evaluate", run, "evaluation.samples=40", "evaluation.batch_size=10")
    with monkeypatch.context() as patched:
        stop_after(patched, 6)  # in two steps
        assert call(*words)[0] == 130
    assert len(list((run / "samples").glob("*/*.safetensors"))) == 6
    with monkeypatch.context() as patched:
        calls = stop_after(patched, -1)
        assert call(*words)[0] == 0
    assert [args[0] for args in calls if len(args[0]) == 10] == [range(20, 30), range(30, 40)]
    assert [path for path in (run / "samples").iterdir() if path.is_dir()] == []
    assert call(*words, "--keep-samples")[0] == 0
    with monkeypatch.context() as patched:
        calls = stop_after(patched, -1)
        assert call(*words)[0] == 0
    assert [args for args in calls if len(args[0]) == 10] == []
    assert len(list((run / "samples").glob("*/about.json"))) == 2


def test_every_set_of_weights_is_measured(call, run_dir, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "run")
    (run / "results.json").unlink(missing_ok=True)
    words = ("evaluation.samples=20", "evaluation.steps=[1]", "--weights", "all")
    status, _, err = call("evaluate", run, *words)
    assert status == 0
    assert [line.split(", ")[0] for line in err] == ["ema_0.9", "ema_std0.1", "student"]
    rows = read(run / "results.json")
    assert [row.weights for row in rows] == ["ema_0.9", "ema_std0.1", "student"]
    assert len({row.value for row in rows}) == 3


def test_bench_sampling_of_a_run_and_a_configuration(call, digits_run, tmp_path):
    few = ("--batch", "2", "--repeats", "1", "--ancestral", "3", "--clock", "cpu")
    status, out, err = call("bench-sampling", digits_run, *few)
    assert (status, err) == (0, [])
    assert "batches of 2, fp32, random weights; " in out.splitlines()[0]
    assert "3 of 1,000" in out
    (tmp_path / "runs").mkdir()
    save_yaml(digits(), tmp_path / "config.yaml")
    words = ("--config", tmp_path / "config.yaml", "network.model.channels=16")
    status, out, _ = call("bench-sampling", *words, *few, "--format", "json")
    assert status == 0
    records = json.loads(out)
    assert [record["nfe"] for record in records] == [1, 2, 4, 8, 35, 1000]
    assert all(record["images_per_second"] > 0 for record in records)


def test_evaluate_records_and_compare_shows(call, run_dir):
    status, out, err = call("evaluate", run_dir, "evaluation.samples=32", "--weights", "student")
    assert status == 0
    assert err[-1].startswith("2 steps: 32 of 32 samples")
    rows = read(run_dir / "results.json")
    assert [(r.metric, r.steps, r.samples, r.weights, r.step) for r in rows] == [
        ("energy_distance", 1, 32, "student", 6),
        ("energy_distance", 2, 32, "student", 6),
    ]
    assert str(run_dir / "results.json") in out
    # Measuring again replaces; another number of samples is another row.
    call("evaluate", run_dir, "evaluation.samples=32", "--weights", "student")
    call("evaluate", run_dir, "evaluation.steps=[1]")
    rows = read(run_dir / "results.json")
    assert sorted(r.samples for r in rows) == [32, 32, 64]
    status, out, _ = call("compare", run_dir.parent)
    assert status == 0
    assert "tiny_toy: CM on gaussian_mixture2d, ToyMLP, student" in out
    words = ("--measured", "--name", "tiny_*", "--steps", "1,2", "--sort", "steps", "--reverse")
    status, out, _ = call("compare", run_dir.parent, *words)
    assert status == 0
    assert re.findall(r"energy distance +(\d)", out)[:2] == ["2", "1"]
    assert "cm_cifar10" not in out
    status, out, _ = call("compare", run_dir.parent, "--overview", "--format", "markdown")
    assert "| run | method | 1 step | 2 steps | images | training |" in out
    status, out, _ = call("compare", run_dir.parent, "--out", run_dir.parent / "table.csv")
    assert out == f"written to {run_dir.parent / 'table.csv'}\n"
    assert (run_dir.parent / "table.csv").read_text().startswith("experiment,method,dataset")


def test_compare_lists_what_is_expected_when_there_is_nothing(call, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)  # where there is no folder "runs", the default
    for words in ((), (tmp_path / "empty",)):
        status, out, err = call("compare", *words)
        assert (status, err) == (0, [])
        assert "cm_cifar10" in out
        assert "2.92" in out
        assert max(map(len, out.splitlines())) <= 100


def test_doctor_tells_what_differs(call):
    changes = ("optimizer.lr=0.03125", "network.model.channels=16")
    status, out, err = call("doctor", "--config", DIGITS, *changes)
    assert (status, err) == (0, [])
    for part in ("torch", "digits: 1,797 samples", "M parameters"):
        assert part in out
    assert re.search(r"optimizer\.lr: \S+ -> 0\.03125", out)
    assert re.search(r"network\.model\.channels: \d+ -> 16", out)
    status, out, _ = call("doctor", "--config", DIGITS)
    assert status == 0
    assert "differs" not in out


def test_doctor_tells_what_is_missing(call, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFLOW_DATA", str(tmp_path))
    config = ROOT / "configs" / "experiments" / "EDM" / "config_cm_cifar10.py"
    changes = (f"data.path={tmp_path / 'no.zip'}", "init_from=null")
    status, out, _ = call("doctor", "--config", config, *changes)
    assert status == 2
    assert "FAIL data" in out
    assert "no.zip does not exist" in out
    assert "experiment     not checked: it needs the data" in out
    assert "init_from: the published recipe has" in out
    assert call("doctor")[0] == 0


def test_doctor_finds_a_missing_driver(call, tmp_path):
    save_yaml(toy(callbacks=OBSERVERS), tmp_path / "config.yaml")
    status, out, _ = call("doctor", "--config", tmp_path / "config.yaml")
    assert status == 2
    assert "FAIL experiment" in out
    assert "CTScheduleCallback" in out
