"""Every method trained by one process, by copies, by shards and by copies of shards: one result.

Losses, gradients and their norms, weights, targets, averages, optimizer state, samples, files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from fastflow.distributed import World
from fastflow.experiment import Parallel
from processes import Processes
from sharded_methods import NAMES, farthest, record_named, record_narrow, write_teachers

Found = dict[str, Tensor]

# Largest difference of a tensor over its own size, by what networks compute in (docs/parallel.md).
FP32, BF16 = 2e-5, 3e-2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    write_teachers(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[str], Found]:
    """What one process finds, once for each method."""
    found: dict[str, Found] = {}

    def of(name: str) -> Found:
        if name not in found:
            found[name] = record_named(World(), name, folder, f"{name}, alone")
        return found[name]

    return of


def check(processes: Processes, name: str, folder: Path, theirs: Found, parallel: Parallel) -> None:
    run = f"{name}, {processes.size} {parallel.shard} {parallel.micro_batch}"
    ours = processes.run(record_named, name, folder, run, parallel=parallel)[0]
    assert farthest(ours, theirs) < (FP32,)
    for file in (folder / f"{name}, alone" / "weights").glob("*.safetensors"):
        exported = load_file(folder / run / "weights" / file.name)
        assert farthest(exported, load_file(file)) < (FP32,)


@pytest.mark.parametrize("name", ["cd", "tcm", "sct", "meanflow, guided"])
def test_two_processes_train_a_shard_each(
    two: Processes, folder: Path, alone: Callable[[str], Found], name: str
) -> None:
    check(two, name, folder, alone(name), Parallel(shard=2))


@pytest.mark.dist
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_every_method(
    two: Processes, folder: Path, alone: Callable[[str], Found], name: str
) -> None:
    """Copies; and shards in micro-batches, of which the last is smaller."""
    for parallel in (Parallel(), Parallel(shard=2, micro_batch=3)):
        check(two, name, folder, alone(name), parallel)


@pytest.mark.dist
@pytest.mark.parametrize("name", NAMES)
def test_four_processes_train_every_method(
    four: Processes, folder: Path, alone: Callable[[str], Found], name: str
) -> None:
    """Two copies of two shards, with checkpointing where the tangent's way allows it."""
    parallel = Parallel(shard=2, checkpoint="func.jvp" not in name)
    check(four, name, folder, alone(name), parallel)


@pytest.mark.dist
@pytest.mark.parametrize("shard", [1, 2])
def test_training_in_bfloat16_goes_the_same_way(two: Processes, tmp_path: Path, shard: int) -> None:
    """A U-Net; its losses are nearer than its gradients, whose sums have small terms left."""
    theirs = record_narrow(World(), tmp_path / "one", Parallel())
    ours = two.run(record_narrow, tmp_path / "two", Parallel(shard=shard))[0]
    assert farthest(ours, theirs) < (BF16,)
    losses = [name for name in theirs if name.startswith("loss")]
    assert farthest({n: ours[n] for n in losses}, {n: theirs[n] for n in losses}) < (1e-4,)
