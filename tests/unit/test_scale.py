"""What large networks need: building on the meta device, compiled units, and their summary."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from callback_state import Tiny, begin, make_state
from callbacks.model_summary import ModelSummary
from fastflow import distributed
from fastflow.build import Parts
from fastflow.config import build, override
from fastflow.distributed import World, materialise, shard
from fastflow.errors import ConfigError
from fastflow.experiment import Parallel
from fastflow.method import Networks
from fastflow.network import Network
from fastflow.tangent import DualNumbers, FunctionalJVP, Pairs, value_and_jvp
from networks.presets import with_model
from sharded_networks import FAMILIES, backward, inputs, make
from tiny import assert_same, toy, toy_with_target, train

CPU = torch.device("cpu")
# Traces everything, and fails where it cannot; compiles nothing.
TRACER: dict[str, Any] = {"backend": "eager", "isolate_recompiles": True, "fullgraph": True}
REAL = distributed._COMPILER


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_COMPILER", TRACER)


# The meta device


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_all_there_is_to_a_network(family: str) -> None:
    """Nothing that was computed when a network was built is lost on the meta device."""
    original = make(family)
    with torch.device("meta"):
        network: Network = build(FAMILIES[family])
    assert all(p.is_meta for p in network.parameters())
    materialise(network.eval(), original.state_dict(), CPU)
    tensors = dict(original.named_parameters()) | dict(original.named_buffers())
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        assert torch.equal(value, tensors[name]), name
    rows = inputs(original)
    with torch.no_grad():
        assert torch.equal(network(*rows), original(*rows))
        assert torch.equal(network.logvar(rows[1]), original.logvar(rows[1]))


def test_tensors_outside_of_the_weights_are_refused() -> None:
    with torch.device("meta"):
        network = Tiny()
    text = "Tiny holds 'fixed' outside of its state_dict"
    with pytest.raises(ConfigError, match=text):
        materialise(network, Tiny().state_dict(), CPU)
    assert network.first.weight.is_meta


def test_a_target_starts_as_the_student() -> None:
    networks = Parts.of(toy_with_target(), World()).networks
    student = networks.student.state_dict()
    target = networks["target"].state_dict()
    assert student.keys() == target.keys()
    assert all(torch.equal(target[name], student[name]) for name in student)
    assert not any(p.requires_grad for p in networks["target"].parameters())


# Compiling


def assert_near(a: Tensor, b: Tensor) -> None:
    """To the rounding of sums, measured by the whole: single entries may be next to nothing."""
    assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def check_compiled(family: str, *, recompute: bool) -> None:
    """With dropout where the family has it: masks are the same too."""
    node = FAMILIES[family]
    if "dropout" in node.model.kwargs:
        node = with_model(node, dropout=0.5)
    plain, compiled = build(node), build(node)
    plain.load_state_dict(make(family).state_dict())
    compiled.load_state_dict(plain.state_dict())
    shard(compiled, World(), 1, recompute=recompute, compile=True)
    rows = inputs(plain)
    outs = []
    for network in (plain.train(), compiled.train()):
        torch.manual_seed(0)
        outs.append(backward(network, rows))
        torch.manual_seed(0)
        with torch.no_grad():  # another graph, the same masks
            assert_near(network(*rows), outs[-1])
    assert_near(outs[1], outs[0])
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert_near(q.grad, p.grad)


def test_units_are_traced_whole_and_change_nothing() -> None:
    check_compiled("mlp", recompute=True)


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x.sin(), 0.5)


class DroppingNetwork(Network):
    """One unit, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = Dropping()

    def forward(self, x: Tensor, t: Any = None, *_: Any, **__: Any) -> Tensor:
        return self.unit(x)

    def shard_units(self) -> list[nn.Module]:
        return [self.unit]


def test_recomputed_compiled_units_drop_the_same_twice() -> None:
    grads = []
    for compile in (False, True):
        network = DroppingNetwork()
        shard(network, World(), 1, recompute=True, compile=compile)
        x = torch.linspace(0, 1, 64).requires_grad_()
        torch.manual_seed(0)
        network(x).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_units_of_every_family_are_traced_whole(family: str) -> None:
    check_compiled(family, recompute=True)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_units_give_the_same_to_rounding(
    family: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "_COMPILER", REAL)
    check_compiled(family, recompute=recompute)


@pytest.mark.parametrize("engine", [Pairs(), DualNumbers(), FunctionalJVP()], ids=str)
def test_tangents_pass_compiled_units(engine: Any) -> None:
    plain, compiled = make("dit"), make("dit")
    shard(compiled, World(), 1, compile=True)
    x, t, s, *rest = inputs(plain)
    tangents = (torch.ones_like(x), torch.ones_like(t))
    results = [
        value_and_jvp(lambda x, t, net=net: net(x, t, s, *rest), (x, t), tangents, engine)
        for net in (plain, compiled)
    ]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert results[1][1].abs().max() > 0


def test_compiled_units_are_given_contiguous_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler of CPUs gives wrong gradients of others."""
    strides = []

    def backend(graph: Any, example: list[Any]) -> Any:
        strides.extend(a.is_contiguous() for a in example if isinstance(a, Tensor))
        return graph.forward

    monkeypatch.setattr(distributed, "_COMPILER", {**TRACER, "backend": backend})
    network = make("dit")
    rows = inputs(network)
    assert not network.model.x_embedder(rows[0]).is_contiguous()
    shard(network, World(), 1, compile=True)
    network(*rows)
    assert strides
    assert all(strides)


def test_compiled_code_runs_but_not_in_forward_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def backend(graph: Any, example: Any) -> Any:
        def run(*args: Tensor) -> Any:
            runs.append(1)
            return graph.forward(*args)

        return run

    monkeypatch.setattr(distributed, "_COMPILER", {**TRACER, "backend": backend})
    network = make("mlp")
    shard(network, World(), 1, compile=True)
    runs.clear()  # of the trial
    rows = inputs(network)
    network(*rows)
    assert len(runs) == len(network.shard_units())
    with forward_ad.dual_level(), torch.no_grad():
        network(*rows)
    assert len(runs) == len(network.shard_units())


def test_training_with_compiled_blocks(tmp_path: Path) -> None:
    """From the configuration to the weights: the same bits, for nothing is really compiled."""
    experiment = toy_with_target(steps=3)
    plain = train(experiment, tmp_path / "plain")
    compiled = override(experiment, ["parallel.compile=true", "parallel.checkpoint=true"])
    assert compiled.parallel == Parallel(compile=True, checkpoint=True)
    assert_same(train(compiled, tmp_path / "compiled"), plain)


def test_student_and_companions_are_prepared_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are compiled; only the student, which is trained, is checkpointed."""
    seen = []
    monkeypatch.setattr(
        distributed, "shard", lambda network, world, size, **asked: seen.append((network, asked))
    )
    parallel = Parallel(compile=True, checkpoint=True)
    networks = Parts.of(toy_with_target(parallel=parallel), World()).networks
    assert seen == [
        (networks.student, {"recompute": True, "compile": True, "narrow": None}),
        (networks["target"], {"recompute": False, "compile": True, "narrow": None}),
    ]


class Unitless(Tiny):
    def __init__(self) -> None:
        super().__init__((3,))
        del self.fixed


@pytest.mark.parametrize("asked", ["compile", "recompute"])
def test_networks_without_units_are_refused(asked: str) -> None:
    key = {"compile": "compile", "recompute": "checkpoint"}[asked]
    text = rf"parallel\.{key}: true given, accepted for Unitless: false"
    with pytest.raises(ConfigError, match=text):
        shard(Unitless(), World(), 1, **{asked: True})


def test_a_compiler_that_fails_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, example: Any) -> Any:
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(distributed, "_COMPILER", {**TRACER, "backend": broken})
    experiment = dataclasses.replace(toy(), parallel=Parallel(compile=True))
    with pytest.raises(ConfigError, match=r"parallel\.compile: .*no C\+\+ compiler found") as info:
        Parts.of(experiment, World())
    assert "\n" not in str(info.value)


# The summary


def summary(tmp_path: Path, network: Network, **changes: Any) -> str:
    state = dataclasses.replace(make_state(tmp_path), networks=Networks(network))
    for name, value in changes.items():
        setattr(state.experiment, name, value)
    begin(state, [ModelSummary()])
    return (tmp_path / "model.txt").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_networks_with_every_condition_are_summarised(family: str, tmp_path: Path) -> None:
    network = make(family).train()
    text = summary(tmp_path, network)
    assert network.training
    rows = {line.split("(")[0].strip(): line.split() for line in text.splitlines()}
    count = sum(p.numel() for p in network.logvar_head.parameters())
    assert rows["logvar_head"][-3:] == [str(count), rows["logvar_head"][-2], "0.0000"]
    attention = "attention: flash on cpu; explicit in forward-mode differentiation"
    assert (attention in text) == (family != "mlp")
    assert ("attention:" in text) == (family != "mlp")


def test_compiled_and_checkpointed_networks_are_counted_as_plain_ones(tmp_path: Path) -> None:
    plain = summary(tmp_path, make("dit"))
    network = make("dit")
    shard(network, World(), 1, recompute=True, compile=True)
    assert summary(tmp_path, network) == plain
    assert summary(tmp_path, network, precision="bf16") == plain


def test_fused_attention_counts(tmp_path: Path) -> None:
    """Scores and values: 2 tokens^2 width products in each of the blocks."""
    network = make("dit")
    text = summary(tmp_path, network)
    explicit: nn.Module = build(with_model(FAMILIES["dit"], attention="explicit"))
    other = summary(tmp_path, explicit)
    assert text.splitlines()[:-1] == other.splitlines()[:-1]
    assert other.splitlines()[-1] == "attention: explicit on cpu"
