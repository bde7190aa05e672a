"""What the trainer, the methods and the samplers ask of a network."""

from __future__ import annotations

from torch import Tensor, nn


class Network(nn.Module):
    """Base of every network that a method trains. Not an ABC: sharding swaps the class.

    Attributes:
        predicts: what `forward` returns, matched against the method's `expects`:
            "denoiser", E[x0 | x_t] for x_t = x0 + t eps with t = sigma (EDM convention), or
            "velocity", dx/dt on the linear path x_t = (1-t) x0 + t eps, t in [0, 1].
        sample_shape: shape of one sample, without the batch dimension.
        cond_dim: width of `cond`; 0 for an unconditional network.
        two_times: whether `forward` takes the end time `s`.
    """

    predicts: str = "denoiser"
    sample_shape: tuple[int, ...] = ()
    cond_dim: int = 0
    two_times: bool = False

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        cond: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Predict from the noisy state.

        Args:
            x: states [B, *sample_shape].
            t: times [B], never in a type narrower than float32.
            s: end times [B] for networks of two times, else None.
            cond: class rows [B, cond_dim], float; a zero row is the unconditional one.
            augment: augmentation labels [B, augment_dim], or None.

        Returns:
            The prediction [B, *sample_shape], in the type of `x`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward()")

    def shard_units(self) -> list[nn.Module]:
        """Modules that are sharded (and checkpointed, and compiled) one by one."""
        return []

    def after_step(self) -> None:
        """Called after each optimizer step, e.g. for forced weight normalisation."""
