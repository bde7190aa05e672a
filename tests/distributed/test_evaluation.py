"""Samples and metrics of two processes are those of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastflow.distributed import World
from fastflow.logging import JsonLines
from fastflow.model import Model
from processes import Processes
from sharded_evaluation import experiment, trained
from tiny import train


def values(run_dir: Path) -> list[float]:
    return [row["value"] for row in JsonLines(run_dir / "early_results.jsonl").read()]


@pytest.mark.dist
@pytest.mark.parametrize("shard", [1, 2])
def test_metrics_while_training(two: Processes, shard: int, tmp_path: Path) -> None:
    """Of sharded weights too; they leave the weights as they are, to the bit."""
    for name, watched in (("watched", True), ("plain", False)):
        two.run(trained, tmp_path / name, watched, shard)
    ours, theirs = (
        load_file(tmp_path / name / "weights" / "student.safetensors")
        for name in ("watched", "plain")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    train(experiment(True, 1), tmp_path / "one", world=World())
    assert values(tmp_path / "watched") == pytest.approx(values(tmp_path / "one"), rel=1e-3)
    assert len(values(tmp_path / "watched")) == 4
    log = JsonLines(tmp_path / "watched" / "log.jsonl").read()
    assert [record["energy_distance/1step"] for record in log] == pytest.approx(
        values(tmp_path / "watched")[::2], rel=1e-8
    )
    best, same = (Model.load(tmp_path / name / "weights_best") for name in ("watched", "one"))
    assert best.step == same.step
    torch.testing.assert_close(best.sample(range(5)), same.sample(range(5)), rtol=1e-3, atol=1e-4)
