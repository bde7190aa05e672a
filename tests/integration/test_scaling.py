"""The scaling benchmark, the plan for many GPUs, and the page that shows it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from benchmarks import plan, scaling
from benchmarks.plan import Assumed, Counts, rows
from fastflow.config import lazy
from fastflow.memory import GIB, Need
from fastflow.rehearsal import Rehearsal
from fastflow.wrappers import EDMDenoiser
from networks.mlp import ToyMLP
from tiny import digits, toy

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
ASSUMED = Assumed(flops=1e12, fraction=0.5, link=1e9, network=1e8, gib=10.0)


def counted(shard: int, gib: float, *, gathered: int, summed: int) -> Counts:
    """A step that needs so much memory with a sample, and as much again with each further one."""
    nothing = dict.fromkeys(("gradients", "optimizer", "emas", "companions", "update"), 0)
    step = Rehearsal(
        parameters=0,
        accumulated=0,
        measured={1: int(gib * GIB), 2: int(2 * gib * GIB)},
        units=1,
        **nothing,
    )
    return Counts(
        need=Need(shard=shard, checkpoint=False, share=1, rehearsal=step),
        parameters=1000,
        flops=1e9,
        gathered=gathered,
        scattered=gathered // 2,
        whole=summed,
    )


@pytest.fixture
def experiment():
    return digits(batch_size=64, steps=3600)


def planned(monkeypatch, experiment, *found: Counts, gpus=(8, 16), recomputed=()):
    def counts(experiment, samples, *, checkpoint):
        assert samples == sorted({1, *(64 // n for n in gpus)})
        return list(recomputed) if checkpoint else list(found)

    monkeypatch.setattr(plan, "counts", counts)
    return list(rows(experiment, gpus, ASSUMED))


def test_times_of_a_plan(monkeypatch, experiment) -> None:
    """8 samples a GPU at 5e11 operations a second; sums cross machines from 9 GPUs up."""
    copies = counted(1, 1.0, gathered=0, summed=10**6)
    on_8, on_16 = planned(monkeypatch, experiment, copies)
    assert on_8.compute == pytest.approx(8 * 1e9 / 5e11)
    assert on_16.compute == pytest.approx(4 * 1e9 / 5e11)
    assert on_8.communication == pytest.approx(2 * 1e6 * 7 / 8 / 1e9)
    assert on_16.communication == pytest.approx(2 * 1e6 * 15 / 16 / 1e8)
    assert on_8.hours == pytest.approx(on_8.compute + on_8.communication)
    assert (on_8.samples, on_16.samples) == (8, 4)
    assert on_8.gib == pytest.approx(8 + 2)


def test_shards_gather_in_every_micro_batch(monkeypatch, experiment) -> None:
    """Memory holds four of eight samples; two machines hold two copies."""
    shards = counted(8, 2.0, gathered=10**6, summed=10**5)
    on_8, on_16 = planned(monkeypatch, experiment, shards)
    assert (on_8.samples, on_16.samples) == (4, 4)
    assert on_8.communication == pytest.approx((2 + 0.5) * 1e6 / 1e9)
    assert on_16.communication == pytest.approx((1 + 0.5) * 1e6 / 1e9 + 2 * 1e5 / 2 / 1e8)


def test_the_fastest_division_that_fits(monkeypatch, experiment) -> None:
    copies = counted(1, 1.0, gathered=0, summed=10**6)
    shards = counted(8, 1.0, gathered=2 * 10**6, summed=10**5)
    found = planned(monkeypatch, experiment, copies, shards)
    assert [row.shard for row in found] == [1, 8]


def test_checkpointing_where_nothing_else_fits(monkeypatch, experiment) -> None:
    large, small = (counted(1, gib, gathered=0, summed=1) for gib in (20.0, 1.0))
    need = dataclasses.replace(small.need, checkpoint=True)
    small = dataclasses.replace(small, need=need)
    assert planned(monkeypatch, experiment, large, recomputed=[large]) == []
    found = planned(monkeypatch, experiment, large, recomputed=[small])
    assert [row.checkpoint for row in found] == [True, True]


def test_what_a_plan_counts() -> None:
    wide = lazy(EDMDenoiser, model=lazy(ToyMLP, data_dim=2, width=64, depth=2))
    copies, shards = plan.counts(toy(batch_size=128, network=wide), [1, 2], checkpoint=False)
    assert copies.gathered == copies.scattered == 0
    weights = 4 * copies.parameters
    assert copies.whole == pytest.approx(weights, rel=1e-6)
    assert shards.whole == pytest.approx(weights / 8, rel=0.3)  # rows do not divide by eight
    assert shards.gathered == pytest.approx(3 * weights * 7 / 8, rel=0.3)
    assert copies.flops == shards.flops > 4 * copies.parameters


def shown() -> str:
    [block] = re.findall(r"<!-- plan -->\n(.*?)\n<!-- end of plan -->", PAGE.read_text(), re.DOTALL)
    return block


def test_the_page_shows_a_plan() -> None:
    """Times of each row follow from its counts and the assumptions below it."""
    lines = shown().splitlines()
    assert lines[-1] == plan.told(plan.ASSUMED)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:-2]]
    assert len(cells) == 9
    for row in cells:
        samples, steps, gpus = (int(row[n].replace(",", "")) for n in (3, 4, 5))
        rate = plan.ASSUMED.flops * plan.ASSUMED.fraction
        compute = float(row[2].replace(",", "")) * 1e9 * samples / gpus / rate
        said = [float(row[n].removesuffix(" ms")) / 1e3 for n in (9, 10)]
        assert said[0] == pytest.approx(compute, rel=0.02, abs=6e-5)
        hours = float(row[11].replace(",", ""))
        assert hours == pytest.approx(sum(said) * steps / 3600, rel=0.03, abs=0.06)


@pytest.mark.slow
def test_the_page_shows_the_plan() -> None:
    assert plan.text(plan.experiments()) == shown()


@pytest.mark.dist
def test_scaling(capsys) -> None:
    """Every division trains; what is foretold and what the formula says is what is there."""
    scaling.main(["--repeats", "2", "--only", "digits", "--batch", "32"])
    lines = capsys.readouterr().out.strip().splitlines()
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[2:]]
    assert [row[0] for row in rows] == [division.name for division in scaling.DIVISIONS]
    alone, copies, shards = ([float(cell) for cell in row[1:]] for row in rows)
    assert alone[1] == alone[3] == 1
    assert alone[5] == alone[6] == 0
    for seconds, ratio, held, _, foretold, sent, formula in (alone, copies, shards):
        assert seconds > 0
        assert 0.1 < ratio < 50
        assert foretold == pytest.approx(held, rel=0.1)
        assert sent == pytest.approx(formula, rel=0.02)
    assert shards[2] < copies[2] < alone[2]
    assert shards[5] > copies[5] > 0
