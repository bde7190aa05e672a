"""What memory a configuration needs, which other choices fit, and how the doctor says it."""

from __future__ import annotations

import dataclasses

import pytest

from fastflow import cli, memory
from fastflow.config import save_yaml
from fastflow.errors import ConfigError
from fastflow.experiment import Parallel
from fastflow.memory import GIB, RESERVE, Estimate, Machine, Need, estimate
from fastflow.rehearsal import Rehearsal
from tiny import digits, toy

SHARE = 64


def step(*, fixed: float = 10.0, per_sample: float = 1.0, parameters: float = 1.0) -> Rehearsal:
    """4 GiB that last, 10 + 1 a sample while it works."""
    return Rehearsal(
        parameters=int(parameters * GIB),
        gradients=GIB,
        optimizer=2 * GIB,
        emas=GIB,
        companions=0,
        measured={n: int((fixed + n * per_sample) * GIB) for n in (1, 32, 64)},
        accumulated=GIB,
        update=GIB,
        units=3,
    )


def need(shard: int = 1, checkpoint: bool = False, **changes: float) -> Need:
    return Need(shard=shard, checkpoint=checkpoint, share=SHARE, rehearsal=step(**changes))


def of(*needs: Need, gib: float, micro_batch: int | None = None) -> Estimate:
    parallel = Parallel(
        shard=needs[0].shard, checkpoint=needs[0].checkpoint, micro_batch=micro_batch
    )
    return Estimate(
        experiment=digits(batch_size=8 * SHARE, parallel=parallel),
        machine=Machine(gpus=8, gib=gib),
        samples=min(micro_batch or SHARE, SHARE),
        needs=needs,
    )


def test_a_need_grows_with_the_samples_and_with_gradients_that_wait() -> None:
    assert need().total(64) == (4 + 10 + 64) * GIB + RESERVE
    assert need().total(16) == (4 + 10 + 16 + 1) * GIB + RESERVE
    assert need(fixed=1, per_sample=0).total(64) == (4 + 1 + 1) * GIB + RESERVE, "the update"


def test_between_sizes_lie_straight_lines() -> None:
    bent = dataclasses.replace(step(), measured={1: 4 * GIB, 3: 5 * GIB, 5: 9 * GIB})
    assert [bent.working(n) / GIB for n in range(1, 7)] == [4, 4.5, 5, 7, 9, 11]
    assert dataclasses.replace(bent, measured={1: GIB}).working(1) == GIB


def test_the_most_samples_that_fit_divide_the_share() -> None:
    assert need().most(Machine(gpus=8, gib=80)) == 64
    assert need().most(Machine(gpus=8, gib=79)) == 32
    assert need().most(Machine(gpus=8, gib=20)) == 2
    assert need().most(Machine(gpus=8, gib=17)) == 0


def test_what_fits() -> None:
    found = of(need(), gib=90)
    assert found.fits
    assert found.verdict == "fits 8 x 90 GiB with 10.0 GiB to spare"


@pytest.mark.parametrize(
    ("needs", "gib", "change"),
    [
        ((need(),), 60, "parallel.micro_batch=32"),
        ((need(), need(8, parameters=0)), 60, "parallel.micro_batch=32"),
        ((need(), need(8, fixed=20, per_sample=0)), 17, "none"),
        ((need(), need(8, fixed=20, per_sample=0)), 30, "parallel.micro_batch=8"),
        ((need(fixed=58), need(8, fixed=20, per_sample=0)), 30, "parallel.shard=8"),
        ((need(), need(1, True, fixed=7, per_sample=0)), 16, "parallel.checkpoint=true"),
        (
            (need(fixed=90), need(8), need(1, True, fixed=7, per_sample=0)),
            60,
            "parallel.checkpoint=true",
        ),
        (
            (need(fixed=58), need(8, True, fixed=10)),
            60,
            "parallel.micro_batch=32 parallel.shard=8 parallel.checkpoint=true",
        ),
        (
            (need(8, True, fixed=168), need(1, False)),
            81,
            "parallel.shard=1 parallel.checkpoint=false",
        ),
    ],
)
def test_the_least_change_that_fits(needs: tuple[Need, ...], gib: float, change: str) -> None:
    found = of(*needs, gib=gib)
    assert not found.fits
    if change == "none":
        assert found.verdict.endswith(
            "nor does any other choice of parallel.*: take more GPUs or larger ones"
        )
    else:
        assert f"the least change that does: {change}" in found.verdict


def test_the_tables_add_up() -> None:
    lines = of(need(), need(8, parameters=0.125), gib=60, micro_batch=16).text.splitlines()
    sizes = [
        float(line.removesuffix("  assumed: CUDA, NCCL, work spaces").split()[-1])
        for line in lines[2:10]
    ]
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1])
    assert "16 of 64 samples at once" in lines[0]
    assert [line.split() for line in lines[12:15]] == [
        ["shard", "checkpoint", "GiB", "with", "16", "most", "at", "once", "GiB"],
        ["1", "no", "33.0", "32", "of", "64", "49.0"],
        ["8", "no", "32.1", "32", "of", "64", "48.1"],
    ]


def test_an_estimate_measures_each_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rehearse(experiment, processes, samples):
        parallel = experiment.parallel
        asked.append((parallel.shard, parallel.checkpoint, processes, tuple(samples)))
        return step()

    monkeypatch.setattr(memory, "rehearse", rehearse)
    experiment = digits(batch_size=64, parallel=Parallel(shard=4, micro_batch=2))
    found = estimate(experiment, Machine(gpus=16, gib=80))
    choices = [(shard, recompute) for shard in (1, 4, 8, 16) for recompute in (False, True)]
    choices.remove((4, False))
    assert asked == [(*choice, 16, (1, 2, 4)) for choice in [(4, False), *choices]]
    assert found.samples == 2
    assert found.needs[0].share == 4


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size: 8 given, accepted: a positive multiple of"):
        estimate(digits(), Machine(gpus=3, gib=80))


@pytest.fixture
def call(capsys, tmp_path):
    """Ask the doctor about a small configuration."""

    def run(*words, experiment=None):
        path = tmp_path / "config.yaml"
        save_yaml(experiment or toy(), path)
        try:
            status = cli.main(["doctor", *[word.replace("CONFIG", str(path)) for word in words]])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return run


def test_the_doctor_estimates_without_data_and_weights(call) -> None:
    experiment = toy(init_from="nowhere.safetensors")
    status, out, err = call("--config", "CONFIG", "--gpus", "1", experiment=experiment)
    assert (status, err) == (0, [])
    assert "fits 1 x 80 GiB with 78.0 GiB to spare" in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_doctor_says_what_does_not_fit(call) -> None:
    words = ("--config", "CONFIG", "--gpus", "1", "--gpu-memory", "1.5", "parallel.micro_batch=8")
    status, out, err = call(*words)
    assert (status, err) == (2, [])
    assert "8 of 16 samples at once" in out
    assert "does not fit 1 x 1.5 GiB, by 0.5 GiB; nor does any other choice" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus", "8"), "--gpus: given without --config"),
        (("--gpu-memory", "80"), "--gpu-memory: given without --gpus"),
        (("--config", "CONFIG", "--gpus", "0"), "'0' given, accepted: a whole number from 1 up"),
        (("--config", "CONFIG", "--gpus", "1", "--gpu-memory", "-1"), "accepted: GiB, above 0"),
        (("--config", "CONFIG", "--gpus", "3"), "batch_size: 16 given"),
        (("--config", "CONFIG", "--gpus", "4", "parallel.shard=3"), "parallel.shard: 3 given"),
        (("--config", "CONFIG", "--gpus", "1", "batchsize=4"), "'batch_size'"),
    ],
)
def test_mistakes(call, words, said) -> None:
    status, out, [line] = call(*words)
    assert (status, out) == (2, "")
    assert said in line
