"""What `fastflow bench-sampling` times is what it says: calls, networks, whole samplers."""

import csv
import io
import json
import math

import pytest
import torch

from fastflow.build import build_network
from fastflow.config import lazy
from fastflow.method import Frozen
from fastflow.sampling_speed import network_of, render, samplers, speeds
from fastflow.timing import Stopwatch
from fastflow.wrappers import TrigFlowNetwork, VelocityNetwork
from methods.mean_flow import MeanFlow
from methods.scm import SCM
from methods.tcm import TCM
from networks.mlp import ToyMLP
from tiny import MLP, digits, toy

CPU = torch.device("cpu")


def mlp(kind, **more):
    return lazy(kind, model=lazy(ToyMLP, data_dim=2, width=16, depth=2, **more))


EXPERIMENTS = {
    "a denoiser": toy,
    "with classes": lambda: digits(dropout=0.0),
    "two networks": lambda: toy(method=TCM(stage1=Frozen(weights="nowhere", network=MLP))),
    "trigflow": lambda: toy(method=SCM(), network=mlp(TrigFlowNetwork)),
    "two times": lambda: toy(method=MeanFlow(), network=mlp(VelocityNetwork, two_times=True)),
}


def counted(network):
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_samplers_make_the_calls_they_say(name):
    """Of any network: it needs no trained weights, nor those of companions."""
    experiment = EXPERIMENTS[name]()
    network = network_of(experiment, CPU)
    calls = counted(network)
    runs = samplers(experiment.method, network, batch=3, timed=7)
    assert {n: (run.nfe, run.timed) for n, run in runs.items()} == {
        **{
            f"{type(experiment.method).__name__}, {n} step{'s' * (n > 1)}": (n, n)
            for n in (1, 2, 4, 8)
        },
        "EDM Heun": (35, 35),
        "ancestral": (1000, 7),
    }
    for run in runs.values():
        calls.clear()
        out = run.action()
        assert len(calls) == run.timed
        assert out.shape == (3, *network.sample_shape)
        assert out.isfinite().all()
        assert not out.requires_grad


def test_the_whole_ancestral_sampler_ends_in_data():
    """With the exact denoiser of data at a point, which every sampler must reach."""

    class Point(torch.nn.Module):
        predicts, two_times, augment_dim, cond_dim, sample_shape = "denoiser", False, 0, 0, (2,)

        def __init__(self):
            super().__init__()
            self.point = torch.nn.Parameter(torch.tensor([1.0, -2.0]))

        def forward(self, x, t, cond=None, augment=None):
            return self.point.expand_as(x)

    runs = samplers(toy().method, Point(), batch=2, timed=1000)
    for name in ("EDM Heun", "ancestral"):
        expected = torch.tensor([[1.0, -2.0]] * 2).double()
        torch.testing.assert_close(runs[name].action(), expected, rtol=0, atol=1e-4)


def test_precision_is_that_of_the_blocks():
    experiment = digits(dropout=0.0)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        network, seen = network_of(experiment, CPU, precision=precision), []
        unit = network.shard_units()[0]
        convolution = next(m for m in unit.modules() if "onv" in type(m).__name__)
        convolution.register_forward_hook(lambda *a, seen=seen: seen.append(a[2].dtype))
        samplers(experiment.method, network, batch=1)["CM, 1 step"].action()
        assert seen[0] == dtype


def test_every_network_is_compiled_where_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "fastflow.sampling_speed.prepare", lambda net, device, **how: asked.append(how["compile"])
    )
    for compile in (True, False):
        network_of(EXPERIMENTS["two networks"](), CPU, compile=compile)
    assert asked == [True, True, False, False]


def test_the_network_is_the_experiments():
    network = network_of(toy(), CPU)
    expected = build_network(toy(), "network", toy().network).state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in network.state_dict().items())
    assert not network.training


class Watch(Stopwatch):
    """An action takes as many seconds as calls it made."""

    def interleaved(self, actions):
        calls = counted(self.network)
        seconds = {}
        for name, action in actions.items():
            calls.clear()
            action()
            seconds[name] = [float(len(calls))] * self.repeats
        return seconds


def test_figures_are_of_whole_samplers():
    """What was timed in part is scaled up, and says so."""
    experiment = toy()
    network = network_of(experiment, CPU)
    Watch.network = network
    found = speeds(experiment.method, network, 10, Watch(CPU), timed=20)
    by_name = {speed.sampler: speed for speed in found}
    one, ancestral = by_name["CM, 1 step"], by_name["ancestral"]
    assert (one.images_per_second, one.speed_up, one.latency) == (10, 35, 1)
    assert (ancestral.images_per_second, ancestral.latency) == (0.01, 1000)
    assert math.isclose(ancestral.speed_up, 0.035)
    assert by_name["EDM Heun"].speed_up == 1
    text = render("title", found, "text").splitlines()
    assert len(text) == 8
    assert max(map(len, text)) <= 100
    assert "20 of 1,000" in text[-1]
    assert json.loads(render("", found, "json"))[0]["nfe"] == 1
    assert len(list(csv.DictReader(io.StringIO(render("", found, "csv"))))) == 6
    assert render("", found, "markdown").count("\n") == 7


def test_turns_alternate_after_a_warm_up():
    order = []
    actions = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    for clock in ("wall", "cpu"):
        seconds = Stopwatch(CPU, clock, repeats=2).interleaved(actions)
        assert [len(times) for times in seconds.values()] == [2, 2]
    assert order == ["a", "b"] * 6
