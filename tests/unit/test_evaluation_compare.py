import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest

from evaluation_fakes import ROW
from fastflow.errors import DataError
from fastflow.evaluation.compare import compare, comparison, table
from fastflow.evaluation.results import record

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
        optimizer=lazy(Adam), batch_size=1, steps=1, callbacks=(),
        evaluation=Evaluation(metrics=(EnergyDistance(),)),
        expected=(
            Expected(steps=1, value=2.92, source="FastGen README"),
            Expected(steps=2, value=2.5, source="ECT paper, Table 1", note="400k iterations"),
        ),
    )
"""
ONE = dataclasses.replace(ROW, steps=1, times=(80.0,), nfe=1)


@pytest.fixture
def configs(tmp_path) -> Path:
    folder = tmp_path / "configs"
    (folder / "EDM").mkdir(parents=True)
    (folder / "EDM" / "config_a.py").write_text(CONFIG)
    (folder / "EDM" / "helper.py").write_text("raise RuntimeError")
    return folder


def test_without_results_every_expected_row_is_shown(tmp_path, configs):
    text = compare(tmp_path / "none", configs=configs)
    assert "cm_cifar10: GaussianMap on Gaussian2D (no results yet)" in text
    assert "2.92 [1]" in text
    assert "2.50 [2]" in text
    assert "[1] FastGen README" in text
    assert "[2] ECT paper, Table 1; 400k iterations" in text
    lines = comparison(tmp_path / "none", configs)
    assert [(line.steps, line.expected, line.measured) for line in lines] == [
        (1, 2.92, None),
        (2, 2.5, None),
    ]


def test_measured_beside_expected(tmp_path, configs):
    record(tmp_path / "runs" / "a", [ROW])
    two, one = comparison(tmp_path / "runs", configs)
    assert (two.steps, two.measured, two.minimum, two.expected) == (2, 3.0, 2.95, 2.5)
    assert two.difference == pytest.approx(0.5)
    assert two.ratio == pytest.approx(1.2)
    assert (two.run, two.weights, two.images, two.nfe) == ("a", "ema_0.9999", 179_200_000, 2)
    assert (one.steps, one.measured, one.expected, one.run) == (1, None, 2.92, "a")
    text = compare(tmp_path / "runs", configs=configs)
    assert "FID-50k      2    2      3.00  2.95  2.50 [1]        +0.5    1.2  179.2M" in text
    assert "cm_cifar10: CM on cifar10, ema_0.9999, run a" in text


def test_fids_of_other_sample_counts_are_never_compared(tmp_path, configs):
    record(tmp_path, [dataclasses.replace(ONE, samples=5000)])
    line = comparison(tmp_path, configs)[0]
    assert (line.measured, line.expected) == (3.0, 2.92)
    assert line.ratio is None
    assert line.difference is None
    assert line.note == "not compared: FID-5k measured, FID-50k expected"
    assert "FID-5k" in compare(tmp_path, configs=configs)


def test_other_inception_weights_are_never_compared(tmp_path, configs):
    record(tmp_path, [dataclasses.replace(ONE, extractor="inception-v3 with other weights, 2048")])
    assert comparison(tmp_path, configs)[0].ratio is None


def test_only_the_latest_step_of_each_run_and_weights(tmp_path, configs):
    early = dataclasses.replace(ONE, step=10, value=2.0)
    student = dataclasses.replace(ONE, weights="student", value=5.0)
    record(tmp_path / "a", [ONE, early, student])
    record(tmp_path / "b" / "c", [early])
    lines = [line for line in comparison(tmp_path, configs) if line.measured is not None]
    found = [(line.run, line.weights, line.measured) for line in lines]
    assert found == [("a", "ema_0.9999", 3.0), ("a", "student", 5.0), ("b/c", "ema_0.9999", 2.0)]


def test_baselines_and_unknown_experiments(tmp_path, configs):
    digits = dataclasses.replace(
        ONE,
        experiment="mine",
        samples=5000,
        value=2.0,
        baseline=2.5,
        baseline_name="FID between halves of the real data",
    )
    record(tmp_path, [digits])
    line = comparison(tmp_path, configs)[-1]
    assert (line.experiment, line.expected, line.ratio) == ("mine", 2.5, 0.8)
    assert line.source == "FID between halves of the real data"
    assert "[1] FID between halves of the real data" in table([digits])
    assert "0.8" in table([digits])


@pytest.mark.parametrize("long", ["x" * 150])
def test_the_table_is_at_most_100_columns_wide(tmp_path, configs, long):
    rows = [
        dataclasses.replace(ONE, metric="flow_map_error", value=1.234e-7, min=1e-7),
        dataclasses.replace(ONE, experiment=long, baseline=1e9, baseline_name=long),
    ]
    record(tmp_path, rows)
    text = compare(tmp_path, configs=configs)
    assert max(map(len, text.splitlines())) <= 100
    assert "1.23e-07" in text


def test_other_formats(tmp_path, configs):
    record(tmp_path, [ROW])
    rows = json.loads(compare(tmp_path, "json", configs))
    assert rows[0]["measured"] == 3.0
    table_rows = list(csv.DictReader(io.StringIO(compare(tmp_path, "csv", configs))))
    assert [r["expected"] for r in table_rows] == ["2.5", "2.92"]
    assert table_rows[1]["measured"] == ""
    lines = compare(tmp_path, "markdown", configs).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert "ECT paper, Table 1; 400k iterations" in lines[2]


def test_nothing_at_all(tmp_path):
    assert compare(tmp_path, configs=tmp_path) == "no results and no expected results found"


def test_a_damaged_results_file_is_an_error(tmp_path, configs):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="no results file"):
        compare(tmp_path, configs=configs)
