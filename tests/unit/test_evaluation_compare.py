import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest

from evaluation_fakes import ROW
from fastflow.config import load_experiment, save_yaml
from fastflow.errors import ConfigError, DataError
from fastflow.evaluation.choose import FILTERS, ORDERS, chosen, ordered
from fastflow.evaluation.compare import comparison, table
from fastflow.evaluation.overview import overviews, render_overviews
from fastflow.evaluation.results import record
from fastflow.evaluation.runs import find_runs
from fastflow.evaluation.table import Line, duration, render
from fastflow.experiment import Experiment
from fastflow.tables import Footnotes

CONFIG = """
from fastflow.config import lazy
from fastflow.data.toy import Gaussian2D
from fastflow.evaluation.spec import Evaluation, Expected
from fastflow.evaluation.toy_metrics import EnergyDistance
from fastflow.experiment import Experiment
from fastflow.network import Network
from evaluation_fakes import GaussianMap
from torch.optim import Adam

def experiment():
    return Experiment(
        name="cm_cifar10", method=GaussianMap(), network=lazy(Network), data=lazy(Gaussian2D),
        optimizer=lazy(Adam), batch_size=512, steps=350_000, callbacks=(),
        evaluation=Evaluation(metrics=(EnergyDistance(),), blocks=3, times={2: (0.821,)}),
        expected=(
            Expected(steps=1, value=2.92, source="FastGen README"),
            Expected(steps=2, value=2.5, source="ECT paper, Table 1", note="400k iterations"),
        ),
        published={"start of sampling": "sigma 79.56"},
    )
"""
ONE = dataclasses.replace(ROW, steps=1, times=(80.0,), nfe=1)
SAMPLING = "start of sampling: the published recipe has sigma 79.56"
FIGURE = "the published figure: 400k iterations"


@pytest.fixture
def configs(tmp_path) -> Path:
    folder = tmp_path / "configs"
    (folder / "EDM").mkdir(parents=True)
    (folder / "EDM" / "config_a.py").write_text(CONFIG)
    (folder / "EDM" / "helper.py").write_text("raise RuntimeError")
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def shipped(configs: Path) -> Experiment:
    return load_experiment(configs / "EDM" / "config_a.py", kind=Experiment)


def stored(folder: Path, experiment: Experiment, exported: bool = True) -> None:
    """What training leaves of an experiment beside its results."""
    if not exported:
        save_yaml(experiment, folder / "experiment.yaml")
        return
    (folder / "weights").mkdir(exist_ok=True)
    model = {"experiment": experiment, "weights": ["ema_0.9999", "student"]}
    save_yaml(model, folder / "weights" / "model.yaml")


def lines_of(folder: Path, configs: Path) -> tuple[Line, ...]:
    return comparison([folder], configs).lines


def text_of(folder: Path, configs: Path, **options) -> str:
    return render(lines_of(folder, configs), "text", **options)


def test_without_results_every_expected_row_is_shown(tmp_path, configs):
    text = text_of(tmp_path / "none", configs)
    assert "cm_cifar10  GaussianMap  gaussian2d  FID-50k      1  2.92 [1]" in text
    assert "2.50 [2]" in text
    assert "[1] FastGen README" in text
    assert "[2] ECT paper, Table 1; 400k iterations" in text
    lines = lines_of(tmp_path / "none", configs)
    assert [(line.steps, line.expected, line.measured) for line in lines] == [
        (1, 2.92, None),
        (2, 2.5, None),
    ]
    assert {line.network for line in lines} == {"Network"}


def test_measured_beside_expected(runs, configs):
    record(runs / "a", [ROW])
    two, one = lines_of(runs, configs)
    assert (two.steps, two.measured, two.minimum, two.expected) == (2, 3.0, 2.95, 2.5)
    assert two.difference == pytest.approx(0.5)
    assert two.ratio == pytest.approx(1.2)
    assert two.reached is False
    assert (two.run, two.weights, two.images, two.nfe) == ("a", "ema_0.9999", 179_200_000, 2)
    assert (one.steps, one.measured, one.expected, one.run) == (1, None, 2.92, "a")
    text = text_of(runs, configs)
    assert "cm_cifar10: CM on cifar10, ema_0.9999, run a" in text
    assert "179.2M images, 60 min on 8 x GPU (8 GPU-hours) [1]" in text
    assert "FID-50k      2    2      3.00  2.95  2.50 [2]       +0.50   1.20" in text
    assert "torch 2.13.0; extractor inception-v3 2015-12-05, 2048 6726825d; reference" in text


def test_higher_may_be_better(runs, configs):
    line = Line(
        experiment="a", method="A", dataset="d", metric="inception_score", steps=1, samples=9
    )
    line = dataclasses.replace(line, better="higher", measured=9.5, expected=9.0, difference=0.5)
    assert line.reached is True
    assert dataclasses.replace(line, difference=-0.5).reached is False
    assert dataclasses.replace(line, difference=0.0).reached is True
    assert dataclasses.replace(line, better="lower").reached is False
    assert dataclasses.replace(line, difference=None).reached is None
    worse = dataclasses.replace(line, run="b", measured=9.1)
    [overview] = overviews([worse, line])
    assert overview.best(1) == 9.5


def test_fids_of_other_sample_counts_are_never_compared(runs, configs):
    record(runs, [dataclasses.replace(ONE, samples=5000)])
    line = lines_of(runs, configs)[0]
    assert (line.measured, line.expected) == (3.0, 2.92)
    assert line.ratio is None
    assert line.difference is None
    assert "not compared: FID-5k measured, FID-50k expected" in line.warnings
    assert "FID-5k" in text_of(runs, configs)


def test_other_inception_weights_are_never_compared(runs, configs):
    record(runs, [dataclasses.replace(ONE, extractor="inception-v3 with other weights, 2048")])
    line = lines_of(runs, configs)[0]
    assert line.ratio is None
    assert "not compared: measured with other Inception weights" in line.warnings


@pytest.mark.parametrize("exported", [True, False])
def test_the_published_conditions_give_no_warning_but_those_of_the_recipe(runs, configs, exported):
    record(runs / "a", [ONE, ROW])
    stored(runs / "a", shipped(configs), exported)
    one, two = lines_of(runs, configs)
    assert one.warnings == (SAMPLING,)
    assert two.warnings == (SAMPLING, FIGURE)
    assert one.network == "Network"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks": 1}, "1 block of seeds instead of 3"),
        ({"blocks": 2}, "2 blocks of seeds instead of 3"),
        ({"quantisation": "round"}, "quantisation 'round' instead of 'truncate'"),
        ({"weights": "student"}, "weights student instead of ema_0.9999"),
        ({"times": (80.0, 1.0)}, "times 80, 1 instead of 80, 0.821"),
        ({"step": 1000}, "after 1,000 of 350,000 steps"),
    ],
)
def test_a_measurement_under_other_conditions_is_told(runs, configs, change, words):
    record(runs, [dataclasses.replace(ROW, **change)])
    stored(runs, shipped(configs))
    assert set(lines_of(runs, configs)[0].warnings) == {SAMPLING, FIGURE, words}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 64}, "batch size 64 instead of 512"),
        ({"precision": "bf16"}, "precision bf16 instead of fp32"),
        ({"steps": 350_001}, "steps 350,001 instead of 350,000"),
        ({"init_from": "runs/x"}, "init from runs/x instead of None"),
    ],
)
def test_a_run_that_was_trained_otherwise_is_told(runs, configs, change, words):
    record(runs, [dataclasses.replace(ROW, step=350_001)])
    stored(runs, dataclasses.replace(shipped(configs), **change))
    assert set(lines_of(runs, configs)[0].warnings) == {SAMPLING, FIGURE, words}


def test_what_cannot_be_compared_with_its_configuration_is_told(runs, configs):
    record(runs, [ROW])
    assert any("no experiment.yaml" in text for text in lines_of(runs, configs)[0].warnings)
    stored(runs, shipped(configs))
    path = runs / "weights" / "model.yaml"
    path.write_text(path.read_text().replace("evaluation_fakes:GaussianMap", "elsewhere:Own"))
    [text] = [t for t in lines_of(runs, configs)[0].warnings if "cannot be compared" in t]
    assert "'elsewhere:Own' is refused" in text


@pytest.mark.parametrize(
    "text", ["5", "[", "experiment: {network: 3}\nweights: [a]", "weights: []"]
)
def test_a_damaged_description_is_an_error(runs, configs, text):
    record(runs, [ROW])
    (runs / "model.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"model\.yaml"):
        lines_of(runs, configs)


def test_only_the_latest_step_of_each_run_and_weights(runs, configs):
    early = dataclasses.replace(ONE, step=10, value=2.0)
    student = dataclasses.replace(ONE, weights="student", value=5.0)
    record(runs / "a", [ONE, early, student])
    record(runs / "b" / "c", [early])
    lines = [line for line in lines_of(runs, configs) if line.measured is not None]
    found = [(line.run, line.weights, line.measured) for line in lines]
    assert found == [("a", "ema_0.9999", 3.0), ("a", "student", 5.0), ("b/c", "ema_0.9999", 2.0)]


def test_several_folders_and_one_run_found_twice(runs, configs):
    for name in ("a", "b", "more/b"):
        record(runs / name, [ONE])

    def names(*folders):
        return [run.name for run in find_runs(folders)]

    assert names(runs) == ["a", "b", "more/b"]
    assert names(runs, runs / "a", runs / "missing") == ["a", "b", "more/b"]
    assert names(runs / "a") == ["a"]
    assert names(runs / "b", runs / "more") == [str(runs / "b"), str(runs / "more" / "b")]


def test_baselines_and_unknown_experiments(runs, configs):
    digits = dataclasses.replace(
        ONE,
        experiment="mine",
        samples=5000,
        value=2.0,
        baseline=2.5,
        baseline_name="FID between halves of the real data",
    )
    record(runs, [digits])
    line = lines_of(runs, configs)[-1]
    assert (line.experiment, line.expected, line.ratio) == ("mine", 2.5, 0.8)
    assert line.source == "FID between halves of the real data"
    assert (line.published, line.warnings) == (False, ())
    assert "FID between halves of the real data" in table([digits])
    assert "0.80" in table([digits])


@pytest.mark.parametrize("grouped", [True, False])
def test_the_table_is_at_most_100_columns_wide(runs, configs, grouped):
    long = "x" * 150
    rows = [
        dataclasses.replace(ONE, metric="flow_map_error", value=1.234e-7, min=1e-7),
        dataclasses.replace(ONE, experiment=long, baseline=1e9, baseline_name=f"{long} {long}"),
        dataclasses.replace(ONE, blocks=1, quantisation="round", times=(79.0,)),
    ]
    record(runs / ("r" * 150), rows)
    text = text_of(runs, configs, grouped=grouped)
    assert max(map(len, text.splitlines())) <= 100
    assert "1.23e-07" in text
    assert max(map(len, render_overviews(lines_of(runs, configs), "text").splitlines())) <= 100


def test_what_a_terminal_would_act_upon_is_not_printed(runs, configs):
    hostile = "\x1b[2J\u202e\nevil|\ud800"
    row = dataclasses.replace(ONE, experiment=hostile, method=hostile, baseline=1.0)
    record(runs, [dataclasses.replace(row, baseline_name=hostile, torch=hostile)])
    lines = lines_of(runs, configs)
    for text in (
        render(lines, "text"),
        render(lines, "text", grouped=False),
        render(lines, "markdown"),
        render(lines, "csv"),
        render_overviews(lines, "text"),
    ):
        text.encode()
        assert all(c.isprintable() or c == "\n" for c in text)
    assert (
        len({row.count("|") - row.count("\\|") for row in render(lines, "markdown").splitlines()})
        == 1
    )


def test_other_formats(runs, configs):
    record(runs, [ROW])
    stored(runs, shipped(configs))
    lines = lines_of(runs, configs)
    rows = json.loads(render(lines, "json"))
    assert rows[0]["measured"] == 3.0
    assert rows[0]["device_hours"] == 8.0
    assert rows[0]["warnings"] == [SAMPLING, FIGURE]
    table_rows = list(csv.DictReader(io.StringIO(render(lines, "csv"))))
    assert [r["expected"] for r in table_rows] == ["2.5", "2.92"]
    assert table_rows[0]["warnings"] == f"{SAMPLING}; {FIGURE}"
    assert table_rows[1]["measured"] == ""
    assert table_rows[0].keys() == rows[0].keys()
    rows = render(lines, "markdown").splitlines()
    assert len(rows) == 4
    assert len({row.count("|") for row in rows}) == 1
    assert "ECT paper, Table 1 " in rows[2]
    assert "60 min on 8 x GPU (8 GPU-hours)" in rows[2]


def test_nothing_at_all(tmp_path):
    assert text_of(tmp_path, tmp_path) == "no results and no expected results found"
    assert render_overviews([], "text") == "no results found"


def test_a_damaged_results_file_is_an_error(tmp_path, configs):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="no results file"):
        lines_of(tmp_path, configs)


def test_notes_are_told_in_short():
    notes = Footnotes()
    assert [notes.mark(text) for text in "abcdea"] == [f"[{n}]" for n in (1, 2, 3, 4, 5, 1)]
    assert notes.marks("") == ""
    assert notes.marks("eadc") == "[1,3-5]"
    assert notes.marks(["f", "", "b"]) == "[2,6]"
    assert list(notes) == list("abcdef")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.2, "4.2 s"), (119, "119 s"), (192, "3.2 min"), (9000, "2.5 h"), (200_000, "2.31 days")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# Choosing and sorting

LINES = [
    Line(experiment=name, method=method, dataset="digits", metric="fid", steps=steps, samples=100)
    for name, method, steps in (("cm_a", "CM", 1), ("scm_b", "SCM", 2), ("cm_c", "CM", 10))
]


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ({}, ["cm_a", "scm_b", "cm_c"]),
        ({"method": ["cm"]}, ["cm_a", "cm_c"]),
        ({"method": ["*CM"], "steps": ["1", "2"]}, ["cm_a", "scm_b"]),
        ({"name": ["cm_*"], "steps": ["10"]}, ["cm_c"]),
        ({"name": ["cm_a"], "steps": ["10"]}, []),
    ],
)
def test_lines_are_chosen_by_patterns(wanted, names):
    assert [line.experiment for line in chosen(LINES, wanted)] == names


def test_a_pattern_that_fits_nothing_is_an_error():
    with pytest.raises(
        ConfigError, match=r"--method: nothing has 'SCM2'; did you mean 'SCM'. accepted: CM"
    ):
        chosen(LINES, {"method": ["SCM2"]})


def test_only_what_was_measured():
    measured = dataclasses.replace(LINES[1], measured=1.0)
    assert chosen([LINES[0], measured], {}, measured=True) == [measured]


def test_sorting_puts_what_has_no_value_last():
    a, b, c = (
        dataclasses.replace(line, measured=value)
        for line, value in zip(LINES, (3.0, None, 1.0), strict=True)
    )
    assert ordered([a, b, c], "measured") == [c, a, b]
    assert ordered([a, b, c], "measured", reverse=True) == [a, c, b]
    assert [line.steps for line in ordered([c, b, a], "steps")] == [1, 2, 10]
    for by in ORDERS:
        assert len(ordered([a, b, c], by)) == 3
    assert set(FILTERS) <= set(ORDERS)


# One line for each run


def test_an_overview_has_a_column_for_each_number_of_steps(runs, configs):
    rows = [
        dataclasses.replace(ONE, experiment=name, steps=n, value=value, times=(80.0,) * n)
        for name, n, value in (("a", 1, 3.0), ("a", 2, 2.0), ("b", 1, 2.5), ("b", 4, 9.0))
    ]
    for row in rows:
        record(runs / row.experiment, [row])
    lines = comparison([runs], runs).lines
    [overview] = overviews(lines)
    assert (overview.title, overview.steps) == ("FID-50k on cifar10", (1, 2, 4))
    assert [overview.best(n) for n in overview.steps] == [2.5, None, None]
    markdown = render_overviews(lines, "markdown").splitlines()
    assert markdown[0] == "**FID-50k on cifar10**"
    assert markdown[2] == "| run | method | 1 step | 2 steps | 4 steps | images | training |"
    assert markdown[4].startswith("| a | CM | 3.00 | 2.00 | - | 179.2M | 60 min")
    assert markdown[5].startswith("| b | CM | **2.50** | - | 9.00 |")
    text = render_overviews(lines, "text")
    assert "b    CM        2.50        -     9.00  179.2M" in text
    with pytest.raises(ConfigError, match="csv given, accepted: text, markdown"):
        render_overviews(lines, "csv")


def test_other_conditions_are_starred_in_an_overview(runs, configs):
    record(runs, [ROW])
    assert "3.00*" in render_overviews(lines_of(runs, configs), "text")
    assert "* under other conditions" in render_overviews(lines_of(runs, configs), "text")
