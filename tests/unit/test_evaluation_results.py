import dataclasses
import json

import pytest

from evaluation_fakes import ROW
from fastflow.distributed import World
from fastflow.errors import DataError
from fastflow.evaluation.results import Result, commit, improves, read, record


def test_rows_come_back_as_they_were(tmp_path):
    path = record(tmp_path / "run", [ROW])
    assert path == tmp_path / "run" / "results.json"
    assert read(path) == [ROW]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_an_equal_key_replaces_and_another_adds(tmp_path):
    record(tmp_path, [ROW])
    better = dataclasses.replace(ROW, value=2.9, seconds=1.0, hardware="other")
    path = record(tmp_path, [better])
    assert read(path) == [better]
    others = [
        dataclasses.replace(ROW, **change)
        for change in (
            {"steps": 1, "times": (80.0,)},
            {"times": (80.0, 1.0)},
            {"samples": 5000, "generated": 5000},
            {"weights": "student"},
            {"quantisation": "round"},
            {"reference_hash": "def"},
            {"extractor_hash": "012"},
            {"step": 100},
            {"first_seed": 50_000},
            {"metric": "fid_half"},
        )
    ]
    record(tmp_path, others)
    assert len(read(path)) == 11
    assert better in read(path)


def test_labels_name_the_number_of_samples():
    def label(**change):
        return dataclasses.replace(ROW, **change).label

    assert label() == "FID-50k"
    assert label(samples=5000) == "FID-5k"
    assert label(samples=49_999) == "FID-49999"
    assert label(metric="fid_half", samples=898) == "FID half-898"
    assert label(metric="energy_distance") == "energy distance"
    few = {"samples": 10_000}
    assert label(metric="fd_dinov2", **few) == "FD-DINOv2-10k"
    assert label(metric="fd_of_mine", **few) == "fd of mine-10k"
    assert label(metric="inception_score", **few) == "IS-10k"
    assert label(metric="recall", **few) == "recall-10k"


def test_the_better_of_two_values():
    assert improves(2.0, 3.0, "lower")
    assert improves(0.8, 0.7, "higher")
    assert not improves(0.7, 0.7, "higher")
    assert not improves(3.0, 3.0, "lower")
    assert ROW.best == 2.95
    assert dataclasses.replace(ROW, better="higher").best == 3.05


def test_rows_without_a_direction_are_of_metrics_where_lower_is_better(tmp_path):
    path = record(tmp_path, [ROW])
    content = json.loads(path.read_text())
    for name in ("better", "spread"):
        del content["results"][0][name]
    path.write_text(json.dumps(content))
    assert read(path) == [ROW]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 2, "results": []}', '{"version": 1, "results": [{"value": 1}]}'],
)
def test_unreadable_files_are_errors_and_stay(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"results\.json"):
        record(tmp_path, [ROW])
    assert path.read_text() == text


def test_the_file_is_plain_json(tmp_path):
    content = json.loads(record(tmp_path, [ROW]).read_text())
    assert content["version"] == 1
    assert content["results"][0]["times"] == [80.0, 0.821]
    assert content["results"][0].keys() == {f.name for f in dataclasses.fields(Result)}


def test_provenance_of_this_machine():
    name = World(size=2).hardware
    assert name.startswith("2 x ")
    assert "threads" in name
    assert commit() == "" or len(commit().rstrip("+")) == 40
