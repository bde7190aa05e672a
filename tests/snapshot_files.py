"""Writes snapshots as NVlabs EDM and EDM2 do, from stand-ins of their classes.

The structure is the official one (`torch_utils.persistence`, version 6): an object of a persistent
class pickles as a call of `_reconstruct_persistent_obj` with its source code, class name and
`__dict__`. The modules that the pickles name exist while a file is written, never while it is read.
"""

from __future__ import annotations

import copy
import pickle
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

# What the original loader would execute.
SOURCE = "raise SystemExit('the source code in a snapshot was executed')\n"
VERSION = 6


def _reconstruct_persistent_obj(meta):
    raise AssertionError("a stand-in that is never called")


class EasyDict(dict):
    """The official dict, which has its own class."""


_OFFICIAL = {"torch_utils.persistence": _reconstruct_persistent_obj, "dnnlib.util": EasyDict}
for _module, _value in _OFFICIAL.items():
    _value.__module__ = _module


@contextmanager
def official_modules() -> Iterator[None]:
    """The modules that snapshots name, for the time of pickling."""
    added = ("torch_utils", "dnnlib", *_OFFICIAL)
    assert not set(added) & set(sys.modules)
    for name in added:
        sys.modules[name] = types.ModuleType(name)
    for name, value in _OFFICIAL.items():
        setattr(sys.modules[name], value.__name__, value)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def dumps(value: object, protocol: int = 4) -> bytes:
    with official_modules():
        return pickle.dumps(value, protocol=protocol)


class Persistent:
    """Pickles as the official persistent classes do, under the name of its class."""

    def record(self, *args, **kwargs):
        """Keep the arguments of construction."""
        self._init_args, self._init_kwargs = copy.deepcopy(args), copy.deepcopy(kwargs)
        return self

    def __reduce__(self):
        state = object.__reduce__(self)[2]
        meta = {"type": "class", "version": VERSION, "module_src": SOURCE}
        meta |= {"class_name": type(self).__name__, "state": state}
        return _reconstruct_persistent_obj, (meta,), None


def thing(class_name: str, attributes: Mapping[str, object], *args, **kwargs) -> Persistent:
    """A persistent object without tensors, such as a loss, constructed with args and kwargs."""
    made = type(class_name, (Persistent,), {})()
    vars(made).update(attributes)
    return made.record(*args, **kwargs)


def module(
    class_name: str,
    *args,
    tensors: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor | None] | None = None,
    passing: Mapping[str, Tensor] | None = None,
    children: Mapping[str, nn.Module] | None = None,
    attributes: Mapping[str, object] | None = None,
    **kwargs,
) -> nn.Module:
    """A persistent module, constructed with args and kwargs.

    Args:
        class_name: under which it pickles.
        args, kwargs: recorded as the arguments of construction.
        tensors: parameters.
        buffers: persistent buffers.
        passing: buffers that are no part of the state.
        children: modules in it.
        attributes: everything else.
    """
    made = type(class_name, (Persistent, nn.Module), {})()
    for name, tensor in (tensors or {}).items():
        made.register_parameter(name, None if tensor is None else nn.Parameter(tensor, False))
    for name, tensor in (buffers or {}).items():
        made.register_buffer(name, tensor)
    for name, tensor in (passing or {}).items():
        made.register_buffer(name, tensor, persistent=False)
    for name, child in (children or {}).items():
        made.register_module(name, child)
    vars(made).update(attributes or {})
    return made.record(*args, **kwargs).eval()


def network_of(class_name: str, state: Mapping[str, Tensor], *args, **options) -> nn.Module:
    """A persistent module with the tensors of `state`, by full name, in modules as names say."""
    own = {name: tensor for name, tensor in state.items() if "." not in name}
    children = {}
    for first in dict.fromkeys(name.split(".")[0] for name in state if "." in name):
        prefix = f"{first}."
        inner = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        children[first] = network_of("Part", inner)
    options["children"] = children | options.get("children", {})
    return module(class_name, *args, tensors=own, **options)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def edm_network(seed: int = 0) -> nn.Module:
    """A small stand-in of an EDM network with all that occurs in the official ones."""
    g = torch.Generator().manual_seed(seed)
    init = {"init_mode": "xavier_uniform", "init_weight": np.sqrt(0.2)}

    def conv(cin, cout, kernel, **kwargs):
        return module(
            "Conv2d",
            tensors={
                "weight": _normal(g, cout, cin, kernel, kernel) if kernel else None,
                "bias": _normal(g, cout) if kernel else None,
            },
            buffers={"resample_filter": torch.ones(1, 1, 2, 2) / 4 if kwargs else None},
            attributes={"in_channels": cin, "out_channels": cout, "up": "up" in kwargs},
            **{"in_channels": cin, "out_channels": cout, "kernel": kernel, **init, **kwargs},
        )

    block = module(
        "UNetBlock",
        children={
            "norm0": module("GroupNorm", tensors={"weight": _normal(g, 4), "bias": _normal(g, 4)}),
            "conv0": conv(4, 4, 3, up=True, resample_filter=[1, 1]),
            "skip": conv(4, 4, 0),
        },
        attributes={"skip_scale": np.float64(0.5) ** 0.5, "num_heads": 0, "norm1": None},
        skip_scale=np.sqrt(0.5),
        eps=1e-6,
        init=init,
    )
    unet = module(
        "SongUNet",
        children={
            "map_layer0": module("Linear", tensors={"weight": _normal(g, 8, 4)}),
            "enc": nn.ModuleDict({"8x8_conv": conv(3, 4, 3), "8x8_block0": block}),
            "dec": nn.ModuleDict({"8x8_aux_norm": nn.GroupNorm(2, 4), "plain": nn.Identity()}),
            "map_augment": None,
        },
        attributes={"label_dropout": 0.0},
        img_resolution=8,
        channel_mult=[1, 2],
        dropout=0.13,
    )
    return module(
        "EDMPrecond",
        8,
        3,
        buffers={"u": torch.arange(5, dtype=torch.float64), "steps": torch.tensor(2**40)},
        passing={"cache": _normal(g, 3)},
        children={"model": unet},
        attributes={
            **{"img_resolution": 8, "img_channels": 3, "label_dim": 0, "use_fp16": False},
            **{"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5},
        },
        label_dim=0,
        model_type="SongUNet",
        use_fp16=False,
        channel_mult=[1, 2],
        resample_filter=[1, 1],
        augment_dim=9,
    )


def edm_entries(network: nn.Module) -> dict[str, object]:
    """What an EDM snapshot holds besides and with its network."""
    loss = {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5}
    return {
        "ema": network,
        "loss_fn": thing("EDMLoss", loss),
        "augment_pipe": thing("AugmentPipe", {"p": np.float32(0.125), "xflip": 1e8}, p=0.12),
        "dataset_kwargs": EasyDict(
            class_name="training.dataset.ImageFolderDataset",
            path="cifar10-32x32.zip",
            max_size=np.int64(50_000),
            use_labels=np.bool_(True),
            range=np.array([[0, 1, 2], [3, 4, 5]], dtype=">i2"),
        ),
    }


def edm2_network(seed: int = 0) -> nn.Module:
    """A small stand-in of an EDM2 network, in float16 as published."""
    g = torch.Generator().manual_seed(seed)

    def conv(*shape):
        return module("MPConv", tensors={"weight": _normal(g, *shape)}, kernel=[*shape[2:]])

    def block(flavor):
        parts = {"emb_linear": conv(4, 8), "conv_res0": conv(4, 4, 3, 3), "conv_skip": None}
        return module(
            "Block",
            tensors={"emb_gain": torch.zeros([])},
            children=parts,
            attributes={"flavor": flavor, "resample_filter": [1, 1], "clip_act": 256},
            flavor=flavor,
        )

    fourier = {"freqs": _normal(g, 4), "phases": _normal(g, 4)}
    unet = module(
        "UNet",
        tensors={"out_gain": torch.zeros([])},
        children={
            "emb_fourier": module("MPFourier", buffers=fourier),
            "emb_noise": conv(8, 4),
            "emb_label": None,
            "enc": nn.ModuleDict({"8x8_conv": conv(4, 5, 3, 3), "8x8_block0": block("enc")}),
            "dec": nn.ModuleDict({"8x8_in0": block("dec")}),
        },
        attributes={"label_balance": 0.5, "concat_balance": 0.5},
    )
    network = module(
        "Precond",
        8,
        4,
        children={
            "unet": unet,
            "logvar_fourier": module("MPFourier", buffers=fourier),
            "logvar_linear": conv(1, 4),
        },
        attributes={"label_dim": 10, "use_fp16": True, "sigma_data": 0.5},
        **{"label_dim": 10, "use_fp16": True, "sigma_data": 0.5, "logvar_channels": 4},
        **{"model_channels": 4, "dropout": 0},
    )
    return network.to(torch.float16)


def edm2_entries(network: nn.Module) -> EasyDict:
    """What an EDM2 snapshot holds besides and with its network."""
    scale = np.float32(0.5) / np.float32([4.17, 4.62, 3.71, 3.28])
    encoder = {"vae_name": "stabilityai/sd-vae-ft-mse", "scale": scale, "_vae": None}
    return EasyDict(
        encoder=thing("StabilityVAEEncoder", encoder, batch_size=8),
        dataset_kwargs=EasyDict(path="img512-sd.zip", use_labels=True),
        loss_fn=thing("EDM2Loss", {"P_mean": -0.4, "P_std": 1.0, "sigma_data": 0.5}),
        ema=network,
    )


def write_edm(path: Path, network: nn.Module, protocol: int = 4) -> Path:
    path.write_bytes(dumps(edm_entries(network), protocol))
    return path


def write_edm2(path: Path, network: nn.Module, protocol: int = 4) -> Path:
    path.write_bytes(dumps(edm2_entries(network), protocol))
    return path
