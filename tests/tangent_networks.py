"""Tiny networks of every kind with a direction to differentiate along, also sharded."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastflow.distributed import World, shard
from fastflow.network import Network
from fastflow.tangent import DualNumbers, FunctionalJVP, Pairs, TangentEngine, value_and_jvp
from fastflow.wrappers import EDMDenoiser, NoiseDenoiser, TrigFlowNetwork, VelocityNetwork
from networks.adm_unet import DhariwalUNet
from networks.dit import DiT
from networks.edm2 import EDM2UNet, LogVariance
from networks.mlp import ToyMLP
from networks.song_unet import SongUNet

CLASSES = 4
ALL = {"two_times": True, "takes_guidance": True, "cond_dim": CLASSES}
SONG = {
    "resolution": 8,
    "channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "dropout": 0.3,
    **ALL,
}
NCSN = {
    "embedding": "fourier",
    "channel_mult_noise": 2,
    "encoder": "residual",
    "resample_filter": (1, 3, 3, 1),
}
ADM = {**SONG, "resolution": 4, "channels": 32, "attn_resolutions": (2,), "augment_dim": 2}
EDM2 = {**SONG, "channels_per_head": 8}
TRANSFORMER = {
    "resolution": 4,
    "in_channels": 3,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 2,
    "label_dropout": 0.3,
}

NETWORKS: dict[str, Callable[[], Network]] = {
    "DDPM++": lambda: EDMDenoiser(SongUNet(**SONG)),
    "DDPM++, linear path": lambda: VelocityNetwork(SongUNet(**SONG), data_at=1, second="end"),
    "NCSN++": lambda: EDMDenoiser(SongUNet(**SONG, **NCSN), second="end"),
    "skip": lambda: EDMDenoiser(SongUNet(**SONG, encoder="skip", decoder="skip")),
    "ADM": lambda: TrigFlowNetwork(DhariwalUNet(**ADM)),
    "EDM2": lambda: TrigFlowNetwork(EDM2UNet(**EDM2), time="log_sigma", logvar_head=LogVariance()),
    "EDM2, positional": lambda: EDMDenoiser(
        EDM2UNet(**EDM2, embedding="positional", resample_filter=(1, 3, 3, 1), clip_act=0.5)
    ),
    "DiT": lambda: VelocityNetwork(DiT(**TRANSFORMER, **ALL)),
    "DiT, noise": lambda: NoiseDenoiser(DiT(**TRANSFORMER, cond_dim=CLASSES, learn_sigma=True)),
    "MLP": lambda: VelocityNetwork(ToyMLP(width=16, depth=2, **ALL)),
}
ENGINES: list[TangentEngine] = [Pairs(), DualNumbers(), FunctionalJVP()]


class Case:
    """A network with random weights, in training mode, and a direction at a point.

    `f` draws the same masks at every call.
    """

    def __init__(self, name: str, dtype: torch.dtype, training: bool) -> None:
        torch.manual_seed(0)
        self.network = NETWORKS[name]().double()
        with torch.no_grad():  # networks begin with zero outputs
            for parameter in self.network.parameters():
                parameter.copy_(0.2 * torch.randn_like(parameter))
        x = torch.randn(CLASSES, *self.network.sample_shape, dtype=torch.float64)
        t = torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
        primals = (x, t, 0.6 * t, 1 + t) if self.network.two_times else (x, t)
        tangents = [torch.randn_like(p) for p in primals]
        self.network.to(dtype).train(training)
        self.primals = [p.to(dtype) for p in primals]
        self.tangents = [p.to(dtype) for p in tangents]
        self.cond = torch.eye(CLASSES, dtype=dtype)
        width = self.network.augment_dim
        self.augment = torch.randn(CLASSES, width, dtype=dtype) if width else None
        self.probe = torch.randn_like(x).to(dtype)

    def f(
        self, x: Tensor, t: Tensor, s: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        torch.manual_seed(1)
        out: Tensor = self.network(x, t, s, self.cond, self.augment, guidance)
        return out

    def select(self, rows: slice) -> Case:
        """Some of the rows, in place."""
        self.primals = [p[rows] for p in self.primals]
        self.tangents = [t[rows] for t in self.tangents]
        self.cond, self.probe = self.cond[rows], self.probe[rows]
        self.augment = None if self.augment is None else self.augment[rows]
        return self

    def difference(self) -> Tensor:
        """The tangent to fourth order in the step."""

        def at(h: float) -> Tensor:
            with torch.no_grad():
                pairs = zip(self.primals, self.tangents, strict=True)
                return self.f(*(p + h * t for p, t in pairs))

        h = 2e-6
        return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)

    def gradients(self, out: Tensor) -> dict[str, Tensor]:
        """Of a loss, after a call of `f`."""
        self.network.zero_grad()
        (out * self.probe).sum().backward()
        named = self.network.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    def jvp(self, engine: TangentEngine) -> tuple[Tensor, Tensor]:
        return value_and_jvp(self.f, self.primals, self.tangents, engine)


@functools.cache
def exact(name: str, training: bool) -> Tensor:
    """By finite differences in float64."""
    return Case(name, torch.float64, training).difference()


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def check_sharded(rank: int, size: int, store: dist.Store) -> None:
    """Compare gradients and tangents of networks sharded over `size` processes with whole ones.

    A function of a module, so that other processes can import it.
    """
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("replicate", "shard"))
    rows = slice(rank * CLASSES // size, (rank + 1) * CLASSES // size)
    try:
        for name in ("DDPM++", "EDM2", "DiT"):
            whole = Case(name, torch.float32, training=False)
            expected = whole.gradients(whole.f(*whole.primals))
            for engine in ENGINES:
                for recompute in (False, True)[: 1 if isinstance(engine, FunctionalJVP) else 2]:
                    case = Case(name, torch.float32, training=False).select(rows)
                    shard(case.network, World(), 1, recompute=recompute)
                    for unit in [*case.network.shard_units(), case.network]:
                        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
                    value, tangent = case.jvp(engine)
                    assert error(tangent, exact(name, False)[rows]) < 1e-4, (name, engine)
                    found = case.gradients(value)
                    assert found.keys() == expected.keys()
                    for key, grad in found.items():
                        assert isinstance(grad, DTensor)
                        close = error(size * grad.full_tensor(), expected[key].double()) < 1e-4
                        assert close, (name, engine, recompute, key)
    finally:
        dist.destroy_process_group()


def check_sharded_in_process(rank: int, size: int, file: str) -> None:
    """`check_sharded` in one of `size` processes that meet at `file`."""
    torch.set_num_threads(1)
    check_sharded(rank, size, dist.FileStore(file, size))
