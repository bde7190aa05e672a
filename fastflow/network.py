"""What the trainer, the methods and the samplers ask of a network."""

from __future__ import annotations

from torch import Tensor, nn

from fastflow.errors import ConfigError


class Network(nn.Module):
    """Base of every network that a method trains. Not an ABC: sharding swaps the class.

    Every tensor of a network is in its `state_dict()`, so that one built on the meta device is
    complete once that is loaded.

    Attributes:
        predicts: what `forward` returns, matched against the method's `expects`:
            "denoiser", E[x0 | x_t] for x_t = x0 + t eps with t = sigma (EDM convention), or
            "velocity", dx/dt on the linear path x_t = (1-t) x0 + t eps, t in [0, 1], or
            "trigflow", F with dx/dt = sigma_data F on the TrigFlow path, t in [0, pi/2].
        sigma_data: standard deviation of the data that the network's scalings assume.
        sample_shape: shape of one sample, without the batch dimension.
        cond_dim: width of `cond`; 0 for an unconditional network.
        augment_dim: width of `augment`; 0 for a network without augmentation labels.
        two_times: whether `forward` takes the end time `s`.
        takes_guidance: whether `forward` takes a guidance scale.
        label_dropout: probability that `forward` zeroes a class row in training.
        has_logvar: whether `logvar` is there.
    """

    predicts: str = "denoiser"
    sigma_data: float = 1.0
    sample_shape: tuple[int, ...] = ()
    cond_dim: int = 0
    augment_dim: int = 0
    two_times: bool = False
    takes_guidance: bool = False
    label_dropout: float = 0.0
    has_logvar: bool = False

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        cond: Tensor | None = None,
        augment: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict from the noisy state.

        Args:
            x: states [B, *sample_shape].
            t: times [B], never in a type narrower than float32.
            s: end times [B] for networks of two times, else None.
            cond: class rows [B, cond_dim], float; a zero row is the unconditional one.
            augment: augmentation labels [B, augment_dim], or None.
            guidance: scales w [B] of D_u + w (D_c - D_u) for networks that take one; None
                stands for 1, no guidance.

        Returns:
            The prediction [B, *sample_shape], in the type of `x`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward()")

    def logvar(self, t: Tensor) -> Tensor:
        """The learned log-variance u(t) [B] of the loss at times t [B] (arXiv 2312.02696, eq. 21).

        Raises:
            ConfigError: the network has no such head.
        """
        raise ConfigError(
            f"network: {type(self).__name__} has no log-variance head; give it one, e.g. "
            f"logvar_head=lazy(LogVariance)"
        )

    def additions(self) -> tuple[str, ...]:
        """Prefixes of the parameters that weights of the plain network lack.

        A second time, a guidance scale or a log-variance head adds parameters that leave the
        outputs as they are at the start; weights without them may be loaded as initial ones.
        """
        return ()

    def shard_units(self) -> list[nn.Module]:
        """Modules that are sharded (and checkpointed, and compiled) one by one."""
        return []

    def after_step(self) -> None:
        """Called when the initial weights are set and after each optimizer step.

        Here weights are put back where they must be, e.g. by forced weight normalisation. Sharded
        parameters hold whole rows of their first dimension.
        """
