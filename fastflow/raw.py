"""The base of raw networks F(x, c_noise, ...): what they promise their wrapper, and the checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastflow.errors import ConfigError


class Conditions(NamedTuple):
    """Checked conditions of a batch of B rows.

    Attributes:
        c_noise: first time [B], float32 or float64.
        cond: class rows [B, cond_dim] in the type of the weights.
        augment: augmentation rows [B, augment_dim] in the type of the weights.
        c_second: second time [B] like `c_noise`, or None for a network of one time.
        guidance: scales [B] like `c_noise`, or None for a network that takes none.
    """

    c_noise: Tensor
    cond: Tensor
    augment: Tensor
    c_second: Tensor | None
    guidance: Tensor | None


class RawNetwork(nn.Module):
    """A network that knows samples and labels, but no path; a wrapper makes it a `Network`.

    Called with x [B, *sample_shape], c_noise [B] in float32 or wider, cond [B, cond_dim] or None
    for zero rows, augment [B, augment_dim] or None for zero rows, c_second [B] like c_noise (given
    exactly when `two_times`), guidance [B] or None for ones. Returns [B, C or more, H, W] in the
    type of `x`; of channels after the first C (a learned variance) the wrappers take no notice.
    A second time and a guidance scale leave the initial outputs as they are, to the bit.

    Attributes:
        sample_shape: shape of one sample.
        cond_dim: width of `cond`; 0 for an unconditional network.
        augment_dim: width of `augment`; 0 for none.
        label_dropout: probability that a class row is zeroed in training.
        two_times: whether it takes `c_second`.
        takes_guidance: whether it takes `guidance`.
    """

    sample_shape: tuple[int, ...] = ()
    cond_dim: int = 0
    augment_dim: int = 0
    label_dropout: float = 0.0
    two_times: bool = False
    takes_guidance: bool = False

    def shard_units(self) -> list[nn.Module]:
        """The blocks: sharded, checkpointed and compiled one by one."""
        raise NotImplementedError(f"{type(self).__name__} does not define shard_units()")

    def additions(self) -> tuple[str, ...]:
        """Prefixes of what serves the second time and guidance; without effect at first."""
        return ()

    def after_step(self) -> None:
        """Put weights back where they must be; see `fastflow.network.Network.after_step`."""

    def conditions(
        self,
        c_noise: Tensor,
        cond: Tensor | None,
        augment: Tensor | None,
        c_second: Tensor | None,
        guidance: Tensor | None,
    ) -> Conditions:
        """Check conditions and fill in absent ones: zero rows, guidance 1.

        So every parameter takes part in every step. Class rows are dropped here in training.

        Raises:
            ConfigError: labels of another shape, a time in a narrow type, or a second time or a
                guidance scale that the network does not take or lacks.
        """
        times = {"c_noise": c_noise, "c_second": c_second, "guidance": guidance}
        for name, value in times.items():
            if value is not None:
                require_full_precision(name, value)
        kind, dtype = type(self).__name__, next(self.parameters()).dtype
        rows = label_rows("cond", cond, self.cond_dim, c_noise, dtype)
        augments = label_rows("augment", augment, self.augment_dim, c_noise, dtype)
        if (c_second is not None) != self.two_times:
            raise ConfigError(
                f"c_second: {'given' if c_second is not None else 'not given'} to {kind} with "
                f"two_times={self.two_times}"
            )
        if guidance is not None and not self.takes_guidance:
            raise ConfigError(f"guidance: given to {kind} with takes_guidance=False")
        if guidance is None and self.takes_guidance:
            guidance = torch.ones_like(c_noise)
        if self.training and self.label_dropout and self.cond_dim:
            keep = torch.rand(len(rows), 1, device=rows.device) >= self.label_dropout
            rows = rows * keep
        return Conditions(c_noise, rows, augments, c_second, guidance)


def require_full_precision(name: str, value: Tensor) -> None:
    """Raise ConfigError when a time has already been rounded to a narrow type."""
    if value.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"{name}: {value.dtype} given, torch.float32 or torch.float64 accepted; keep "
            f"times out of mixed-precision casts (cast_forward_inputs=False under FSDP)"
        )


def label_rows(
    name: str, given: Tensor | None, width: int, c_noise: Tensor, dtype: torch.dtype
) -> Tensor:
    """Label rows [B, width] in `dtype`; zeros where none are given.

    Raises ConfigError for another shape.
    """
    if given is None:
        return torch.zeros(len(c_noise), width, dtype=dtype, device=c_noise.device)
    if given.shape != (len(c_noise), width):
        raise ConfigError(
            f"{name}: shape {tuple(given.shape)} given, {(len(c_noise), width)} accepted by a "
            f"network with {name}_dim={width}"
        )
    return given.to(dtype)
