"""Divergence is never hidden: a non-finite loss or gradient stops the run, or skips the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastflow.callback import Driver
from fastflow.errors import ConfigError, DivergenceError
from fastflow.state import TrainState

# Bad steps in a row from which neither skipping nor the fp16 loss scale recovers.
PATIENCE = 50


class NonFiniteGuard(Driver):
    """Watches the loss and the gradients of every step.

    "stop" notes the first bad step on the device and looks at the note every `every` steps,
    before a checkpoint and at the end: no step waits for the device, and no checkpoint is
    written after a bad one. With the loss scale of fp16 a bad gradient is normal (the scaler
    skips the step); there it counts once 50 steps in a row have one.

    "skip" drops the gradients of a bad step before the optimizer sees them, counts it in the
    metric `skipped_steps`, and stops after 50 in a row. It waits for the device in every step.

    Place it before `GradClipCallback`, which spreads one bad value over the whole gradient.

    Args:
        every: steps between looks.
        action: what a bad step does.

    Raises:
        ConfigError: `every` below 1.
        DivergenceError: (while training) names step, metrics, parameter and the last checkpoint.
    """

    def __init__(self, every: int = 50, action: Literal["stop", "skip"] = "stop") -> None:
        if every < 1:
            raise ConfigError(f"NonFiniteGuard.every: {every} given, 1 or more accepted")
        self._every = every
        self._skips = action == "skip"
        self._skipped = 0
        self._metrics: list[str] = []
        self._note: Tensor | None = None
        self._streak: Tensor | None = None

    def before_update(self, state: TrainState) -> None:
        parameters = dict(state.networks.student.named_parameters())
        device = state.world.device
        bad = _non_finite({name: p.grad for name, p in parameters.items()}, device)
        bad_loss = ~_number(state.metrics["loss"], device).isfinite()
        self._take_note(state, bad, bad_loss)
        if self._skips:
            if state.world.sum((bad.any() | bad_loss).float()).item():
                for parameter in parameters.values():
                    parameter.grad = None
                self._skipped += 1
            state.metrics["skipped_steps"] = float(self._skipped)

    def after_update(self, state: TrainState) -> None:
        if state.step % self._every == 0:
            self._look(state)

    def before_save(self, state: TrainState) -> None:
        self._look(state)
        weights = dict(state.networks.student.named_parameters())
        bad = _non_finite(weights, state.world.device)
        if state.world.sum(bad.any().float()).item():
            wrong = [name for name, flag in zip(weights, bad.tolist(), strict=True) if flag]
            where = f", first {wrong[0]}" if wrong else " on another process"
            raise DivergenceError(
                f"step {state.step}: the update made weights non-finite{where}. {_advice(state)}"
            )

    def on_end(self, state: TrainState) -> None:
        self._look(state)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._skipped = state["skipped"]

    def _take_note(self, state: TrainState, bad: Tensor, bad_loss: Tensor) -> None:
        """Keep [step or 0, parameter or -1, metrics...] of the first failure, on the device."""
        if self._note is None or self._streak is None:
            self._metrics = sorted(state.metrics)
            self._note = torch.zeros(2 + len(self._metrics), device=bad.device).double()
            self._streak = torch.zeros((), device=bad.device)
        self._streak = (self._streak + 1) * (bad.any() | bad_loss)
        if self._skips:
            failed = self._streak >= PATIENCE
        elif state.experiment.precision == "fp16":
            failed = bad_loss | (self._streak >= PATIENCE)
        else:
            failed = bad_loss | bad.any()
        parameter = torch.where(bad.any(), bad.int().argmax(), -1)
        metrics = [state.metrics.get(name, math.nan) for name in self._metrics]
        entries = [float(state.step + 1), parameter, *metrics]
        new = torch.stack([_number(entry, bad.device) for entry in entries])
        self._note = torch.where(failed & (self._note[0] == 0), new, self._note)

    def _look(self, state: TrainState) -> None:
        """Raise on every process when one of them noted a failure."""
        if self._note is None:
            return
        table = self._note.new_zeros(state.world.size, len(self._note))
        table[state.world.rank] = self._note
        failures = [row for row in state.world.sum(table).tolist() if row[0]]
        if not failures:
            return
        step, parameter, *values = min(failures, key=lambda row: row[0])
        names = [name for name, _ in state.networks.student.named_parameters()]
        metrics = ", ".join(f"{n} {v:g}" for n, v in zip(self._metrics, values, strict=True))
        gradient = (
            f"first bad gradient: {names[int(parameter)]}"
            if parameter >= 0
            else "all gradients were finite"
        )
        often = f" ({PATIENCE} bad steps in a row)" if self._skips else ""
        raise DivergenceError(
            f"step {int(step)}: non-finite loss or gradient{often}: {metrics}; {gradient}. "
            f"{_advice(state)}"
        )


def _non_finite(tensors: Mapping[str, Tensor | None], device: torch.device) -> Tensor:
    """Which of the tensors hold a non-finite value in this process's shard, bool [P]."""
    local = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    present = {n: t.detach() for n, t in local.items() if t is not None and t.numel()}
    peaks: dict[str, Tensor] = {}
    if present:
        norms = torch._foreach_norm(list(present.values()), math.inf)
        peaks = dict(zip(present, norms, strict=True))
    zero = torch.zeros((), device=device)
    return ~torch.stack([peaks.get(name, zero).float() for name in tensors]).isfinite()


def _number(value: Tensor | float, device: torch.device) -> Tensor:
    """A float64 scalar on the device; `torch.full` fills there, where a copy would wait."""
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64).reshape(())
    return torch.full((), value, dtype=torch.float64, device=device)


def _advice(state: TrainState) -> str:
    last = state.last_checkpoint()
    # The run directory takes no other configuration, so what helps needs a new one.
    start = f" and init_from={state.run_dir}" if last else ""
    return (
        f"Last good checkpoint: {last or 'none was written'}. To go on, start with another "
        f"--run-dir{start}, and with a lower learning rate, GradClipCallback or "
        f"NonFiniteGuard(action='skip')"
    )
