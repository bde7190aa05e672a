"""Converts published weights to the networks of this package: names, values and arguments.

EDM (arXiv 2206.00364) and EDM2 (arXiv 2312.02696) publish snapshots that say what they are. Files
of DiT (arXiv 2212.09748), SiT (arXiv 2401.08740) and of OpenAI's consistency models (arXiv
2303.01469) are bare tensors: what they are of is read from names and shapes, and what those leave
open is asked for, never guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from fastflow.config import Lazy, lazy
from fastflow.errors import CheckpointError, ConfigError
from fastflow.pretrained import Asked, Converted
from fastflow.snapshot import SnapshotModule, read_snapshot, read_state_dict
from fastflow.wrappers import EDMDenoiser, NoiseDenoiser, VelocityNetwork
from networks.adm_unet import HEAD_CHANNELS, DhariwalUNet
from networks.dit import DiT
from networks.edm2 import EDM2UNet, LogVariance
from networks.song_unet import SongUNet

ACCEPTED = (
    "EDM snapshots (EDMPrecond with SongUNet or DhariwalUNet), EDM2 snapshots, DiT and SiT .pt "
    "files, and the ImageNet-64 .pt files of OpenAI's consistency models"
)


def convert(path: Path, asked: Asked) -> Converted:
    """Read a published file; see `fastflow.pretrained.Converter`.

    Raises:
        CheckpointError: not such a file, or it leaves open what `asked` does not say.
    """
    if not _is_torch_file(path):
        return _snapshot(path)
    weights = {name: _single(value) for name, value in read_state_dict(path).items()}
    if {"pos_embed", "x_embedder.proj.weight", "final_layer.linear.weight"} <= weights.keys():
        return _transformer(path, weights, asked)
    if {"time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"} <= weights.keys():
        return _openai(path, weights, asked)
    some = ", ".join(list(weights)[:3]) or "none"
    raise CheckpointError(
        f"{path} holds {len(weights)} tensors ({some}, ...) of no network known here; accepted: "
        f"{ACCEPTED}"
    )


def _is_torch_file(path: Path) -> bool:
    """Whether `torch.save` wrote it: a zip, or before version 1.6 a pickle of this number first."""
    with path.open("rb") as file:
        head = file.read(14)
    return head.startswith(b"PK") or head[2:] == b"\x8a\nl\xfc\x9cF\xf9 j\xa8P"


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _lazy(path: Path, target: type[Any], arguments: Mapping[str, Any]) -> Lazy[Any]:
    try:
        return lazy(target, **arguments)
    except ConfigError as error:
        raise CheckpointError(f"{path} holds a network that is none of ours: {error}") from error


# Snapshots of EDM and EDM2

_RENAMED = {
    "img_resolution": "resolution",
    "img_channels": "in_channels",
    "label_dim": "cond_dim",
    "model_channels": "channels",
    "embedding_type": "embedding",
    "encoder_type": "encoder",
    "decoder_type": "decoder",
}
# Arguments that the official constructors are given by position.
_EDM_ARGUMENTS = ("img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim")
_EDM2_ARGUMENTS = ("img_resolution", "img_channels", "label_dim")
_EDM_NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


def _snapshot(path: Path) -> Converted:
    ema = read_snapshot(path)["ema"]
    assert isinstance(ema, SnapshotModule)
    if ema.class_name == "EDMPrecond" and "model" in ema.children:
        model = ema.children["model"]
        if model.class_name in _EDM_NETWORKS:
            return _edm(path, ema, model)
    if ema.class_name == "Precond" and "unet" in ema.children:
        return _edm2(path, ema, ema.children["unet"])
    parts = ", ".join(child.class_name for child in ema.children.values()) or "nothing"
    raise CheckpointError(
        f"{path} is a snapshot of {ema.class_name} with {parts}, which is not accepted; accepted: "
        f"{ACCEPTED}"
    )


def _arguments(module: SnapshotModule, positional: tuple[str, ...]) -> dict[str, Any]:
    given = {**dict(zip(positional, module.args, strict=False)), **module.kwargs}
    return {
        _RENAMED.get(name, name): tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
    }


def _sigma_data(module: SnapshotModule) -> Any:
    return module.attributes.get("sigma_data", module.kwargs.get("sigma_data", 0.5))


def _edm(path: Path, ema: SnapshotModule, model: SnapshotModule) -> Converted:
    arguments = _arguments(model, _EDM_ARGUMENTS)
    network = _lazy(path, _EDM_NETWORKS[model.class_name], arguments)
    return Converted(
        kind=f"EDM {model.class_name}",
        network=_lazy(path, EDMDenoiser, {"model": network, "sigma_data": _sigma_data(ema)}),
        weights={name: _single(value) for name, value in ema.state_dict().items()},
    )


def _edm2(path: Path, ema: SnapshotModule, unet: SnapshotModule) -> Converted:
    arguments = _arguments(unet, _EDM2_ARGUMENTS)
    network = _lazy(path, EDM2UNet, arguments)
    weights = {_edm2_name(name): value for name, value in ema.state_dict().items()}
    wrapper = {"model": network, "sigma_data": _sigma_data(ema)}
    if "logvar_head.fourier.freqs" in weights:
        channels = len(weights["logvar_head.fourier.freqs"])
        wrapper["logvar_head"] = _lazy(path, LogVariance, {"channels": channels})
    return Converted(
        kind="EDM2 UNet",
        network=_lazy(path, EDMDenoiser, wrapper),
        # Ours have no 0-dimensional parameters: the gains are [1].
        weights={
            name: _single(value).reshape(value.shape or (1,)) for name, value in weights.items()
        },
    )


def _edm2_name(name: str) -> str:
    head = re.sub(r"^logvar_(fourier|linear)\.", r"logvar_head.\1.", name)
    return re.sub(r"^unet\.", "model.", head)


# DiT and SiT

# Hidden size and depth of the published sizes S, B, L, XL, and their heads (arXiv 2212.09748,
# table 1).
_HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16}


def _transformer(path: Path, weights: Mapping[str, Tensor], asked: Asked) -> Converted:
    ours = {f"model.{name}": value for name, value in weights.items()}
    if asked.target is not None:
        return Converted("DiT or SiT", asked.target, ours)
    if asked.kind not in ("dit", "sit"):
        raise CheckpointError(
            f"{path} holds a diffusion transformer; files of DiT (predicts noise) and of SiT "
            f"(velocity) look alike, so say which: --as dit or --as sit"
            + (f" ({asked.kind!r} given)" if asked.kind is not None else "")
        )
    model = _lazy(path, DiT, _dit_arguments(path, weights, asked.heads))
    if asked.kind == "dit":
        return Converted("DiT", _lazy(path, NoiseDenoiser, {"model": model}), ours)
    # SiT has data at time 1 and reads times of [0, 1] as they are.
    network = _lazy(path, VelocityNetwork, {"model": model, "data_at": 1})
    return Converted("SiT", network, ours)


def _dit_arguments(path: Path, weights: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    hidden, channels, patch, _ = _shape(path, weights, "x_embedder.proj.weight", 4)
    _, tokens, _ = _shape(path, weights, "pos_embed", 3)
    rows, _ = _shape(path, weights, "y_embedder.embedding_table.weight", 2)
    outputs, _ = _shape(path, weights, "final_layer.linear.weight", 2)
    inner, _ = _shape(path, weights, "blocks.0.mlp.fc1.weight", 2)
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    if heads is None and (hidden, depth) not in _HEADS:
        raise CheckpointError(
            f"{path}: a transformer of width {hidden} and depth {depth}, whose number of attention "
            f"heads the file does not say; say it: --heads N"
        )
    return {
        "resolution": math.isqrt(tokens) * patch,
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": hidden,
        "depth": depth,
        "num_heads": _HEADS[hidden, depth] if heads is None else heads,
        "mlp_ratio": inner / hidden,
        "cond_dim": rows - 1,  # the last row is that of no class
        "learn_sigma": outputs == 2 * channels * patch**2,
    }


def _shape(path: Path, weights: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    if name not in weights or weights[name].ndim != dims or not weights[name].numel():
        raise CheckpointError(
            f"{path} has no tensor {name!r} of {dims} dimensions; it is damaged, or not what its "
            f"other names say"
        )
    return tuple(weights[name].shape)


# OpenAI's consistency models

# Files do not say the resolution; base width, multipliers and blocks of the published one do.
_OPENAI_RESOLUTION: Mapping[tuple[int, tuple[int, ...], int], int] = {(192, (1, 2, 3, 4), 3): 64}
_LEAST_WIDTH = 128  # theirs have 32 groups in every normalisation, ours fewer below this width
_RES_LAYERS = {
    "in_layers.0": "norm0",
    "in_layers.2": "conv0",
    "emb_layers.1": "affine",
    "out_layers.0": "norm1",
    "out_layers.3": "conv1",
    "skip_connection": "skip",
}
_ATTENTION_LAYERS = {"norm": "norm2", "qkv": "qkv", "proj_out": "proj"}


def _openai(path: Path, weights: Mapping[str, Tensor], asked: Asked) -> Converted:
    """A U-Net as in ADM (arXiv 2105.05233) whose residual blocks change the resolution."""
    arguments = _openai_arguments(path, weights, asked)
    names = dict(_openai_names(arguments, weights))
    unknown, absent = weights.keys() - names.keys(), names.keys() - weights.keys()
    if unknown or absent:
        verb, some = ("has", unknown) if unknown else ("lacks", absent)
        raise _not_openai(path, f"{verb} {', '.join(sorted(some)[:3])}")
    ours = {f"model.{names[name]}": value for name, value in weights.items()}
    for name, value in ours.items():
        if name == "model.map_label.weight":
            ours[name] = value.T.contiguous()
        elif ".qkv." in name:
            # The published networks use flash attention: channels are q | k | v, each head after
            # head, and not head after head as in ADM's own. Ours: head, channel, q | k | v.
            parts = "(three head c) ... -> (head c three) ..."
            ours[name] = rearrange(value, parts, three=3, c=HEAD_CHANNELS)
    for block in _resampling_blocks(arguments):
        for part in ("conv0", "skip"):  # the box filter (1, 1), a buffer of ours
            ours[f"model.{block}.{part}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    network = {
        "model": _lazy(path, DhariwalUNet, arguments),
        "noise_scale": 1000.0,  # they read 1000 ln(sigma)/4
    }
    return Converted("OpenAI consistency model", _lazy(path, EDMDenoiser, network), ours)


def _not_openai(path: Path, text: str) -> CheckpointError:
    return CheckpointError(
        f"{path} looks like a network of OpenAI's consistency models, but {text}; accepted of "
        f"those: the ImageNet-64 ones"
    )


def _openai_arguments(path: Path, weights: Mapping[str, Tensor], asked: Asked) -> dict[str, Any]:
    emb, channels = _shape(path, weights, "time_embed.0.weight", 2)
    in_channels = _shape(path, weights, "input_blocks.0.0.weight", 4)[1]
    out_channels = _shape(path, weights, "out.2.weight", 4)[0]
    if any(value.ndim == 0 for value in weights.values()):
        raise _not_openai(path, "has a number without a dimension")
    if out_channels != in_channels:
        raise _not_openai(path, "it predicts a variance too, as ADM's diffusion models do")
    outputs = [
        name for name in weights if re.fullmatch(r"output_blocks\.\d+\.0\..*2\.weight", name)
    ]
    ups = [name for name in weights if re.fullmatch(r"output_blocks\.\d+\.[12]\..*2\.weight", name)]
    levels = len(ups) + 1
    per_level = len(outputs) // levels
    if per_level < 2:
        raise _not_openai(path, "has no residual blocks in its decoder")
    firsts = [1 + level * per_level for level in range(levels)]
    convs = (f"input_blocks.{first}.0.in_layers.2.weight" for first in firsts)
    widths = [_shape(path, weights, name, 4)[0] for name in convs]
    if _shape(path, weights, "input_blocks.1.0.emb_layers.1.weight", 2)[0] != 2 * widths[0]:
        raise _not_openai(
            path, "its embedding does not scale the normalisation, as in the LSUN networks"
        )
    norms = [v for n, v in weights.items() if re.search(r"(_layers\.0|\.norm|out\.0)\.weight", n)]
    if min(map(len, norms)) < _LEAST_WIDTH:
        raise _not_openai(path, f"it normalises fewer than {_LEAST_WIDTH} channels in 32 groups")
    if any(len(v) % (3 * HEAD_CHANNELS) for n, v in weights.items() if ".qkv." in n):
        raise _not_openai(path, f"its attention has no heads of {HEAD_CHANNELS} channels")
    mult = tuple(width // channels for width in widths)
    resolution = _resolution_of(asked.target) or _OPENAI_RESOLUTION.get(
        (channels, mult, per_level - 1)
    )
    if resolution is None:
        raise _not_openai(
            path,
            "is none of the published ones, and no file says its resolution; give it as "
            "weights of a network that does",
        )
    classes = 0
    if "label_emb.weight" in weights:
        classes, _ = _shape(path, weights, "label_emb.weight", 2)
    attended = (f"input_blocks.{first}.1.qkv.weight" in weights for first in firsts)
    return {
        "resolution": resolution,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "cond_dim": classes,
        "channels": channels,
        "channel_mult": mult,
        "channel_mult_emb": emb // channels,
        "num_blocks": per_level - 1,
        "attn_resolutions": tuple(resolution >> n for n, here in enumerate(attended) if here),
        "dropout": 0.0,  # not in the file
    }


def _resolution_of(target: Lazy | None) -> int | None:
    model = None if target is None else target.kwargs.get("model")
    return model.kwargs.get("resolution") if isinstance(model, Lazy) else None


def _resampling_blocks(arguments: Mapping[str, Any]) -> Iterator[str]:
    for level in range(1, len(arguments["channel_mult"])):
        fine, coarse = (arguments["resolution"] >> n for n in (level - 1, level))
        yield from (f"enc.{coarse}x{coarse}_down", f"dec.{fine}x{fine}_up")


def _openai_names(
    arguments: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, str]]:
    """Their name and ours of every tensor that a network with these arguments has."""
    full = arguments["resolution"]
    layers = {
        "time_embed.0": "map_layer0",
        "time_embed.2": "map_layer1",
        "input_blocks.0.0": f"enc.{full}x{full}_conv",
        "out.0": "out_norm",
        "out.2": "out_conv",
    }
    for block, attention, name in _openai_blocks(arguments):
        layers |= {f"{block}.{theirs}": f"{name}.{ours}" for theirs, ours in _RES_LAYERS.items()}
        if f"{block}.skip_connection.weight" not in weights:
            del layers[f"{block}.skip_connection"]
        if attention is not None:
            inner = _ATTENTION_LAYERS.items()
            layers |= {f"{attention}.{theirs}": f"{name}.{ours}" for theirs, ours in inner}
    for theirs, ours in layers.items():
        yield f"{theirs}.weight", f"{ours}.weight"
        yield f"{theirs}.bias", f"{ours}.bias"
    if arguments["cond_dim"]:
        yield "label_emb.weight", "map_label.weight"


def _openai_blocks(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str | None, str]]:
    """Every residual block: their names of it and of its attention (or None), and ours of both."""
    blocks, levels = arguments["num_blocks"], len(arguments["channel_mult"])
    resolutions = [arguments["resolution"] >> level for level in range(levels)]
    number = 0
    for level, res in enumerate(resolutions):
        attends = res in arguments["attn_resolutions"]
        if level:
            number += 1
            yield f"input_blocks.{number}.0", None, f"enc.{res}x{res}_down"
        for i in range(blocks):
            number += 1
            at = f"input_blocks.{number}"
            yield f"{at}.0", f"{at}.1" if attends else None, f"enc.{res}x{res}_block{i}"
    deepest = resolutions[-1]
    yield "middle_block.0", "middle_block.1", f"dec.{deepest}x{deepest}_in0"
    yield "middle_block.2", None, f"dec.{deepest}x{deepest}_in1"
    number = 0
    for level, res in reversed(list(enumerate(resolutions))):
        attends = res in arguments["attn_resolutions"]
        for i in range(blocks + 1):
            at = f"output_blocks.{number}"
            yield f"{at}.0", f"{at}.1" if attends else None, f"dec.{res}x{res}_block{i}"
            number += 1
        if level:
            fine = resolutions[level - 1]
            yield f"{at}.{2 if attends else 1}", None, f"dec.{fine}x{fine}_up"
