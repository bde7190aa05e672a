"""The benchmarks of a folder: jobs in order, each once, used again, and bounds that are held."""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import zoo
from benchmarks.zoo import Job, main, misses, planned, work
from evaluation_fakes import ROW, GaussianMap, PictureModel, pictures
from fastflow import cli
from fastflow.evaluation.compare import lines_of
from fastflow.evaluation.results import read
from fastflow.evaluation.runs import Run
from fastflow.evaluation.spec import Expected
from methods import edm, flow_matching
from tiny import toy

ROOT = Path(__file__).parents[2]

EDM = """
import dataclasses
from methods.edm import EDM
from tiny import OBSERVERS, drivers, toy

def experiment():
    return toy(name="edm", method=EDM(), callbacks=(*drivers()[1:], *OBSERVERS), steps=3)
"""
CD = """
import dataclasses
from pathlib import Path
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Prerequisite
from tiny import toy_with_teacher

def experiment():
    made = toy_with_teacher(Path("runs/edm"), steps=2)
    needs = Prerequisite(config="configs/config_edm.py", run_dir="runs/edm")
    bound = Expected(metric="energy_distance", steps=2, value=1e3, samples=64, source="measured")
    return dataclasses.replace(made, name="cd", prerequisites=(needs,), expected=(bound,))
"""


class Ended:
    """A process that is over when it starts."""

    def __init__(self, status):
        self.status = status

    def poll(self):
        return self.status


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with two configurations; cd, the first by name, needs edm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "POLL", 0.0)
    (tmp_path / "configs").mkdir()
    Path("configs/config_edm.py").write_text(EDM)
    Path("configs/config_cd.py").write_text(CD)
    Path("configs/common.py").write_text("raise RuntimeError")
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """Calls of fastflow, made in this process."""
    made = []

    def start(arguments, log):
        made.append(" ".join(arguments))
        with contextlib.redirect_stdout(io.StringIO()):
            return Ended(cli.main(list(arguments)))

    monkeypatch.setattr(zoo, "_start", start)
    return made


def test_trained_in_order_measured_and_used_again(folder, calls, capsys):
    assert main(["configs"]) == 0
    assert [c.split()[0] for c in calls] == ["train", "evaluate", "train", "evaluate"]
    assert "config_edm.py" in calls[0]
    assert "config_cd.py" in calls[2]
    assert all("--no-prerequisites" in call for call in (calls[0], calls[2]))
    assert all("--device cpu" in call for call in calls)
    assert {row.steps for row in read(Path("runs/cd/results.json"))} == {1, 2, 4}
    shown = capsys.readouterr().out
    assert "edm: EDM on gaussian_mixture2d" in shown
    assert shown.count("energy distance") == 7  # one line for each comparison
    assert " min on " not in shown  # would differ each time
    assert "written to runs/report-configs.html" in shown
    page = Path("runs/report-configs.html").read_text()
    assert page.count("<article") == 2
    assert page.count("data:image/png") == 2 * 3
    assert "1000.00 [3]" in shown
    calls.clear()
    assert main(["configs"]) == 0
    assert calls == []
    assert capsys.readouterr().out == shown
    # Measured again, but not trained again, once the configuration measures something else.
    text = EDM.replace(
        "steps=3)",
        "steps=3, evaluation=Evaluation(metrics=(EnergyDistance(),),"
        " samples=32, quantisation='none'))",
    )
    imports = "from fastflow.evaluation.spec import Evaluation\n"
    imports += "from fastflow.evaluation.toy_metrics import EnergyDistance\n"
    Path("configs/config_edm.py").write_text(imports + text)
    assert main(["configs"]) == 0
    assert [call.split()[0] for call in calls] == ["train", "evaluate"]
    assert {r.steps for r in read(Path("runs/edm/results.json")) if r.samples == 32} == {1, 2, 4, 8}


def test_the_same_table_from_new_runs(folder, calls, capsys, monkeypatch):
    assert main(["configs"]) == 0
    shown = capsys.readouterr().out
    Path("runs").rename("before")
    assert main(["configs", "--jobs", "1"]) == 0
    assert capsys.readouterr().out == shown


def test_a_missed_bound_fails(folder, calls, capsys):
    Path("configs/config_cd.py").write_text(CD.replace("1e3", "1e-9"))
    assert main(["configs"]) == 1
    out = capsys.readouterr().out
    assert "FAILED cd: energy distance in 2 steps: " in out
    assert "measured, at most 1e-09 stated" in out


def test_a_bound_that_was_not_compared_fails(folder, calls, capsys):
    Path("configs/config_cd.py").write_text(CD.replace("steps=2, value", "steps=3, value"))
    assert main(["configs"]) == 1
    out = capsys.readouterr().out
    assert "FAILED cd: energy distance in 3 steps: nothing comparable measured, at most 1000" in out


def test_bounds_are_at_most_and_never_across_sample_counts(folder, calls):
    def missed(better="lower", **changes):
        bound = Expected(**{"steps": ROW.steps, "value": 3.0, "source": "here", **changes})
        experiment = toy(expected=(bound,))
        row = dataclasses.replace(ROW, better=better)
        run = Run(name="x", folder=folder, rows=(row,))
        return misses(experiment, lines_of(run, experiment))

    assert ROW.value == 3.0
    assert missed("higher") == missed("higher", value=2.9) == []
    [text] = missed("higher", value=3.1)
    assert text == "tiny_toy: FID-50k in 2 steps: 3 measured, at least 3.1 stated"
    assert missed() == []
    assert missed(value=2.99) == ["tiny_toy: FID-50k in 2 steps: 3 measured, at most 2.99 stated"]
    [text] = missed(value=1e6, samples=5000)
    assert "nothing comparable measured" in text


def test_images_are_drawn_side_by_side(folder, monkeypatch):
    """One row for each run, one column for each number of steps, drawn again where missing."""
    model = PictureModel(GaussianMap(), shape=(3, 4, 4), pictures=pictures(64))
    monkeypatch.setattr(zoo.Model, "load", lambda folder: model)
    run = Run(name="x", folder=Path("runs/x"), rows=(dataclasses.replace(ROW, step=100),))
    written = zoo.report(lines_of(run, None), [run], Path("runs/report"))
    assert [path.name for path in written] == ["report.html", "report.png"]
    with Image.open(written[1]) as picture:
        assert picture.width > 3 * 10 * 33
    assert [p.name for p in Path("runs/x/samples").iterdir()] == [
        "same_noise_ema_0.99_step00000100_2step.png"
    ]


def test_a_failed_run_fails_those_that_need_it_and_only_them(folder, calls, capsys):
    diverging = EDM.replace("steps=3)", "steps=3, optimizer=lazy(Adam, lr=1e30))")
    imports = "from fastflow.config import lazy\nfrom torch.optim import Adam\n"
    Path("configs/config_edm.py").write_text(imports + diverging)
    Path("configs/config_free.py").write_text(EDM.replace('"edm"', '"free"'))
    assert main(["configs"]) == 1
    out = capsys.readouterr().out
    assert "FAILED runs/edm: train ended with status 3; see runs/logs-configs/edm.log" in out
    assert "FAILED runs/cd: not trained, a run before failed" in out
    assert "free: EDM on gaussian_mixture2d" in out


def test_a_run_needed_under_another_description_is_trained_too(folder, calls):
    other = CD.replace('run_dir="runs/edm"', 'run_dir="runs/short", overrides=("steps=1",)')
    other = other.replace('Path("runs/edm")', 'Path("runs/short")')
    Path("configs/config_cd.py").write_text(other)
    assert main(["configs"]) == 0
    trained = [call.split()[4] for call in calls if call.startswith("train")]
    assert sorted(trained) == ["runs/cd", "runs/edm", "runs/short"]
    assert trained.index("runs/short") < trained.index("runs/cd")
    assert not Path("runs/short/results.json").exists()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: None, "nowhere: no config_*.py there"),
        (lambda: Path("configs/config_b.py").write_text(EDM), "'edm' given, which"),
        (lambda: Path("configs/config_b.py").write_text("x ="), "SyntaxError"),
        (
            lambda: Path("configs/config_cd.py").write_text(
                CD.replace('run_dir="runs/edm")', 'run_dir="runs/edm", overrides=("seed=1",))')
            ),
            "runs/edm is asked for in two configurations (seed: 0 -> 1)",
        ),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_trained(make, text, folder, calls, capsys):
    make()
    where = "nowhere" if text.startswith("nowhere") else "configs"
    assert main([where]) == 2
    out, err = capsys.readouterr()
    assert (out, calls, err.count("\n")) == ("", [], 1)
    assert text in err
    assert not Path("runs").exists()


class Slow:
    """A process that ends at its second poll."""

    alive: list[str] = []
    most = 0

    def __init__(self, name):
        self.name, self.polls = name, 0
        Slow.alive.append(name)
        Slow.most = max(Slow.most, len(Slow.alive))

    def poll(self):
        self.polls += 1
        if self.polls < 3:
            return None
        Slow.alive.remove(self.name)
        return 0

    def terminate(self):
        Slow.alive.remove(self.name)

    def wait(self):
        return 0


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_as_many_at_once_as_asked(at_once, folder, monkeypatch):
    monkeypatch.setattr(Slow, "alive", [])
    monkeypatch.setattr(Slow, "most", 0)
    order = []

    def start(arguments, log):
        order.append(arguments[0])
        assert "a" not in Slow.alive or arguments[0] != "b"
        return Slow(arguments[0])

    monkeypatch.setattr(zoo, "_start", start)
    needs = {"b": {"a"}}
    names = ["b", "a", "c", "d", "e"]
    jobs = [
        Job(Path(n), frozenset(Path(m).resolve() for m in needs.get(n, ())), ((n,), (f"{n}2",)))
        for n in names
    ]
    assert work(jobs, at_once, Path("logs")) == []
    assert Slow.most == at_once
    assert sorted(order) == sorted(n + s for n in names for s in ("", "2"))
    assert order.index("a2") < order.index("b")


def test_an_interrupt_stops_what_runs(folder, monkeypatch, capsys):
    monkeypatch.setattr(Slow, "alive", [])
    monkeypatch.setattr(zoo, "_start", lambda arguments, log: Slow(arguments[1]))

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo.time, "sleep", interrupt)
    assert main(["configs"]) == 130
    assert Slow.alive == []
    assert "the same command goes on from there" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Digits", "Toy"])
def test_every_configuration_that_comes_with_fastflow_can_be_planned(name, tmp_path, monkeypatch):
    """Names differ, prerequisites are found, and every bound is of something measured."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    stages = zoo.found(Path("configs/experiments") / name)
    names = {stage.experiment.name for stage in stages}
    methods = {name.partition("_")[0] for name in names}
    assert methods >= {"cm", "ict", "ect", "tcm", "sct", "scd", "mf"}
    assert all(f"config_{s.experiment.name}.py" == Path(s.source.config).name for s in stages)
    assert {job.run_dir.name for job in planned(stages)} == names
    for stage in stages:
        evaluation = stage.experiment.evaluation
        for bound in stage.experiment.expected:
            assert bound.steps in {*zoo.STEPS, *evaluation.steps}
            if bound.metric == "fid":
                assert bound.samples == evaluation.samples


def test_every_toy_states_a_bound_of_its_flow_map():
    """One-step methods in one step; diffusion models in the most steps that they are given."""
    for stage in zoo.found(ROOT / "configs/experiments/Toy"):
        experiment = stage.experiment
        steps = {e.steps for e in experiment.expected if e.metric == "flow_map_error"}
        diffusion = isinstance(experiment.method, edm.EDM | flow_matching.FlowMatching)
        two_times = not diffusion and experiment.method.two_times
        wanted = {max(experiment.evaluation.steps)} if diffusion else {1}
        assert steps == ({1, 2, 4} if two_times else wanted), experiment.name


@pytest.mark.slow
def test_in_processes_of_their_own_and_stopped(folder):
    """What `make bench-toy` runs: children with one thread, a log each; a signal ends all."""
    Path("configs/config_edm.py").write_text(EDM.replace("steps=3", "steps=100000"))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", "benchmarks.zoo", "configs"]
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not Path("runs/edm/checkpoints/latest").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120)[1].endswith("goes on from there\n")
    assert process.returncode == 130
    assert "stopped by SIGTERM after step" in Path("runs/logs-configs/edm.log").read_text()
    Path("configs/config_edm.py").write_text(EDM)
    subprocess.run(["rm", "-r", "runs"], check=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cd: CM on gaussian_mixture2d" in done.stdout
    assert "minutes" not in done.stdout
    assert "minutes of wall time" in done.stderr
    spent = re.findall(r"train runs/(\w+): (\d+\.\d) CPU minutes", done.stderr)
    assert {name for name, _ in spent} == {"cd", "edm"}
    assert all(0 < float(minutes) < 2 for _, minutes in spent)
    threads = {json.dumps(row.hardware) for row in read(Path("runs/cd/results.json"))}
    assert all(", 1 threads" in text for text in threads)
