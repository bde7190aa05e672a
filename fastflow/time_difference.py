"""A finite difference in time that keeps within the range of times, for maps of two times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastflow.errors import ConfigError
from fastflow.path import scaled
from fastflow.rng import PairedRNG
from fastflow.tangent import TangentEngine
from fastflow.tangent.engines import Function


@dataclass(frozen=True, kw_only=True)
class BoundedDifference(TangentEngine):
    """The derivative of u(z, t, r) along (dz, 1, 0) from times that stay in [t_min, t_max].

    Central where t - step > r, forward elsewhere (r = t among them), backward where t + step is
    beyond t_max: FastGen's way, with steps of 1e-4. `fastflow.tangent.FiniteDifference` is
    central everywhere. All passes draw the same dropout masks.

    Attributes:
        step: h, in units of time.
        t_min, t_max: the range of times.
    """

    exact: ClassVar[bool] = False
    compiled: ClassVar[bool] = True

    step: float
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < 2 * self.step < self.t_max - self.t_min < math.inf:
            raise ConfigError(
                f"BoundedDifference: step={self.step} given from {self.t_min} to {self.t_max}, "
                f"accepted: above 0 and less than half of that range"
            )

    @property
    def name(self) -> str:
        return f"finite differences (bounded, h={self.step:g})"

    def __call__(
        self, f: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        if len(primals) != 3 or tangents[0] is None or tangents[2] is not None:
            raise ConfigError(
                "engine: BoundedDifference given for other arguments than (z, t, r) along "
                "(dz, 1, 0); use FiniteDifference(step=...)"
            )
        (z, t, r), dz = primals, tangents[0]
        masks = PairedRNG.snapshot(z.device)
        value = f(z, t, r)  # first, as autocast keeps the weights that it casts

        def shifted(h: Tensor) -> Tensor:
            with masks.replay(), torch.no_grad():
                return f(z + scaled(h, dz), t + h, r)

        none = torch.zeros_like(t)
        up = torch.where(t + self.step <= self.t_max, self.step, none)
        free = (t - self.step > r) & (t - self.step >= self.t_min)
        down = torch.where(free | (up == 0), self.step, none)
        return value, scaled(1 / (up + down), shifted(up) - shifted(-down))
