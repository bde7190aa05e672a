"""Each benchmark runs and prints a table of sensible figures."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from benchmarks import data, overhead, sampling, step_time, tangent
from benchmarks.common import (
    CIFAR10,
    COSTS,
    costs,
    interleaved,
    median_ratio,
    network_parser,
    parsed,
    parser,
    peak_memory,
)

SMALL = ["--device", "cpu", "--threads", "1", "--repeats", "2", "--batch", "2"]
DIGITS = [*SMALL, "--only", "digits"]
ROWS = [
    "denoising",
    "CM",
    "iCT",
    "ECT",
    "sCM, exact",
    "sCM, finite differences",
    "MeanFlow, exact",
    "MeanFlow, finite differences",
    "TCM",
]


def table(text: str) -> list[list[str]]:
    """The cells of each row under the title and the header."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.strip().splitlines()[2:]]


def test_step_time(capsys):
    step_time.main(DIGITS)
    rows = table(capsys.readouterr().out)
    assert [row[3] for row in rows] == ROWS
    assert rows[0][5] == rows[0][7] == "1.00"
    for row in rows:
        assert float(row[4]) > 0
        assert 0.1 < float(row[5]) < 50
        assert row[8:] == ["-", "-"]  # what is published is of another network


def test_step_time_shows_bounds_beside_the_network_they_are_for(capsys, monkeypatch):
    [digits] = step_time.chosen(parsed(network_parser(""), DIGITS))
    renamed = dataclasses.replace(digits, name=CIFAR10)
    monkeypatch.setattr(step_time, "chosen", lambda options: [renamed])
    step_time.main(DIGITS)
    shown = {row[3]: row[8:] for row in table(capsys.readouterr().out)}
    assert list(shown) == ROWS
    assert shown["denoising"] == ["-", "1.00"]
    assert shown["TCM"] == ["1.60", "1.85"]
    assert all(value != ["-", "-"] for value in shown.values())


def test_step_time_runs_in_bf16(capsys):
    step_time.main([*DIGITS, "--precision", "bf16"])
    assert "bf16" in capsys.readouterr().out


def test_every_step_of_step_time_trains():
    """What is timed is a whole optimizer step with a gradient for every weight of its network."""
    options = parsed(network_parser(""), DIGITS)
    [subject] = step_time.chosen(options)
    nets = step_time.students(subject, torch.device("cpu"))
    # At first the last layer hides all others, and the output does not depend on a second time.
    moved = [p for net in nets.values() for p in net.parameters()]
    torch.manual_seed(1)
    for p in moved:
        p.data.add_(0.02 * torch.randn_like(p))
    kinds = {name: method.expects for name, method in step_time.methods().items()}
    for name, action in step_time.steps(subject, options, nets).items():
        network = nets[kinds.get(name, "denoiser")]
        before = [p.detach().clone() for p in network.parameters()]
        action()
        after = list(network.parameters())
        grads = [p.grad for p in after]
        assert all(grad is not None and grad.abs().sum() > 0 for grad in grads), name
        assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True)), name


def test_the_students_of_step_time_share_their_weights():
    [subject] = step_time.chosen(parsed(network_parser(""), DIGITS))
    nets = step_time.students(subject, torch.device("cpu"))
    first, *others = [dict(net.model.named_parameters()) for net in nets.values()]
    for other in others:
        assert all(other[name] is parameter for name, parameter in first.items())
    assert [net.two_times for net in nets.values()] == [False, False, True]
    assert {kind: net.predicts for kind, net in nets.items()} == {kind: kind for kind in nets}


def test_each_step_of_step_time_makes_the_calls_it_is_named_after():
    """In rows of the batch: those with a graph, and all. TCM has no row pass twice either."""
    options = parsed(network_parser(""), [*DIGITS, "--batch", "4"])
    [subject] = step_time.chosen(options)
    nets = step_time.students(subject, torch.device("cpu"))
    rows: list[tuple[bool, int]] = []
    for net in nets.values():  # TCM's first stage is a copy with its hooks
        net.register_forward_pre_hook(
            lambda _, args: rows.append((torch.is_grad_enabled(), len(args[0])))
        )
    for name, action in step_time.steps(subject, options, nets).items():
        rows.clear()
        action()
        graph, every = sum(n for grad, n in rows if grad), sum(n for _, n in rows)
        passes = {"denoising": 1, "sCM, exact": 1, "MeanFlow, exact": 1}.get(name, 2)
        passes += name.endswith("differences")
        assert (graph, every) == (subject.batch, passes * subject.batch), name


def test_costs_are_relative_to_the_first():
    """Each action runs once for its memory and once a turn; the first one more, before all."""
    order = []
    actions = {name: lambda name=name: order.append(name) for name in ("base", "other")}
    found = costs(actions, parsed(parser(""), SMALL))
    assert order == ["base", *["base", "other"] * 3]
    assert found["base"][1] == "1.00"
    assert list(found) == ["base", "other"]
    assert all(len(cells) == len(COSTS) for cells in found.values())


def test_tangent(capsys):
    tangent.main(DIGITS)
    rows = table(capsys.readouterr().out)
    assert [row[3] for row in rows] == [
        "no tangent",
        "exact, pairs",
        "exact, dual numbers",
        "finite differences (central, h=0.005)",
        "exact, func.jvp",
    ]
    assert rows[0][5] == rows[0][7] == "1.00"
    assert all(float(row[4]) > 0 for row in rows)


def test_sampling(capsys):
    sampling.main(DIGITS)
    rows = table(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [["digits", "2"]] * 6
    assert [row[2:5] for row in rows] == [
        ["CM, 1 step", "1", "all"],
        ["CM, 2 steps", "2", "all"],
        ["CM, 4 steps", "4", "all"],
        ["CM, 8 steps", "8", "all"],
        ["EDM Heun", "35", "all"],
        ["ancestral", "1,000", "35 of 1,000"],
    ]
    assert rows[4][6] == "1x"


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
