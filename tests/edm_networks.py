"""Builds the networks of the stored EDM cases and checks what was recorded of them."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from fastflow.wrappers import EDMDenoiser
from networks.adm_unet import DhariwalUNet
from networks.song_unet import SongUNet
from reference_data import Reference, reference

ARCHITECTURES = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}

# Our names of the official keyword arguments, where they differ.
RENAMED = {
    "img_resolution": "resolution",
    "label_dim": "cond_dim",
    "model_channels": "channels",
    "embedding_type": "embedding",
    "encoder_type": "encoder",
    "decoder_type": "decoder",
}


def our_keywords(config: dict[str, Any]) -> dict[str, Any]:
    """Our keyword arguments from the official ones."""
    kwargs = {RENAMED.get(k, k): v for k, v in config.items()}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}


def from_py_meanflow(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `SongUNet(two_times=True)` from one of py-meanflow's U-Net.

    There the two times enter side by side: the first half of what acts on them is `map_layer0`
    and its labels here, the second half is `map_second`. Attention's rows go from q | k | v to
    one q, k and v after the other.
    """
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        first, _, kind = name.partition(".")
        if name == "map_layer0.weight":
            out[name], out["map_second.layer.weight"] = value.chunk(2, dim=1)
        elif first in ("map_label", "map_augment"):
            second = f"map_second.{first.removeprefix('map_')}.{kind}"
            out[name], out[second] = value.chunk(2, dim=0)
        elif ".qkv." in name:
            out[name] = rearrange(value, "(three c) ... -> (c three) ...", three=3)
        else:
            out[name] = value
    return out


def edm_denoiser(case: str) -> EDMDenoiser:
    """The network of a stored case with its weights, in evaluation mode."""
    ref = reference(case)
    kwargs = our_keywords(ref.config)
    sigma_data, kind = kwargs.pop("sigma_data"), kwargs.pop("model_type")
    kwargs["in_channels"] = kwargs["out_channels"] = kwargs.pop("img_channels")
    net = EDMDenoiser(ARCHITECTURES[kind](**kwargs), sigma_data=sigma_data)
    net.load_state_dict(ref.weights("net."), strict=True)
    return net.eval()


def labels(ref: Reference, key: str, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """The conditions that the recorded call `key`, e.g. "D_label_aug.f64", was given."""
    variant = key.removesuffix(".f64")
    return {
        "cond": ref["class_labels"].to(dtype) if "label" in variant else None,
        "augment": ref["augment_labels"].to(dtype) if "aug" in variant else None,
    }


def last_labels(ref: Reference) -> dict[str, Tensor | None]:
    """All conditions the network knows: those of the gradients and of the scalar sigma."""
    return {
        kind: ref[key] if key in ref else None  # noqa: SIM401, a Reference has no get()
        for kind, key in (("cond", "class_labels"), ("augment", "augment_labels"))
    }


def check_outputs(case: str) -> None:
    """Compare every recorded denoised image and raw output, in float32 and in float64."""
    ref, net = reference(case), edm_denoiser(case)
    raw: list[Tensor] = []
    net.model.register_forward_hook(lambda module, args, out: raw.append(out))
    keys = [k for k in ref.keys("D_") if k != "D_scalar_sigma"]
    assert len(keys) >= 2
    for key in sorted(keys, key=lambda k: k.endswith(".f64")):
        dtype = torch.float64 if key.endswith(".f64") else torch.float32
        net.to(dtype)
        with torch.no_grad():
            out = net(ref["x"].to(dtype), ref["sigma"].to(dtype), **labels(ref, key, dtype))
        assert out.dtype == dtype
        ref.check(key, out)
        raw_key = key.replace("D_", "F_", 1)
        if raw_key in ref:
            ref.check(raw_key, raw[-1])
    net.float()
    with torch.no_grad():
        ref.check("D_scalar_sigma", net(ref["x"], torch.full((4,), 1.5), **last_labels(ref)))


def check_gradients(case: str) -> None:
    """Compare the recorded gradients of the probe loss by parameters and by the input."""
    ref, net = reference(case), edm_denoiser(case)
    x = ref["x"].requires_grad_()
    out = net(x, ref["sigma"], **last_labels(ref))
    loss = (out * ref["loss_probe"]).sum() / out.numel()
    loss.backward()
    ref.check("loss", loss)
    parameters = dict(net.named_parameters())
    names = [k.removeprefix("grad.") for k in ref.keys("grad.")]
    assert len(names) == 4
    for name in names:
        grad = x.grad if name == "x" else parameters[name].grad
        assert grad is not None
        ref.check(f"grad.{name}", grad)


def check_names(case: str) -> None:
    """Compare names, shapes and order of the state dict with the checkpoint's."""
    ref, net = reference(case), edm_denoiser(case)
    assert [f"net.{name}" for name in net.state_dict()] == list(ref.info["weights"]["names"])
