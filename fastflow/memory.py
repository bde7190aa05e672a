"""How much memory a run needs on each GPU, before it starts: `fastflow doctor --gpus`.

Measured by `fastflow.rehearsal` for the configuration's own division of the weights and for others,
with one sample at once, with as many as configured and with all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from fastflow.errors import ConfigError
from fastflow.experiment import Experiment, Parallel
from fastflow.rehearsal import Rehearsal, rehearse
from fastflow.tables import aligned, widths

GIB = 2**30
RESERVE = 2 * GIB
"""Assumed, not measured: CUDA's context, NCCL's buffers, work spaces of kernels, fragments."""

NODE = 8
"""GPUs of one machine, over which weights may be sharded while machines hold copies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs that train together.

    Attributes:
        gpus: their number, over all machines.
        gib: memory of each, in GiB; cards sold as 80 GB have about that many.
    """

    gpus: int
    gib: float

    @property
    def text(self) -> str:
        return f"{self.gpus} x {self.gib:g} GiB"

    @property
    def count(self) -> str:
        return "1 GPU" if self.gpus == 1 else f"{self.gpus} GPUs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """What a division of the weights needs on each GPU.

    Attributes:
        shard, checkpoint: see `fastflow.experiment.Parallel`.
        share: samples of a step that fall to one GPU.
        rehearsal: the step that was measured.
    """

    shard: int
    checkpoint: bool
    share: int
    rehearsal: Rehearsal

    def total(self, samples: int) -> int:
        """Bytes with so many samples at once."""
        step = self.rehearsal
        working = step.working(samples)
        if samples < self.share:
            working += step.accumulated
        return step.lasting + max(working, step.gradients + step.update) + RESERVE

    def most(self, machine: Machine) -> int:
        """Most samples at once that fit, of those that divide the share; 0 where none do."""
        fitting = (n for n in _divisors(self.share) if self.total(n) <= machine.gib * GIB)
        return max(fitting, default=0)

    def settings(self, samples: int, asked: Parallel) -> str:
        """The overrides that lead from `asked` to here, with so many samples at once."""
        changes = []
        if samples != min(asked.micro_batch or self.share, self.share):
            changes.append(f"parallel.micro_batch={samples}")
        if self.shard != asked.shard:
            changes.append(f"parallel.shard={self.shard}")
        if self.checkpoint != asked.checkpoint:
            changes.append(f"parallel.checkpoint={str(self.checkpoint).lower()}")
        return " ".join(changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an experiment needs on a machine.

    Attributes:
        experiment, machine: which.
        samples: samples at once on each GPU, as configured.
        needs: of the configured division of the weights, then of others.
    """

    experiment: Experiment
    machine: Machine
    samples: int
    needs: tuple[Need, ...]

    @property
    def total(self) -> int:
        """Bytes on each GPU as configured."""
        return self.needs[0].total(self.samples)

    @property
    def fits(self) -> bool:
        return self.total <= self.machine.gib * GIB

    @property
    def verdict(self) -> str:
        """Whether it fits, and the least change that does."""
        spare = self.machine.gib - self.total / GIB
        if self.fits:
            return f"fits {self.machine.text} with {spare:.1f} GiB to spare"
        text = f"does not fit {self.machine.text}, by {-spare:.1f} GiB"
        change = self.least_change()
        if change is None:
            return f"{text}; nor does any other choice of parallel.*: take more GPUs or larger ones"
        return f"{text}; the least change that does: {change}"

    def least_change(self) -> str | None:
        """Overrides that make it fit: few, of those the one with most samples at once."""
        parallel = self.experiment.parallel
        found = []
        for order, need in enumerate(self.needs):
            most = min(need.most(self.machine), self.samples)
            if most:
                change = need.settings(most, parallel)
                found.append((len(change.split()), order, change))
        return min(found)[2] if found else None

    @property
    def text(self) -> str:
        """Tables and verdict."""
        return "\n".join([*self._items(), "", *self._choices(), "", self.verdict])

    def _items(self) -> Iterator[str]:
        need, step = self.needs[0], self.needs[0].rehearsal
        rest = self.total - step.lasting - step.gradients - RESERVE
        rows = [
            ("parameters", step.parameters, ""),
            ("gradients", step.gradients, ""),
            ("optimizer state", step.optimizer, ""),
            ("EMA copies", step.emas, ""),
            ("frozen networks, targets", step.companions, ""),
            ("activations, gathered weights", rest, ""),
            ("reserve", RESERVE, "assumed: CUDA, NCCL, work spaces"),
            ("total", self.total, ""),
        ]
        divided = f"{self.samples} of {need.share} samples at once"
        precision = self.experiment.precision
        yield (
            f"{self.experiment.name} on {self.machine.count}, {precision}, shard {need.shard}, "
            f"{divided}{', checkpointing' if need.checkpoint else ''}"
        )
        yield "GiB on each GPU"
        for name, size, note in rows:
            yield f"  {name:<29}  {size / GIB:7.2f}  {note}".rstrip()

    def _choices(self) -> Iterator[str]:
        head = ("shard", "checkpoint", f"GiB with {self.samples}", "most at once", "GiB")
        rows = []
        for need in self.needs:
            most = need.most(self.machine)
            rows.append(
                (
                    str(need.shard),
                    "yes" if need.checkpoint else "no",
                    f"{need.total(self.samples) / GIB:.1f}",
                    f"{most} of {need.share}" if most else "none",
                    f"{need.total(most) / GIB:.1f}" if most else "-",
                )
            )
        columns = widths(head, rows)
        yield f"parallel.*, and the most samples at once that fit in {self.machine.gib:g} GiB"
        yield from (aligned(row, columns) for row in (head, *rows))


def estimate(experiment: Experiment, machine: Machine) -> Estimate:
    """Measure what an experiment needs, as it is and with other choices of `parallel`.

    Raises:
        ConfigError: the batch or the weights cannot be divided so, or the experiment cannot work.
    """
    gpus, parallel = machine.gpus, experiment.parallel
    if experiment.batch_size % gpus:
        raise ConfigError(
            f"batch_size: {experiment.batch_size} given, accepted: a positive multiple of the "
            f"{machine.count}, as each takes an equal share"
        )
    share = experiment.batch_size // gpus
    samples = min(parallel.micro_batch or share, share)
    first = _need(experiment, machine, parallel.shard, parallel.checkpoint, samples)
    others = [
        _need(experiment, machine, shard, checkpoint, samples)
        for shard in sorted({parallel.shard, 1, math.gcd(gpus, NODE), gpus})
        for checkpoint in ((False, True) if first.rehearsal.units else (False,))
        if (shard, checkpoint) != (parallel.shard, parallel.checkpoint)
    ]
    return Estimate(experiment=experiment, machine=machine, samples=samples, needs=(first, *others))


def _need(
    experiment: Experiment, machine: Machine, shard: int, checkpoint: bool, samples: int
) -> Need:
    parallel = dataclasses.replace(experiment.parallel, shard=shard, checkpoint=checkpoint)
    changed = dataclasses.replace(experiment, parallel=parallel)
    share = experiment.batch_size // machine.gpus
    return Need(
        shard=shard,
        checkpoint=checkpoint,
        share=share,
        rehearsal=rehearse(changed, machine.gpus, sorted({1, samples, share})),
    )


def _divisors(number: int) -> Sequence[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
