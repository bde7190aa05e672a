"""Exponential moving averages of weights: decay laws, the averages, post-hoc reconstruction.

A law gives the decay beta of one update, ema <- beta ema + (1 - beta) weights, from the `Progress`
*after* the optimizer step, so the first update sees `step == 1`. NVIDIA's EDM2 and FastGen count
the same way, and their formulas agree; they differ around them:

- FastGen's `start_iter` is `EMA(start_step=...)`; EDM2 has none (0);
- FastGen's `type: power` takes gamma, EDM2's presets take std: `PowerEMA` accepts either;
- half-life ramp-up: EDM2 uses `rampup=0.09`, FastGen's configurations 0.05 (EDM's value) or None.

EDM (arXiv 2206.00364) ramps up with the images before the step, one batch behind these two.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastflow.distributed import full_tensor, reshard
from fastflow.errors import CheckpointError, ConfigError
from fastflow.posthoc import MAX_STD, gamma_of_std
from fastflow.progress import Progress
from fastflow.schedules import Decay


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMALaw(Decay, abc.ABC):
    """A decay law with a short name that tells it from others, e.g. in file names."""

    @property
    @abc.abstractmethod
    def label(self) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantEMA(EMALaw):
    """The same decay at every step.

    Attributes:
        beta: decay per step, in [0, 1).
        every: steps between updates, each with beta^every (py-meanflow: 16).
    """

    beta: float
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.beta < 1.0:
            raise ConfigError(f"ConstantEMA.beta: {self.beta:g} given, 0 <= beta < 1 accepted")
        if self.every < 1:
            raise ConfigError(f"ConstantEMA.every: {self.every} given, 1 or more accepted")

    @property
    def label(self) -> str:
        return f"ema_{self.beta:.10g}" + (f"_every{self.every}" if self.every > 1 else "")

    def __call__(self, now: Progress) -> float:
        return 1.0 if now.step % self.every else self.beta**self.every


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfLifeEMA(EMALaw):
    """beta = 0.5^(batch / h), h = min(half_life_images, rampup * images) (EDM, appendix F.2).

    The same run with another batch size keeps its averaging window in images.

    Attributes:
        half_life_images: images after which a weight counts half.
        rampup: limits the half-life to this share of the images seen so far; None does not.
    """

    half_life_images: float
    rampup: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("half_life_images", "rampup"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ConfigError(f"HalfLifeEMA.{name}: {value:g} given, a value > 0 is accepted")

    @property
    def label(self) -> str:
        return f"ema_{self.half_life_images / 1000:.10g}kimg"

    def __call__(self, now: Progress) -> float:
        half_life = self.half_life_images
        if self.rampup is not None:
            half_life = min(half_life, now.images * self.rampup)
        return float(0.5 ** (now.batch_size / max(half_life, 1e-8)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerEMA(EMALaw):
    """beta = (1 - 1/step)^(gamma + 1): weights of time t count as t^gamma (EDM2, equation 4).

    The first update has beta = 0, so the initialisation never counts. Exactly one of:

    Attributes:
        std: width of the profile relative to the length of training, in (0, 0.2886]; EDM2 stores
            0.05 and 0.1.
        gamma: the exponent, >= 0; std 0.05 is 16.97 and std 0.1 is 6.94.
    """

    std: float | None = None
    gamma: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.std is None) == (self.gamma is None):
            raise ConfigError(
                f"PowerEMA: std={self.std}, gamma={self.gamma} given; exactly one is accepted"
            )
        if self.std is not None and not 0.0 < self.std <= MAX_STD:
            raise ConfigError(
                f"PowerEMA.std: {self.std:g} given, 0 < std <= {MAX_STD:.4f} accepted"
            )
        if self.gamma is not None and not self.gamma >= 0.0:
            raise ConfigError(f"PowerEMA.gamma: {self.gamma:g} given, gamma >= 0 accepted")

    @property
    def exponent(self) -> float:
        """gamma, whichever of the two was given."""
        if self.gamma is not None:
            return self.gamma
        assert self.std is not None
        return gamma_of_std(self.std)

    @property
    def label(self) -> str:
        if self.std is not None:
            return f"ema_std{self.std:.10g}"
        return f"ema_gamma{self.gamma:.10g}"

    def __call__(self, now: Progress) -> float:
        return float((1.0 - now.batch_size / max(now.images, 1)) ** (self.exponent + 1.0))


@torch.no_grad()
def lerp_(averages: Iterable[Tensor], current: Iterable[Tensor], weight: float) -> None:
    """Move each average towards its current value: average += weight (current - average).

    Works on shards as it does on plain tensors, without communication or host synchronisation.

    Args:
        averages: changed in place.
        current: in the same order; brought to the type of its average.
        weight: in [0, 1]; 1 copies exactly.
    """
    ours = list(averages)
    theirs = [c.detach().to(a.dtype) for c, a in zip(current, ours, strict=True)]
    torch._foreach_lerp_([a.detach() for a in ours], theirs, weight)


class EMA:
    """A moving average of a network's parameters, with a copy of its persistent buffers.

    Kept in float32 whatever the type of the network (float64 for float64 parameters). Sharded
    parameters have sharded averages: updating needs no communication and no host
    synchronisation.

    Args:
        network: gives names, shapes and the first values; plain or sharded by `fully_shard`.
        law: decay of each update.
        start_step: up to this many steps the average is the current weights.
    """

    def __init__(self, network: nn.Module, law: Decay, start_step: int = 0) -> None:
        if start_step < 0:
            raise ConfigError(f"start_step: {start_step} given, a whole number >= 0 is accepted")
        self.law = law
        self.start_step = start_step
        reshard(network)
        self._weights = {
            name: p.detach().clone().to(torch.promote_types(p.dtype, torch.float32))
            for name, p in network.named_parameters()
        }
        persistent = network.state_dict().keys()
        self._buffers = {
            name: b.detach().clone() for name, b in network.named_buffers() if name in persistent
        }

    @property
    def buffers(self) -> frozenset[str]:
        """Names of the tensors that are copied, not averaged."""
        return frozenset(self._buffers)

    @torch.no_grad()
    def update(self, network: nn.Module, now: Progress) -> None:
        """Take the weights after an optimizer step into the average.

        Args:
            network: the network it was made from.
            now: the moment after the step.
        """
        parameters, buffers = self._live(network)
        started = now.step > self.start_step
        lerp_(self._weights.values(), parameters, 1.0 - self.law(now) if started else 1.0)
        for kept, buffer in zip(self._buffers.values(), buffers, strict=True):
            kept.copy_(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        """Averages and buffers by name: the tensors themselves, sharded as the network is."""
        return {**self._weights, **self._buffers}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take tensors by name, sharded as this average is.

        Raises:
            CheckpointError: a name is missing or unknown, or a shape differs.
        """
        own = self.state_dict()
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise CheckpointError(
                f"EMA weights do not fit the network: missing {missing[:5]}, unknown {unknown[:5]}"
                f" ({len(missing)} and {len(unknown)} in all); use the network they were made with"
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise CheckpointError(
                    f"EMA weight {name!r}: shape {tuple(state[name].shape)} given, "
                    f"{tuple(tensor.shape)} accepted; use the network it was made with"
                )
            tensor.copy_(state[name])

    def gathered(self) -> dict[str, Tensor]:
        """Full copies on the CPU, e.g. for a file; every process must call it."""
        return {
            name: full_tensor(tensor).cpu().clone() for name, tensor in self.state_dict().items()
        }

    @contextmanager
    def swapped_into(self, network: nn.Module) -> Iterator[None]:
        """The network holds the average inside the block, and its own weights again after it.

        What it held comes back bit for bit, also after an exception. For sampling; a backward
        pass must not reach across the border of the block.
        """
        with torch.no_grad():
            kept = [[t.clone() for t in group] for group in self._live(network)]
        try:
            self._put(network, [list(self._weights.values()), list(self._buffers.values())])
            yield
        finally:
            self._put(network, kept)

    @torch.no_grad()
    def _put(self, network: nn.Module, values: list[list[Tensor]]) -> None:
        for targets, sources in zip(self._live(network), values, strict=True):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)

    def _live(self, network: nn.Module) -> list[list[Tensor]]:
        """The network's own parameters and persistent buffers, in the order of this average."""
        reshard(network)
        parameters = {name: p.detach() for name, p in network.named_parameters()}
        buffers = dict(network.named_buffers())
        assert parameters.keys() == self._weights.keys(), "the network this average was made from"
        return [[parameters[n] for n in self._weights], [buffers[n] for n in self._buffers]]
