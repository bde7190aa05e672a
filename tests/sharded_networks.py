"""Small wrapped networks of every family, and a step of each sharded beside one of it whole.

Functions of a module, so that other processes can import them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastflow.config import Lazy, build, lazy
from fastflow.distributed import World, distribute, full_tensor, shard
from fastflow.ema import EMA, ConstantEMA
from fastflow.network import Network
from fastflow.progress import Progress
from fastflow.weights import gathered
from fastflow.wrappers import EDMDenoiser, NoiseDenoiser, TrigFlowNetwork, VelocityNetwork
from networks.adm_unet import DhariwalUNet
from networks.dit import DiT
from networks.edm2 import EDM2UNet, LogVariance
from networks.mlp import ToyMLP
from networks.song_unet import SongUNet
from processes import Collectives

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


def make(family: str, *, empty: bool = False) -> Network:
    """A network in evaluation mode whose every parameter matters, the same in every process.

    Args:
        family: a key of `FAMILIES`.
        empty: on the meta device, without weights.
    """
    with torch.device("meta" if empty else "cpu"):
        torch.manual_seed(0)
        network: Network = build(FAMILIES[family])
        with torch.no_grad():
            for p in network.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        network.after_step()
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
    family: str,
    world: World,
    *,
    recompute: bool = False,
    compile: bool = False,
    narrow: torch.dtype | None = None,
    size: int | None = None,
) -> Network:
    """A network of `make` after `shard`, which in one process would leave it plain."""
    network = make(family, empty=not world.is_main)
    shard(network, world, size or world.size, recompute=recompute, compile=compile, narrow=narrow)
    if world.size == 1:
        distribute(network, "cpu", 1, 1, narrow)
    return network


def mine(rows: tuple[Tensor | None, ...], world: World) -> tuple[Tensor | None, ...]:
    """This process's share of the rows."""
    return tuple(None if row is None else row.chunk(world.size)[world.rank] for row in rows)


def check(
    world: World,
    family: str,
    *,
    recompute: bool = False,
    compile: bool = False,
    size: int | None = None,
) -> None:
    """Two steps of a network that is sharded over all processes, beside those of the whole one.

    Initial weights, outputs, gradients, their norm and clipping, weights, averages, and what is
    saved of them. Only the main process's network has weights at first.
    """
    whole = make(family)
    parts = sharded(family, world, recompute=recompute, compile=compile, size=size)
    saved = gathered(parts.state_dict(), keep=True)
    assert saved.keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(saved[name], value), name
    rows = inputs(whole)
    networks = (whole, parts)
    emas = [EMA(network, ConstantEMA(beta=0.9)) for network in networks]
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-2) for network in networks]
    for number in range(2):
        out = backward(whole, rows)
        ours = backward(parts, mine(rows, world))
        torch.testing.assert_close(ours, out.chunk(world.size)[world.rank])
        for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
            assert isinstance(q, DTensor), name
            assert p.grad is not None, name
            assert q.grad is not None, name
            torch.testing.assert_close(full_tensor(q.grad), p.grad, rtol=1e-4, atol=1e-6, msg=name)
        norms = [torch.nn.utils.clip_grad_norm_(n.parameters(), 1e-2) for n in networks]
        torch.testing.assert_close(full_tensor(norms[1]), norms[0], rtol=1e-5, atol=0)
        assert norms[0] > 1e-2
        for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
            torch.testing.assert_close(full_tensor(q.grad), p.grad, rtol=1e-4, atol=1e-7)
            p.grad.copy_(full_tensor(q.grad))  # so that Adam divides equal numbers
        for network, optimizer, ema in zip(networks, optimizers, emas, strict=True):
            step(network, optimizer)
            ema.update(network, Progress(number + 1, 4 * (number + 1), 2, 4))
        for theirs, weights in (networks, emas):
            wanted = theirs.state_dict()
            for name, value in gathered(weights.state_dict(), keep=True).items():
                torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6, msg=name)


def gather(world: World, family: str) -> tuple[list[torch.dtype], list[torch.dtype]]:
    """Types in which a step in bfloat16 gathers weights and sums gradients."""
    network = sharded(family, world, narrow=torch.bfloat16)
    with Collectives() as collectives:
        backward(network, mine(inputs(network), world))
    return collectives.named("gather"), collectives.named("reduce_scatter")
