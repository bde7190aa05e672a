"""Finite differences along a TrigFlow path: the derivative for networks that lack an exact one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastflow.errors import ConfigError
from fastflow.parts import Part
from fastflow.path import expand, scaled
from fastflow.rng import PairedRNG

Function = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathDifference(Part):
    """dF/dt by differences along x(t + h) = cos(h) x + sin(h) dx/dt, which keeps (x0, z).

    For networks that cannot be differentiated forwards. All passes share their dropout masks.

    Attributes:
        step: h / t; FastGen's 1e-3 suits float32. Near pi/2 h is cut so that t + h stays below.
        scheme: "central" costs two more passes, with an error of order h^2; "backward" one, at
            t - h, with an error of order h (rCM).
        follow: "velocity", the dx/dt of the loss; or "sample", the line of (x0, z) in distillation
            too, where it is not the teacher's path (FastGen).
    """

    exact: ClassVar[bool] = False

    step: float = 1e-3
    scheme: Literal["central", "backward"] = "central"
    follow: Literal["velocity", "sample"] = "velocity"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.step < 1:
            raise ConfigError(
                f"PathDifference.step: {self.step} given, accepted: between 0 and 1, e.g. 1e-3"
            )

    @property
    def name(self) -> str:
        """What results show."""
        kind = self.scheme if self.follow == "velocity" else f"{self.scheme}, along the sample"
        return f"finite differences ({kind}, h={self.step:g} t)"

    def __call__(
        self, f: Function, x: Tensor, t: Tensor, dxdt: Tensor, line: Tensor
    ) -> tuple[Tensor, Tensor]:
        """f(x, t) with its graph, and df/dt without: [B, ...] both.

        Args:
            f: the function.
            x, t: states [B, ...] and times [B], below pi/2.
            dxdt, line: dx/dt of the loss and of the samples' own lines, [B, ...].
        """
        direction = dxdt if self.follow == "velocity" else line
        h = torch.minimum(self.step * t, (math.pi / 2 - t) / 2)
        masks = PairedRNG.snapshot(x.device)
        out = f(x, t)

        def at(h: Tensor) -> Tensor:
            with torch.no_grad(), masks.replay():
                return f(scaled(torch.cos(h), x) + scaled(torch.sin(h), direction), t + h)

        if self.scheme == "central":
            return out, (at(h) - at(-h)) / expand(2 * h, x).to(x.dtype)
        before = scaled(torch.cos(h), out.detach()) - at(-h)
        return out, before / expand(torch.sin(h), x).to(x.dtype)
