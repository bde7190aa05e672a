"""Each benchmark runs and prints a table of sensible figures."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import data, overhead, sampling, step_time
from benchmarks.common import interleaved, median_ratio, parsed, parser, peak_memory

SMALL = ["--device", "cpu", "--threads", "1", "--repeats", "2", "--batch", "2"]
DIGITS = [*SMALL, "--only", "digits"]


def table(text: str) -> list[list[str]]:
    """The cells of each row under the title and the header."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.strip().splitlines()[2:]]


def test_step_time(capsys):
    step_time.main(DIGITS)
    denoising, cm = table(capsys.readouterr().out)
    assert [denoising[3], cm[3]] == ["denoising", "CM"]
    assert denoising[5] == denoising[7] == "1.00"
    assert 0.5 < float(cm[5]) < 10
    assert float(cm[4]) > 0


def test_step_time_runs_in_bf16(capsys):
    step_time.main([*DIGITS, "--precision", "bf16"])
    assert "bf16" in capsys.readouterr().out


def test_both_steps_of_step_time_train():
    """What is timed is a whole optimizer step with a gradient for every weight."""
    options = parsed(step_time.network_parser(""), DIGITS)
    [subject] = step_time.chosen(options)
    network = subject.network(torch.device("cpu"))
    for action in step_time.steps(subject, options, network).values():
        before = [p.detach().clone() for p in network.parameters()]
        action()
        after = list(network.parameters())
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in after)
        assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_sampling(capsys):
    sampling.main(DIGITS)
    rows = table(capsys.readouterr().out)
    assert [row[1] for row in rows] == [
        "CM, 1 step",
        "CM, 2 steps",
        "CM, 4 steps",
        "CM, 8 steps",
        "EDM Heun, 35 NFE",
    ]
    assert rows[-1][4] == "1.0x"


def test_the_heun_sampler_makes_the_calls_it_is_named_after():
    options = parsed(sampling.network_parser(""), DIGITS)
    [subject] = sampling.chosen(options)
    network, calls = subject.network(torch.device("cpu")), []
    network.register_forward_hook(lambda *_: calls.append(1))
    made = sampling.samplers(subject, options, network, batch=1)
    for name, action in made.items():
        calls.clear()
        action()
        [number] = re.findall(r"\d+", name)
        assert len(calls) == int(number), name


def test_overhead(capsys):
    overhead.main(DIGITS)
    [row] = table(capsys.readouterr().out)
    assert row[0] == "digits"
    assert row[-1] == "0", "a step of the trainer read scalars from tensors"


def test_data(capsys):
    data.main(SMALL)
    rows = table(capsys.readouterr().out)
    assert {row[1] for row in rows} == {
        "loader",
        "noise, one stream per sample",
        "noise, one stream",
    }


def test_turns_alternate_after_a_warm_up():
    order = []
    actions = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    options = parsed(parser(""), SMALL)
    seconds = interleaved(actions, options)
    assert order == ["a", "b"] * 3
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_ratios_are_taken_turn_by_turn():
    assert median_ratio([2.0, 40.0, 6.0], [1.0, 10.0, 3.0]) == 2.0


@pytest.mark.parametrize("mib", [200])
def test_peak_memory_sees_what_is_freed_again(mib):
    base = peak_memory(lambda: None, torch.device("cpu"))
    peak = peak_memory(lambda: torch.ones(mib, 2**18).sum(), torch.device("cpu"))
    assert mib * 0.9 < peak - base < mib * 1.5 or base != base  # NaN where it cannot be told
