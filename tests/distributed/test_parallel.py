"""What division over processes promises: memory at the start, communication, types, one result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastflow.distributed import World, full_tensor, reshard, shard
from fastflow.ema import EMA, ConstantEMA
from fastflow.errors import ConfigError
from fastflow.experiment import Parallel
from fastflow.network import Network
from fastflow.tangent import DualNumbers, FunctionalJVP, Pairs, TangentEngine, value_and_jvp
from methods.tcm import Truncated
from processes import Processes
from sharded_methods import (
    build_parts,
    communication,
    error,
    evaluated,
    mistake,
    record_named,
    write_teachers,
)
from sharded_networks import FAMILIES, backward, gather, inputs, make, sharded

ENGINES = [Pairs(), DualNumbers(), FunctionalJVP()]


@pytest.fixture
def alone() -> Iterator[World]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World()
    finally:
        dist.destroy_process_group()


def gradients(network: Network) -> Tensor:
    """All of them, whole, in one vector."""
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    return torch.cat([full_tensor(grad).flatten() for grad in grads])


# Initial weights


def test_processes_start_from_the_weights_of_one_and_hold_no_more_than_their_shards(
    two: Processes, tmp_path: Path
) -> None:
    """A student from a file, its target and a frozen teacher."""
    wanted, _ = build_parts(World(), tmp_path)
    built = two.run(build_parts, tmp_path)
    for weights, _ in built:
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    _, (_, other) = built
    # Its half, and every tensor once on its way; of those the present one and, while gloo lets go
    # of it, the one before.
    assert other.made < 1.5 * other.whole + other.largest
    assert other.whole / 2 < other.peak < other.whole / 2 + 3 * other.largest


def test_weights_that_are_not_there_end_every_process(two: Processes, tmp_path: Path) -> None:
    write_teachers(tmp_path)
    first, second = two.run(mistake, tmp_path)
    assert "none.safetensors do not exist" in first
    assert first == second


class Tied(Network):
    sample_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight


def test_a_tensor_of_two_modules_is_refused() -> None:
    """On the meta device it would become two, which would then learn apart."""
    with pytest.raises(ConfigError, match=r"Tied holds one tensor as 'first\.weight' and as"):
        shard(Tied(), World(size=2), 2)


# Communication


def test_gradients_are_summed_once_a_step_and_averages_never(
    two: Processes, tmp_path: Path
) -> None:
    """However many micro-batches there are; a target and an EMA move between the sums."""
    write_teachers(tmp_path)
    whole, _ = two.run(communication, tmp_path, Parallel(shard=2))[0]
    divided, after = two.run(communication, tmp_path, Parallel(shard=2, micro_batch=2))[0]
    assert divided == whole == 3  # two blocks and the root
    assert after == []


def test_weights_of_blocks_are_gathered_in_bfloat16(two: Processes) -> None:
    gathered, summed = two.run(gather, "dit")[0]
    wide = [dtype == torch.float32 for dtype in gathered]
    assert sum(wide) == 3  # the root: forward, backward and the head
    assert wide.count(False) == 4  # two blocks, forward and backward
    assert set(summed) == {torch.float32}


# Types


@pytest.mark.parametrize("family", FAMILIES)
def test_only_blocks_are_narrow(alone: World, family: str) -> None:
    """Their weights where they compute; not times, embeddings, the root, gradients or shards."""
    network = sharded(family, alone, narrow=torch.bfloat16)
    units = network.shard_units()
    inside = {module for unit in units for module in unit.modules()}
    seen: dict[str, set[torch.dtype]] = {"blocks": set(), "root": set(), "labels": set()}

    def note(module: nn.Module, args: tuple[Tensor | None, ...]) -> None:
        kind = "blocks" if module in inside else "root"
        seen[kind].update(p.dtype for p in module.parameters(recurse=False))
        if module in units:
            _, embedding = args
            seen["labels"].add(embedding.dtype)
        if module is network.model:
            seen["labels"].update(arg.dtype for arg in args if arg is not None)

    for module in network.modules():
        module.register_forward_pre_hook(note)
    out = backward(network, inputs(network))
    assert seen == {
        "blocks": {torch.bfloat16},
        "root": {torch.float32},
        "labels": {torch.float32},
    }
    shards = list(network.parameters())
    assert {p.dtype for p in shards} == {p.grad.dtype for p in shards} == {torch.float32}
    assert out.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_blocks_compute_what_autocast_does(alone: World, family: str) -> None:
    whole, parts = make(family), sharded(family, alone, narrow=torch.bfloat16)
    shard(whole, World(), 1, narrow=torch.bfloat16)
    rows = inputs(whole)
    outs = [backward(network, rows) for network in (whole, parts)]
    assert error(outs[1], make(family)(*rows)) > 1e-4  # in bfloat16 at all
    if family == "edm2":  # which uses its weights normalised, hence rounds them once more
        assert error(outs[1], outs[0]) < 1e-2
    else:
        assert torch.equal(outs[1], outs[0])
    assert error(*(gradients(network) for network in (parts, whole))) < 1e-2


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
@pytest.mark.parametrize("family", ["ddpmpp", "edm2", "dit"])
def test_tangents_of_narrow_blocks(alone: World, family: str, engine: TangentEngine) -> None:
    """Those of autocast, and so are the gradients of the value."""
    x, t, s, *rest = inputs(make(family))
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    found = []
    whole, parts = make(family), sharded(family, alone, narrow=torch.bfloat16)
    shard(whole, World(), 1, narrow=torch.bfloat16)
    for network in (whole, parts):

        def f(x: Tensor, t: Tensor, s: Tensor, network: Network = network) -> Tensor:
            out: Tensor = network(x, t, s, *rest)
            return out

        value, tangent = value_and_jvp(f, (x, t, s), (v, torch.ones_like(t), None), engine)
        value.square().mean().backward()
        found.append((value, tangent, gradients(network)))
        with torch.no_grad():  # what tangents leave behind can be averaged
            value_and_jvp(f, (x, t, s), (v, torch.ones_like(t), None), engine)
        reshard(network)
    assert all(isinstance(p, DTensor) for p in network.parameters())
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert error(ours, theirs) < 2e-2 if family == "edm2" else 5e-3


def test_averages_are_in_float32_whatever_the_weights_are_in(alone: World) -> None:
    network = sharded("dit", alone)
    kept = {name: full_tensor(v).clone() for name, v in network.bfloat16().state_dict().items()}
    ema = EMA(network, ConstantEMA(beta=0.9))
    averages = ema.state_dict()
    assert all(isinstance(averages[name], DTensor) for name, _ in network.named_parameters())
    assert {averages[name].dtype for name, _ in network.named_parameters()} == {torch.float32}
    with ema.swapped_into(network):
        assert next(network.parameters()).dtype == torch.bfloat16
    for name, value in network.state_dict().items():
        assert torch.equal(full_tensor(value), kept[name]), name


# Sampling


def test_what_a_method_samples_with_is_sharded_again(alone: World) -> None:
    """Where a root stays whole after a forward pass, as torch does unless told otherwise."""
    above, below = sharded("mlp", alone), sharded("mlp", alone)
    rows = inputs(above)
    for network in (above, below):
        network.set_reshard_after_forward(False)
        with torch.no_grad():
            network(*rows)
        assert not all(isinstance(p, DTensor) for p in network.parameters())
    reshard(Truncated(above, below, 1.0))
    for network in (above, below):
        assert all(isinstance(p, DTensor) for p in network.parameters())


@pytest.mark.dist
def test_evaluation_gives_the_same_numbers(two: Processes, tmp_path: Path) -> None:
    record_named(World(), "flow matching", tmp_path, "run")
    wanted = evaluated(World(), tmp_path / "run")
    first, second = two.run(evaluated, tmp_path / "run")
    assert first == second == wanted
