"""A trained model, ready to sample: `Model.load("runs/cm_digits").sample(seeds=range(16))`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastflow.build import build_companion, build_network
from fastflow.experiment import Experiment
from fastflow.generate import generate, step_times
from fastflow.method import FlowMapMethod, Frozen, Networks
from fastflow.network import Network
from fastflow.run_dir import Stored, find, read, read_companion
from fastflow.weights import digest, load_strict


@dataclasses.dataclass(frozen=True)
class Model:
    """A network with one set of weights and the method that knows how to sample from it.

    Attributes:
        experiment: what was trained.
        network: in eval mode on its device.
        weights_name: "student" or the name of an EMA.
        step, images: how far it was trained.
        seconds, hardware: wall time of training, and the processes and devices that did it.
        device: where the network is.
    """

    experiment: Experiment
    network: Network
    weights_name: str
    step: int
    images: int
    seconds: float
    hardware: str
    device: torch.device

    @classmethod
    def load(
        cls,
        source: str | Path,
        weights: str | None = None,
        device: torch.device | str = "cpu",
        allow: tuple[str, ...] = (),
    ) -> Model:
        """Read a run directory or a folder of exported weights.

        Args:
            source: the directory.
            weights: which set ("student", "ema_0.9999", ...); None takes the first EMA.
            device: where to put the network.
            allow: packages of your own that the description may name classes of.

        Raises:
            CheckpointError: there is no such model or set of weights, or it does not fit.
        """
        stored = find(Path(source), allow)
        network = build_network(stored.experiment, "network", stored.experiment.network)
        name, tensors = read(stored, weights, network)
        load_strict(network, tensors, f"{source} ({name})")
        network = _for_sampling(stored, network)
        place = torch.device(device)
        network.to(place).eval().requires_grad_(False)
        return cls(
            experiment=stored.experiment,
            network=network,
            weights_name=name,
            step=stored.step,
            images=stored.images,
            seconds=stored.seconds,
            hardware=stored.hardware,
            device=place,
        )

    @property
    def method(self) -> FlowMapMethod:
        return self.experiment.method

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.network.sample_shape

    @property
    def cond_dim(self) -> int:
        """Width of the class rows; 0 for an unconditional model."""
        return self.network.cond_dim

    def times(self, steps: int, between: Sequence[float] | None = None) -> tuple[float, ...]:
        """Start time of each jump: the given intermediate times, the experiment's, or a grid's."""
        if between is None:
            between = self.experiment.evaluation.times.get(steps)
        return step_times(self.method, steps, between)

    def nfe(self, steps: int) -> int:
        """Network calls for one sample."""
        return steps

    def fingerprint(self) -> str:
        """SHA-256 over weights, method and kind of device: with times and classes, all that a
        seed's sample follows from."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        parts = (digest(self.network.state_dict()), repr(self.method), self.device.type)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def sample(
        self,
        seeds: Sequence[int],
        steps: int = 1,
        times: Sequence[float] | None = None,
        cond: Tensor | None = None,
    ) -> Tensor:
        """Samples [len(seeds), *shape], float32, images in about [-1, 1], not clamped.

        Args:
            seeds: sample i depends on seeds[i] and cond[i] alone, up to the rounding of kernels
                that differ by batch size.
            steps: network calls.
            times: the `steps - 1` intermediate times; None takes the experiment's.
            cond: class rows [B, cond_dim]; None is unconditional.

        Raises:
            ConfigError: times that do not fit the number of steps.
        """
        rows = None if cond is None else cond.to(self.device)
        return generate(
            self.method,
            self.network,
            seeds,
            self.shape,
            self.times(steps, times),
            rows,
            self.device,
        )

    @torch.no_grad()
    def jump(self, x: Tensor, t: float, s: float, cond: Tensor | None = None) -> Tensor:
        """The flow map from time t to time s in one network call, without noise.

        Args:
            x: states [B, *shape] at time t of the method's path.
            t: start.
            s: end, s <= t; methods of one time jump to their `s_min` only.
            cond: class rows [B, cond_dim]; None is unconditional.

        Returns:
            States at time s [B, *shape], float64.
        """
        start, end = (
            torch.full((len(x),), v, dtype=torch.float64, device=self.device) for v in (t, s)
        )
        rows = None if cond is None else cond.to(self.device)
        state = x.to(self.device, torch.float32)
        return self.method.flow_map(self.network, state, start, end, rows).double()


def _for_sampling(stored: Stored, student: Network) -> Network:
    """What the method samples with; companions come from beside the model or from their source."""
    experiment, companions = stored.experiment, {}
    specs = experiment.method.companions()
    for name in experiment.method.sampling_companions:
        spec, weights = specs[name], read_companion(stored, name)
        if weights is None:
            companions[name] = build_companion(experiment, name, spec, student)
            continue
        assert isinstance(spec, Frozen), "sampling needs frozen companions only"
        network = build_network(experiment, name, spec.network or experiment.network)
        load_strict(network, weights, f"{stored.folder} (companion {name})")
        companions[name] = network
    return experiment.method.for_sampling(Networks(student, companions))
