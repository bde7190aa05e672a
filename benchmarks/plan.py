"""What published configurations would take on many GPUs: a plan on paper, from counts.

Counted by rehearsing a step on this machine, without its memory: operations of a sample, bytes held
and bytes sent by one process of 64. What a GPU and its links do with them is assumed (`Assumed`).
Communication is taken not to overlap computation at all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

from configs.experiments.DiT import config_mf_xl
from configs.experiments.EDM import config_cm_cifar10
from configs.experiments.EDM2 import config_scm_xl
from fastflow.counting import Traffic
from fastflow.experiment import Experiment, Parallel
from fastflow.measure import flop_counter
from fastflow.memory import GIB, NODE, RESERVE, Machine, Need
from fastflow.rehearsal import rehearse
from fastflow.tables import as_markdown

REHEARSED = 64
"""GPUs of the rehearsal: several machines of `NODE`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumed:
    """What is taken for granted of GPUs like NVIDIA's H100 SXM; rates are of one GPU.

    Attributes:
        flops: peak of bfloat16 matrix products, dense, in operations per second.
        fraction: of that peak, which a whole step reaches.
        link: bytes sent per second within a machine.
        network: bytes sent per second between machines.
        gib: memory.
    """

    flops: float = 989e12
    fraction: float = 0.3
    link: float = 300e9
    network: float = 40e9
    gib: float = 80.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What a rehearsed step of a division over `REHEARSED` GPUs counts.

    Attributes:
        need: memory.
        parameters: their number.
        flops: operations for one sample, recomputation included.
        gathered, scattered: bytes sent among the GPUs that share one copy of the weights, in every
            micro-batch and once a step.
        whole: bytes of the gradient that copies sum up.
    """

    need: Need
    parameters: int
    flops: float
    gathered: int
    scattered: int
    whole: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A configuration on so many GPUs.

    Attributes:
        parameters: of the student, their number.
        flops: operations for one sample.
        samples: at once on a GPU.
        gib: memory that each needs.
        compute, communication: seconds of a step.
    """

    experiment: Experiment
    parameters: int
    flops: float
    gpus: int
    shard: int
    checkpoint: bool
    samples: int
    gib: float
    compute: float
    communication: float

    @property
    def hours(self) -> float:
        return self.experiment.steps * (self.compute + self.communication) / 3600


ASSUMED = Assumed()


def experiments() -> tuple[Experiment, ...]:
    """Published configurations, computing in bfloat16 where they do not say so."""
    found = (config_cm_cifar10, config_mf_xl, config_scm_xl)
    return tuple(dataclasses.replace(c.experiment(), precision="bf16") for c in found)


def counts(experiment: Experiment, samples: Sequence[int], *, checkpoint: bool) -> list[Counts]:
    """With weights on every GPU, and sharded over the GPUs of a machine.

    Args:
        experiment: what is trained.
        samples: sizes of the micro-batch for which memory is measured.
        checkpoint: recompute the activations of blocks.
    """
    counter, found = flop_counter(), []
    alone = dataclasses.replace(experiment, parallel=Parallel(checkpoint=checkpoint))
    whole = rehearse(alone, 1, samples, counter)
    for shard in (1, NODE):
        traffic, replicas = Traffic(), REHEARSED // shard
        parallel = Parallel(shard=shard, checkpoint=checkpoint)
        divided = dataclasses.replace(experiment, parallel=parallel)
        step = rehearse(divided, REHEARSED, samples, traffic)
        found.append(
            Counts(
                need=Need(shard=shard, checkpoint=checkpoint, share=samples[-1], rehearsal=step),
                parameters=whole.gradients // 4,
                flops=counter.get_total_flops() / samples[-1],
                gathered=traffic.sent["gather"],
                scattered=traffic.sent["scatter"],
                whole=round(traffic.sent["sum"] * replicas / (2 * (replicas - 1))),
            )
        )
    return found


def rows(experiment: Experiment, gpus: Sequence[int], assumed: Assumed) -> Iterator[Row]:
    """The experiment on each number of GPUs, divided as takes least time of what fits.

    Blocks are checkpointed where nothing else fits.
    """
    shares = sorted({1, *(experiment.batch_size // number for number in gpus)})
    plain = counts(experiment, shares, checkpoint=False)
    recomputed = functools.cache(lambda: counts(experiment, shares, checkpoint=True))
    for number in gpus:
        fitting = _fitting(experiment, number, plain, assumed)
        fitting = fitting or _fitting(experiment, number, recomputed(), assumed)
        if fitting:
            yield min(fitting, key=lambda row: row.hours)


def _fitting(
    experiment: Experiment, gpus: int, found: Sequence[Counts], assumed: Assumed
) -> list[Row]:
    machine = Machine(gpus=gpus, gib=assumed.gib)
    share = experiment.batch_size // gpus
    most = [(_at(counted, share).most(machine), counted) for counted in found]
    return [_row(experiment, gpus, samples, of, assumed) for samples, of in most if samples]


def _at(counted: Counts, share: int) -> Need:
    return dataclasses.replace(counted.need, share=share)


def _row(experiment: Experiment, gpus: int, samples: int, of: Counts, assumed: Assumed) -> Row:
    share = experiment.batch_size // gpus
    replicas = gpus // of.need.shard
    within = share // samples * of.gathered + of.scattered
    summed = 2 * of.whole * (replicas - 1) / replicas
    between = assumed.network if gpus > NODE else assumed.link
    return Row(
        experiment=experiment,
        parameters=of.parameters,
        flops=of.flops,
        gpus=gpus,
        shard=of.need.shard,
        checkpoint=of.need.checkpoint,
        samples=samples,
        gib=_at(of, share).total(samples) / GIB,
        compute=of.flops * share / (assumed.flops * assumed.fraction),
        communication=within / assumed.link + summed / between,
    )


def text(
    planned: Sequence[Experiment],
    gpus: Sequence[int] = (8, 64, 512),
    assumed: Assumed = ASSUMED,
) -> str:
    """The plan in Markdown, and what was assumed."""
    head = (
        *("experiment", "parameters", "GFLOP a sample", "samples a step", "steps"),
        *("GPUs", "shard", "at once", "GiB", "compute", "communication", "hours", "GPU-hours"),
    )
    cells = [_cells(row) for experiment in planned for row in rows(experiment, gpus, assumed)]
    return "\n".join([as_markdown(head, cells), "", told(assumed)])


def _cells(row: Row) -> tuple[str, ...]:
    experiment = row.experiment
    return (
        experiment.name,
        f"{row.parameters / 1e6:,.1f} M",
        f"{row.flops / 1e9:,.0f}",
        f"{experiment.batch_size:,}",
        f"{experiment.steps:,}",
        str(row.gpus),
        f"{row.shard}{', checkpoint' * row.checkpoint}",
        f"{row.samples} of {experiment.batch_size // row.gpus}",
        f"{row.gib:.0f}",
        f"{row.compute * 1e3:.1f} ms",
        f"{row.communication * 1e3:.1f} ms",
        f"{row.hours:,.1f}",
        f"{row.hours * row.gpus:,.0f}",
    )


def told(assumed: Assumed) -> str:
    """The assumptions in words."""
    return (
        f"Assumed of each GPU: {assumed.flops / 1e12:g} TFLOP/s at best in bfloat16, "
        f"{assumed.fraction:.0%} of it reached; {assumed.link / 1e9:g} GB/s sent to GPUs of the "
        f"same machine, of which there are {NODE}, and {assumed.network / 1e9:g} GB/s to those of "
        f"others; {assumed.gib:g} GiB, {RESERVE / GIB:g} of them in reserve."
    )


if __name__ == "__main__":
    print(text(experiments()))
