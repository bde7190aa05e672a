"""Small wrapped networks of every family, and a step of each sharded beside one of it whole.

Functions of a module, so that other processes can import them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastflow.config import Lazy, build, lazy
from fastflow.distributed import World, distribute, full_tensor, shard
from fastflow.network import Network
from fastflow.wrappers import EDMDenoiser, NoiseDenoiser, TrigFlowNetwork, VelocityNetwork
from networks.adm_unet import DhariwalUNet
from networks.dit import DiT
from networks.edm2 import EDM2UNet, LogVariance
from networks.mlp import ToyMLP
from networks.song_unet import SongUNet

CLASSES = 5
HEAD = lazy(LogVariance, channels=8)
_UNET: dict[str, Any] = {
    "resolution": 8,
    "in_channels": 2,
    "cond_dim": CLASSES,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "two_times": True,
    "takes_guidance": True,
}
_SONG: dict[str, Any] = {**_UNET, "out_channels": 2, "channels": 8, "dropout": 0.0}
_DIT = lazy(
    DiT,
    resolution=8,
    in_channels=2,
    hidden_size=16,
    depth=2,
    num_heads=2,
    cond_dim=CLASSES,
    learn_sigma=True,
    takes_guidance=True,
)

FAMILIES: dict[str, Lazy] = {
    "ddpmpp": lazy(EDMDenoiser, model=lazy(SongUNet, augment_dim=3, **_SONG), logvar_head=HEAD),
    "ncsnpp": lazy(
        VelocityNetwork,
        model=lazy(
            SongUNet,
            embedding="fourier",
            channel_mult_noise=2,
            encoder="residual",
            resample_filter=(1, 3, 3, 1),
            **_SONG,
        ),
        logvar_head=HEAD,
    ),
    "adm": lazy(
        EDMDenoiser,
        model=lazy(DhariwalUNet, **{**_SONG, "channels": 32}),
        logvar_head=HEAD,
    ),
    "edm2": lazy(
        TrigFlowNetwork,
        model=lazy(EDM2UNet, channels=8, channels_per_head=8, **_UNET),
        logvar_head=HEAD,
    ),
    "dit": lazy(VelocityNetwork, model=_DIT.replace(two_times=True), logvar_head=HEAD),
    "dit of noise": lazy(NoiseDenoiser, model=_DIT, logvar_head=HEAD),
    "mlp": lazy(
        EDMDenoiser,
        model=lazy(
            ToyMLP, width=16, depth=2, cond_dim=CLASSES, two_times=True, takes_guidance=True
        ),
        logvar_head=HEAD,
    ),
}


def make(family: str) -> Network:
    """A network in evaluation mode whose every parameter matters, the same in every process."""
    torch.manual_seed(0)
    network: Network = build(FAMILIES[family])
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return network.eval()


def inputs(network: Network, rows: int = 4) -> tuple[Tensor | None, ...]:
    """Arguments of `forward` with everything that a network takes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, *network.sample_shape, generator=generator)
    t = 0.2 + 0.7 * torch.rand(rows, generator=generator)
    s = t * torch.rand(rows, generator=generator) if network.two_times else None
    cond = torch.eye(CLASSES)[torch.arange(rows) % CLASSES]
    augment = torch.randn(rows, network.augment_dim, generator=generator)
    return x, t, s, cond, augment, 1 + torch.rand(rows, generator=generator)


def backward(network: Network, rows: tuple[Tensor | None, ...]) -> Tensor:
    """The loss with learned weights of both calls, and its gradient; returns the output."""
    out = network(*rows)
    logvar = network.logvar(rows[1])
    loss = out.flatten(1).square().mean(1) * torch.exp(-logvar) + logvar
    loss.mean().backward()
    return out.detach()


def step(network: Network, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    network.after_step()
    optimizer.zero_grad(set_to_none=True)


def sharded(
    network: Network, world: World, *, recompute: bool = False, compile: bool = False
) -> None:
    """`shard`, in one process too, where it would leave the network plain."""
    shard(network, world, world.size, recompute=recompute, compile=compile)
    if world.size == 1:
        distribute(network, "cpu", 1, 1)


def check(family: str, world: World, *, recompute: bool, compile: bool = False) -> None:
    """Two steps of a network that is sharded over all processes, beside those of the whole one."""
    whole, parts = make(family), make(family)
    for network in (whole, parts):
        network.after_step()
    sharded(parts, world, recompute=recompute, compile=compile)
    rows = inputs(whole)
    mine = tuple(None if row is None else row.chunk(world.size)[world.rank] for row in rows)
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-2) for network in (whole, parts)]
    for _ in range(2):
        out = backward(whole, rows)
        torch.testing.assert_close(backward(parts, mine), out.chunk(world.size)[world.rank])
        for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
            assert isinstance(q, DTensor), name
            assert p.grad is not None, name
            assert q.grad is not None, name
            torch.testing.assert_close(full_tensor(q.grad), p.grad, rtol=1e-4, atol=1e-6, msg=name)
            p.grad.copy_(full_tensor(q.grad))  # so that Adam divides equal numbers
        for network, optimizer in zip((whole, parts), optimizers, strict=True):
            step(network, optimizer)
        for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
            torch.testing.assert_close(full_tensor(q), p, rtol=1e-5, atol=1e-6, msg=name)


def check_all(rank: int, size: int, file: str) -> None:
    """`check` of every family in one of `size` processes that meet at `file`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(file, size), rank=rank, world_size=size)
    try:
        for family in FAMILIES:
            for recompute in (False, True):
                check(family, World(rank=rank, size=size), recompute=recompute)
    finally:
        dist.destroy_process_group()
