"""Stored times, noise and networks of the recorded MeanFlow cases, and closed-form networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consistency_fakes import StoredDraws, f64
from edm_networks import from_py_meanflow, our_keywords
from fastflow.data.batch import Batch
from fastflow.network import Network
from fastflow.rng import Draws
from fastflow.times import PairLaw, TimeLaw, Uniform
from fastflow.wrappers import EDMDenoiser, VelocityNetwork
from networks.song_unet import SongUNet
from reference_data import Reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenTimes(PairLaw):
    """Row i has the times t[i] and r[i]."""

    times: TimeLaw = dataclasses.field(default_factory=Uniform)
    equal: float = 0.0
    t: tuple[float, ...]
    r: tuple[float, ...]

    def __call__(self, draws: Draws) -> tuple[Tensor, Tensor]:
        rows = list(draws.indices)
        return f64(*self.t)[rows], f64(*self.r)[rows]


def given_times(t: Tensor, r: Tensor) -> GivenTimes:
    return GivenTimes(t=tuple(t.double().tolist()), r=tuple(r.double().tolist()))


@dataclasses.dataclass(frozen=True, eq=False)
class StoredNumbers(StoredDraws):
    """Stored noise, and uniform numbers [N] by name."""

    uniforms: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def uniform(self, name, shape=(), dtype=torch.float64):
        return self.uniforms[name].to(dtype)[list(self.indices)]


def batch_of(
    x: Tensor,
    eps: Tensor,
    cond: Tensor | None = None,
    augment: Tensor | None = None,
    **uniforms: Tensor,
) -> Batch:
    """A batch whose noise and uniform numbers are given."""
    rows = tuple(range(len(x)))
    draws = StoredNumbers(
        seed=0, step=0, indices=rows, total=len(x), eps=eps, uniforms=dict(uniforms)
    )
    return Batch(x=x, cond=cond, augment=augment, draws=draws)


class AverageVelocity(Network):
    """A function (z, t, r) -> u as a network; it may read the class rows."""

    predicts = "velocity"
    two_times = True

    def __init__(self, function: Callable[..., Tensor], classes: int = 0) -> None:
        super().__init__()
        self.function, self.cond_dim = function, classes

    def forward(self, x, t, s=None, cond=None, augment=None):
        return self.function(x, t, s, cond) if self.cond_dim else self.function(x, t, s)


class Listening(Network):
    """A network that keeps the arguments, results and modes of its calls."""

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = net
        self.cond_dim = net.cond_dim
        self.calls: list[dict[str, Any]] = []

    def forward(self, x, t, s=None, cond=None, augment=None):
        out = self.net(x, t, s, cond=cond, augment=augment)
        call = {"t": t, "s": s, "cond": cond, "out": out, "training": self.net.training}
        self.calls.append(call)
        return out


def py_meanflow_unet(ref: Reference, dtype: torch.dtype) -> VelocityNetwork:
    """The network of pymf_loss."""
    model = SongUNet(two_times=True, **our_keywords(ref.config["net"]))
    model.load_state_dict(from_py_meanflow(ref.weights("net.")), strict=True)
    return VelocityNetwork(model).to(dtype)


def _without_heads(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of `SongUNet`; the log-variance head is not used."""
    return {k.removeprefix("model."): v for k, v in weights.items() if "logvar" not in k}


def fastgen_unet(ref: Reference, dtype: torch.dtype, part: str = "net") -> Network:
    """Student ("net", reads r itself) or "teacher" of a FastGen case.

    A velocity without preconditioning on the linear path, else a denoiser with EDM's.
    """
    config = dict(ref.config[part])
    two_times = config.pop("r_timestep")
    linear = config.pop("schedule_type", "edm") == "rf"
    for name in ("sigma_data", "model_type", "drop_precond", "net_pred_type"):
        config.pop(name, None)
    kwargs = our_keywords(config)
    kwargs["in_channels"] = kwargs["out_channels"] = kwargs.pop("img_channels")
    model = SongUNet(two_times=two_times, **kwargs)
    weights = _without_heads(ref.weights(f"{part}."))
    if two_times:
        # Both times side by side as in py-meanflow, but attention's rows as in EDM.
        split = from_py_meanflow({k: v for k, v in weights.items() if ".qkv." not in k})
        weights = {**split, **{k: v for k, v in weights.items() if ".qkv." in k}}
    model.load_state_dict(weights, strict=True)
    wrapper = VelocityNetwork if linear else EDMDenoiser
    return wrapper(model, second="end").to(dtype)
