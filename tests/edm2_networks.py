"""Builds the networks of the stored EDM2 cases, tiny ones, and sharded ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastflow.wrappers import EDMDenoiser
from networks.edm2 import EDM2UNet, LogVariance
from reference_data import reference

# Our names of the official keyword arguments, where they differ.
RENAMED = {
    "img_resolution": "resolution",
    "img_channels": "in_channels",
    "label_dim": "cond_dim",
    "model_channels": "channels",
}


def our_name(name: str) -> str:
    """The name in our denoiser of an official parameter, e.g. "unet.out_gain"."""
    return name.replace("unet.", "model.").replace("logvar_", "logvar_head.")


def our_weights(case: str) -> dict[str, Tensor]:
    """The stored weights by our names; numbers without a dimension have shape [1]."""
    weights = reference(case).weights("net.")
    return {our_name(k): v.reshape(1) if v.ndim == 0 else v for k, v in weights.items()}


def edm2_denoiser(case: str) -> EDMDenoiser:
    """The network of a stored case with its weights, in evaluation mode."""
    config = dict(reference(case).config)
    head = LogVariance(channels=config.pop("logvar_channels"))
    sigma_data, _ = config.pop("sigma_data"), config.pop("use_fp16")
    kwargs = {RENAMED.get(k, k): v for k, v in config.items()}
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
    model = EDM2UNet(**kwargs)
    net = EDMDenoiser(model, sigma_data=sigma_data, logvar_head=head)
    net.load_state_dict(our_weights(case), strict=True)
    return net.eval()


SMALL: dict[str, Any] = {
    "resolution": 8,
    "in_channels": 2,
    "channels": 16,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "channels_per_head": 8,
}


def small(**kwargs: Any) -> EDM2UNet:
    """A tiny network."""
    return EDM2UNet(**{**SMALL, **kwargs})


def scrambled(seed: int = 0, **kwargs: Any) -> EDM2UNet:
    """A tiny network, in evaluation mode, whose gains and rows of weights have every size."""
    torch.manual_seed(seed)
    net = small(**kwargs)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 1:
                p.copy_(torch.rand(1) + 0.5)
            else:
                p.mul_(torch.randn([len(p)] + [1] * (p.ndim - 1)).exp())
    return net.eval()


def check_sharded_after_step(rank: int, size: int, store: dist.Store) -> None:
    """Compare `after_step()` on weights sharded over `size` processes with that on whole ones.

    A function of a module, so that other processes can import it.
    """
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("replicate", "shard"))
        plain, net = (
            EDMDenoiser(
                scrambled(cond_dim=3, two_times=True, takes_guidance=True),
                logvar_head=LogVariance(channels=6),
            )
            for _ in range(2)
        )
        net.load_state_dict(plain.state_dict())
        before = plain.model.out_conv.weight.detach().clone()
        for unit in net.shard_units():
            fully_shard(unit, mesh=mesh)
        fully_shard(net, mesh=mesh)
        for either in (plain, net):
            either.after_step()
        assert not torch.allclose(plain.model.out_conv.weight, before)
        whole = plain.state_dict()
        for name, shards in net.named_parameters():
            assert isinstance(shards, DTensor)
            torch.testing.assert_close(shards.full_tensor(), whole[name], rtol=1e-6, atol=0)
        x, t = torch.ones(2, 2, 8, 8), torch.tensor([0.5, 2.0])
        cond = torch.eye(3)[:2]
        with torch.no_grad():
            torch.testing.assert_close(net(x, t, t / 2, cond), plain(x, t, t / 2, cond))
    finally:
        dist.destroy_process_group()


def check_sharded_in_process(rank: int, size: int, file: str) -> None:
    """`check_sharded_after_step` in one of `size` processes that meet at `file`."""
    torch.set_num_threads(1)
    check_sharded_after_step(rank, size, dist.FileStore(file, size))
