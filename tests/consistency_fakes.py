"""Stored draws, given pairs of times and closed-form networks, to drive consistency losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.consistency import Pairing, TimePair
from fastflow.data.batch import Batch
from fastflow.network import Network
from fastflow.oracle import Gaussian
from fastflow.path import expand
from fastflow.precond import EDMConsistency, EDMScaling
from fastflow.progress import Progress
from fastflow.raw import RawNetwork
from fastflow.rng import Draws
from fastflow.times import TimeLaw
from fastflow.wrappers import EDMDenoiser
from networks.song_unet import SongUNet
from reference_data import reference


def now(**curriculum: float) -> Progress:
    """A moment of training with these curriculum values."""
    return Progress(step=0, images=0, total_steps=10, batch_size=8, curriculum=curriculum)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredDraws(Draws):
    """Given noise [N, ...] and uniform levels [N]; a row takes those at its index."""

    eps: Tensor | None = None
    levels: Tensor | None = None

    def normal(self, name, shape, dtype=torch.float32):
        assert name == "eps"
        assert self.eps is not None
        assert tuple(shape) == self.eps.shape[1:]
        return self.eps[list(self.indices)].to(dtype)

    def uniform(self, name, shape=(), dtype=torch.float64):
        assert name == "t"
        assert self.levels is not None
        assert not shape
        return self.levels[list(self.indices)]


@dataclasses.dataclass(frozen=True, eq=False)
class GivenNoise(Draws):
    """Given noise [N, ...] beside the uniform numbers of ordinary draws."""

    eps: Tensor | None = None

    def normal(self, name, shape, dtype=torch.float32):
        assert name == "eps"
        assert self.eps is not None
        return self.eps[list(self.indices)].to(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedPairs(Pairing):
    """Sample i has the times t[i] and r[i]."""

    t: tuple[float, ...]
    r: tuple[float, ...]

    @property
    def needs(self):
        return frozenset()

    def __call__(self, draws, now):
        rows = list(draws.indices)
        return TimePair(t=f64(*self.t)[rows], r=f64(*self.r)[rows])


@dataclasses.dataclass(frozen=True, kw_only=True)
class AsDrawn(TimeLaw):
    """The stored level of a row is its time."""

    def quantile(self, u):
        return u


def fixed_pairs(t: Tensor, r: Tensor) -> FixedPairs:
    return FixedPairs(t=tuple(t.tolist()), r=tuple(r.tolist()))


def stored_batch(
    x: Tensor, eps: Tensor, levels: Tensor | None = None, cond: Tensor | None = None
) -> Batch:
    """A batch whose draws are given."""
    rows = tuple(range(len(x)))
    draws = StoredDraws(seed=0, step=0, indices=rows, total=len(x), eps=eps, levels=levels)
    return Batch(x=x, cond=cond, augment=None, draws=draws)


def random_batch(x: Tensor, seed: int = 0, step: int = 0, cond: Tensor | None = None) -> Batch:
    """A batch as the loader makes it: draws by seed, step and index."""
    draws = Draws(seed=seed, step=step, indices=tuple(range(len(x))), total=len(x))
    return Batch(x=x, cond=cond, augment=None, draws=draws)


def quadrature(std: float) -> tuple[Tensor, Tensor]:
    """Data N(0, std^2) and noise, [4, 1] each, that average every quadratic form exactly."""
    x, eps = f64(std, std, -std, -std), f64(1, -1, 1, -1)
    return x[:, None], eps[:, None]


class Recording(Network):
    """A network that keeps the arguments and results of its calls."""

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = net
        self.calls: list[dict[str, Any]] = []

    def forward(self, x, t, s=None, cond=None, augment=None, guidance=None):
        out = self.net(x, t, cond=cond, augment=augment)
        self.calls.append({"x": x, "t": t, "cond": cond, "augment": augment, "out": out})
        return out


class DenoiserOf(Network):
    """A function (x, t) -> D as a network."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x, t, s=None, cond=None, augment=None, guidance=None):
        return self.function(x, t)


class ConsistencyOf(DenoiserOf):
    """The denoiser whose consistency function, boundary at `s_min`, is the given (x, t) -> f."""

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], s_min: float, sigma_data: float = 0.5
    ) -> None:
        super().__init__(function)
        self.s_min, self.sigma_data = s_min, sigma_data

    def forward(self, x, t, s=None, cond=None, augment=None, guidance=None):
        f = self.function(x, t)
        if self.s_min == 0:
            return f
        scaling = EDMScaling(sigma_data=self.sigma_data)(t)
        a, b = EDMConsistency(sigma_data=self.sigma_data).coefficients(
            t, torch.full_like(t, self.s_min)
        )
        k = b / scaling.c_out
        inside = t > self.s_min
        safe = torch.where(inside, k, 1.0)
        denoised = (f - expand(a - k * scaling.c_skip, x) * x) / expand(safe, x)
        return torch.where(expand(inside, x), denoised, x)


class Gains(nn.Module):
    """f(x, t) = gain[i] x with one learnt gain for each of the given times [N]."""

    def __init__(self, times: Tensor, gains: Tensor, unit: Tensor | None = None) -> None:
        super().__init__()
        self.times = times
        self.unit = torch.ones_like(gains) if unit is None else unit
        self.raw = nn.Parameter(gains / self.unit)

    @property
    def gains(self) -> Tensor:
        return self.raw * self.unit

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        index = (self.times[None] - t[:, None]).abs().argmin(1)
        assert torch.equal(self.times[index], t), "a time that has no gain"
        return expand(self.gains[index], x) * x


def randomised(net: nn.Module, seed: int = 0, std: float = 0.15) -> Any:
    """The network with normal weights, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        with torch.no_grad():
            parameter.normal_(generator=generator).mul_(std)
    return net


def small_unet(
    seed: int = 0,
    dropout: float = 0.0,
    cond_dim: int = 0,
    augment_dim: int = 0,
    two_times: bool = False,
) -> EDMDenoiser:
    """A DDPM++ for 8x8 grey images with random weights."""
    model = SongUNet(
        resolution=8,
        in_channels=1,
        out_channels=1,
        cond_dim=cond_dim,
        channels=8,
        channel_mult=(1,),
        num_blocks=1,
        attn_resolutions=(),
        dropout=dropout,
        augment_dim=augment_dim,
        two_times=two_times,
    )
    return randomised(EDMDenoiser(model), seed)


class OpenAIToy(RawNetwork):
    """The raw toy network of that case: openai's c_noise is 250 ln t."""

    sample_shape = (3, 8, 8)

    def __init__(self, name: str) -> None:
        super().__init__()
        for key in "abd":
            setattr(
                self, key, nn.Parameter(reference("openai_consistency_losses")[f"{name}.{key}"])
            )

    def forward(self, x, c_noise, cond=None, augment=None, c_second=None, guidance=None):
        a, b, d = (p[:, None, None] for p in (self.a, self.b, self.d))
        return d * torch.tanh(a * x + b * torch.sin(0.01 * c_noise)[:, None, None, None])

    def shard_units(self):
        return []


def openai_toy(name: str, dtype: torch.dtype) -> EDMDenoiser:
    """The "online", "target" or "teacher" network of openai_consistency_losses."""
    return EDMDenoiser(OpenAIToy(name), noise_scale=1000.0).to(dtype)


class GaussianTeacher(Network):
    """The exact denoiser of N(0.2, 0.5^2) points in the plane, without any weights."""

    sample_shape = (2,)

    def forward(self, x, t, s=None, cond=None, augment=None, guidance=None):
        return Gaussian.isotropic(0.5, mean=0.2).denoiser(x, t).to(x.dtype)
