"""Measurements for data in a few dimensions, where the truth is known or distances are cheap."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fastflow.data.toy import Toy
from fastflow.errors import ConfigError
from fastflow.evaluation.interface import Gauge, Meter, Reading, Samples, Setting, Source
from fastflow.evaluation.sampling import class_labels
from fastflow.evaluation.spec import Metric
from fastflow.evaluation.statistics import RowTable
from fastflow.oracle import Gaussian, Mixture
from fastflow.rng import SampleNoise, fold_in
from fastflow.sampling import FlowMap, prior


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMapError(Metric):
    """Mean squared difference per coordinate from the data's exact flow map: "flow_map_error".

    The same sampler runs with the exact map in place of the model's, from the same seeds: the same
    start and, where the sampler re-noises between jumps, the same noise.

    Attributes:
        samples: samples of each block to compare, the first ones; the exact map takes seconds
            for a thousand points of a mixture.
        jumps: pairs (t, s) of which single jumps are compared too, beside one-step samples:
            "jump_error_0.5_0.1". They start from exact states, those the exact map reaches from
            the noise of the evaluation's first seeds. For methods of two times.
    """

    samples: int = 1024
    jumps: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_samples(self.samples, "FlowMapError")
        for t, s in self.jumps:
            if not 0 <= s < t:
                raise ConfigError(
                    f"FlowMapError.jumps: ({t:g}, {s:g}) given, accepted: (t, s) with 0 <= s < t"
                )

    def prepare(self, setting: Setting) -> Gauge:
        if not isinstance(setting.dataset, Toy):
            raise ConfigError(
                f"FlowMapError: the flow map of {setting.dataset.name!r} is not known; accepted: "
                f"the toy datasets of fastflow.data.toy"
            )
        method = setting.model.method
        if self.jumps and not method.two_times:
            raise ConfigError(
                f"FlowMapError.jumps: given for {type(method).__name__}, which jumps to s = "
                f"{method.s_min:g} only; leave them out"
            )
        highest = max((t for t, _ in self.jumps), default=0.0)
        if highest > method.path.t_max:
            raise ConfigError(
                f"FlowMapError.jumps: t = {highest:g} given, accepted: up to "
                f"{method.path.t_max:g}, where the path ends"
            )
        oracle = setting.dataset.oracle.on(method.path)
        count = min(self.samples, setting.evaluation.samples)
        return _FlowMapGauge(setting, oracle, count, self.jumps)


@dataclasses.dataclass(frozen=True)
class _FlowMapGauge:
    setting: Setting
    oracle: Gaussian | Mixture
    samples: int
    jumps: tuple[tuple[float, float], ...]

    @property
    def source(self) -> Source:
        dataset = self.setting.dataset
        return Source(reference="exact flow map", reference_hash=dataset.fingerprint())

    def start(self) -> Meter:
        return _FlowMapMeter(self)

    def exact(self, samples: Samples) -> Tensor:
        """What the sampler returns with the exact map, [n, *shape] float64, on the CPU."""
        model = self.setting.model
        method, device = model.method, model.device
        noise = SampleNoise(samples.seeds, device)

        def draw() -> Tensor:
            return noise.normal(model.shape).cpu()

        x = prior(draw(), method.path, samples.times[0])
        return method.sample(self.map_of(samples.labels), x, samples.times, draw)

    def map_of(self, labels: Tensor | None) -> FlowMap:
        """The exact map, of each row's class where there are labels."""
        oracle = self.oracle
        if labels is None or not isinstance(oracle, Mixture):
            return oracle.flow_map
        return lambda x, t, s: oracle.conditional_flow_map(x, t, s, labels)

    def jump_errors(self) -> list[float]:
        """The mean squared error of each of the jumps."""
        model = self.setting.model
        first = self.setting.evaluation.seed
        seeds = range(first, first + self.samples)
        labels = class_labels(seeds, model.cond_dim, self.setting.evaluation.labels)
        cond = None if labels is None else one_hot(labels, model.cond_dim).float()
        exact = self.map_of(labels)
        t_max = model.method.path.t_max
        start = prior(SampleNoise(seeds).normal(model.shape), model.method.path, t_max)
        errors = []
        for t, s in self.jumps:
            top, high, low = (torch.full((len(seeds),), v).double() for v in (t_max, t, s))
            x = exact(start, top, high) if t < t_max else start
            difference = model.jump(x, t, s, cond).cpu().double() - exact(x, high, low)
            errors.append(difference.square().mean().item())
        return errors


class _FlowMapMeter:
    def __init__(self, gauge: _FlowMapGauge) -> None:
        self._gauge = gauge
        # Sum of squares, number of values, number of values of one step.
        self._sums = torch.zeros(3, dtype=torch.float64)

    def update(self, samples: Samples) -> None:
        kept = samples.first(self._gauge.samples)
        if len(kept.indices):
            difference = kept.x.cpu().double() - self._gauge.exact(kept)
            count = difference.numel()
            single = count if len(samples.times) == 1 else 0
            self._sums += torch.tensor(
                [difference.square().sum().item(), count, single], dtype=torch.float64
            )

    def readings(self) -> list[Reading]:
        gauge = self._gauge
        world = gauge.setting.world
        # Summed first: a process without samples does not know the number of steps.
        total, count, single = world.sum(self._sums.to(world.device)).tolist()
        errors = {"flow_map_error": total / count}
        if single and gauge.jumps:
            for (t, s), error in zip(gauge.jumps, gauge.jump_errors(), strict=True):
                errors[f"jump_error_{t:g}_{s:g}"] = error
        return [
            Reading(metric=name, value=error, samples=gauge.samples, source=gauge.source)
            for name, error in errors.items()
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergyDistance(Metric):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of generated X and real Y: "energy_distance".

    The unbiased estimate, hence around 0 and sometimes below for a perfect model; `baseline` is
    the same between two disjoint sets of real samples.

    Attributes:
        samples: most samples on each side; the cost grows with the square.
    """

    samples: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_samples(self.samples, "EnergyDistance")

    def prepare(self, setting: Setting) -> Gauge:
        size = len(setting.dataset)
        count = min(self.samples, size // 2)
        _check_samples(count, "EnergyDistance of half the data")
        generator = torch.Generator().manual_seed(fold_in(0, "energy distance"))
        rows = torch.randperm(size, generator=generator)[: 2 * count]
        points = setting.dataset.fetch(rows)[0].flatten(1).double()
        real, other = points.split(count)
        kept = min(self.samples, setting.evaluation.samples)
        return _EnergyGauge(setting, real, kept, energy_distance(other, real))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased estimate from points [n, D] and [m, D], float64; n, m >= 2."""
    # The fast formula loses the small distances to rounding.
    exact = "donot_use_mm_for_euclid_dist"
    between = torch.cdist(x, y, compute_mode=exact).mean()
    within = [torch.cdist(p, p, compute_mode=exact).sum() / (len(p) * (len(p) - 1)) for p in (x, y)]
    return (2 * between - within[0] - within[1]).item()


@dataclasses.dataclass(frozen=True)
class _EnergyGauge:
    setting: Setting
    real: Tensor
    samples: int
    baseline: float

    @property
    def source(self) -> Source:
        dataset = self.setting.dataset
        name = f"{dataset.name}, {len(self.real)} samples"
        return Source(reference=name, reference_hash=dataset.fingerprint())

    def start(self) -> Meter:
        return _EnergyMeter(self)


class _EnergyMeter:
    def __init__(self, gauge: _EnergyGauge) -> None:
        setting = gauge.setting
        self._gauge = gauge
        self._points = RowTable(gauge.samples, setting.model.shape, torch.float64, setting.world)

    def update(self, samples: Samples) -> None:
        kept = samples.first(self._gauge.samples)
        self._points.put(torch.tensor(kept.indices, dtype=torch.int64), kept.x)

    def readings(self) -> list[Reading]:
        gauge = self._gauge
        return [
            Reading(
                metric="energy_distance",
                value=energy_distance(self._points.whole().flatten(1), gauge.real),
                samples=gauge.samples,
                source=gauge.source,
                baseline=gauge.baseline,
                baseline_name="real against real",
            )
        ]


def _check_samples(samples: int, what: str) -> None:
    if samples < 2:
        raise ConfigError(f"{what}: {samples} samples given, 2 or more accepted")
