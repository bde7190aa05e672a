"""Clipping of the gradient's norm."""

from __future__ import annotations

import torch

from fastflow.callback import Driver
from fastflow.distributed import full_tensor
from fastflow.errors import ConfigError
from fastflow.state import TrainState


class GradClipCallback(Driver):
    """Scales the student's gradient down to a norm, and reports the norm as `grad_norm`.

    Place it after `NonFiniteGuard`: one non-finite value spreads over the whole gradient here.

    Args:
        max_norm: largest l2 norm over all parameters; infinity only reports.

    Raises:
        ConfigError: a norm that is not positive.
    """

    def __init__(self, max_norm: float) -> None:
        if not max_norm > 0:
            raise ConfigError(
                f"GradClipCallback.max_norm: {max_norm:g} given, a value > 0 is accepted"
            )
        self._max_norm = max_norm

    def before_update(self, state: TrainState) -> None:
        parameters = state.networks.student.parameters()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_norm)
        state.metrics["grad_norm"] = full_tensor(norm)
