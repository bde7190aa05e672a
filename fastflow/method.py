"""The one interface of every method, and the extra networks a method may ask for."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from fastflow.config import Lazy
from fastflow.data.batch import Batch
from fastflow.errors import ConfigError, one_of
from fastflow.network import Network
from fastflow.parts import Part
from fastflow.path import Path
from fastflow.progress import Progress
from fastflow.sampling import FlowMap, Noise, jumps, multistep
from fastflow.schedules import Decay


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a method returns for a batch; the trainer reduces it.

    Attributes:
        per_sample: weighted losses [B], with their graph.
        times: start times t [B], so that the loss can be shown by time.
        metrics: detached scalars to log, by name.
    """

    per_sample: Tensor
    times: Tensor
    metrics: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen(Part):
    """A companion that never changes: a teacher, or the model of an earlier stage.

    Attributes:
        weights: as `Experiment.init_from`; None builds the network as it is (for networks that
            need no weights, such as a closed-form denoiser).
        network: its description; None means the same as the student's.
        dropout: whether its dropout stays active, as in the target of a consistency loss.
    """

    weights: str | None
    network: Lazy | None = None
    dropout: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is None and self.network is None:
            raise ConfigError(
                "Frozen: neither weights nor network given; name the weights of the companion "
                "(a .safetensors file or a run directory)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target(Part):
    """A companion that follows the student as an exponential moving average.

    After each optimizer step, target <- mu target + (1 - mu) student with mu = decay(now).
    """

    decay: Decay


Companion = Frozen | Target


@dataclasses.dataclass(frozen=True)
class Networks:
    """The student, and the companions by the names the method gave them."""

    student: Network
    companions: Mapping[str, Network] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Network:
        if name not in self.companions:
            raise ConfigError(f"no companion {name!r}: {one_of(name, self.companions)}")
        return self.companions[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMapMethod(Part, abc.ABC):
    """A way to train a network that jumps along the probability-flow ODE.

    Subclasses are frozen dataclasses whose fields are the paper's hyperparameters. They are pure
    in the networks they are handed: they see networks, a batch and a `Progress`, never ranks,
    files or the trainer.

    Attributes:
        expects: what the student must predict (`Network.predicts`).
        two_times: whether the student must take an end time (`Network.two_times`).
    """

    expects: ClassVar[str] = "denoiser"
    two_times: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """What summaries and result rows call it: its class, and what is not exact about it."""
        return type(self).__name__

    @property
    @abc.abstractmethod
    def path(self) -> Path:
        """The interpolant between data and noise; its `t_max` is where sampling starts."""

    @property
    def s_min(self) -> float:
        """The time at which a full jump lands: 0 for data, eps for maps that stop at x_eps."""
        return 0.0

    @property
    def needs(self) -> frozenset[str]:
        """Names of the curriculum values that `loss` reads; a driver must provide each."""
        return frozenset()

    def companions(self) -> Mapping[str, Companion]:
        """The extra networks that the trainer builds, shards, updates and saves, by name."""
        return {}

    @property
    def sampling_companions(self) -> frozenset[str]:
        """Names of the companions that `for_sampling` needs beside the student."""
        return frozenset()

    def for_sampling(self, nets: Networks) -> Network:
        """The network that `flow_map` is given: the student, or one made of it and companions."""
        return nets.student

    def check(self, nets: Networks) -> None:
        """Raise ConfigError where the networks do not fit each other or these hyperparameters.

        Called once when a run is built, before anything is written; `expects` and `two_times` are
        checked already.
        """

    @abc.abstractmethod
    def loss(self, nets: Networks, batch: Batch, now: Progress) -> Loss:
        """The weighted loss of each sample of the batch, differentiable in `nets.student`."""

    @abc.abstractmethod
    def flow_map(
        self, net: Network, x: Tensor, t: Tensor, s: Tensor, cond: Tensor | None = None
    ) -> Tensor:
        """The state at time s from the state x at time t; every sampler is built on it.

        Args:
            net: a trained network.
            x: states [B, ...] at t.
            t: start times [B], float64.
            s: end times [B], float64, s <= t; those that `sample` asks for.
            cond: class rows [B, cond_dim], or None.

        Returns:
            States [B, ...] in the type of `x`.
        """

    def sample(self, flow_map: FlowMap, x: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
        """Follow a flow map from times[0] to `s_min` in len(times) steps, the way the method does.

        Unless overridden: deterministic jumps for methods of two times, and for the others, whose
        map lands at `s_min` only, jumps with re-noising between (arXiv 2303.01469, Algorithm 1).

        Args:
            flow_map: the map, of a trained network or the exact one.
            x: states [B, ...] at times[0].
            times: start of each step, decreasing and above `s_min`.
            noise: the next unit-variance noise of the shape of `x`.
        """
        if self.two_times:
            return jumps(flow_map, x, (*times, self.s_min))
        return multistep(flow_map, x, times, noise, self.path, self.s_min)
