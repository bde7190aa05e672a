"""DINOv2's transformer against torch's own layers, and what it is fed with."""

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from fastflow.evaluation.dinov2 import DINOv2Features, DINOv2ViT, prepare
from fastflow.torchvision_shim import import_beside_torchvision

SMALL = {"width": 32, "depth": 2, "heads": 4, "grid": 20}
IMAGES = torch.randint(
    0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = DINOv2ViT(**SMALL)
    for weight in net.parameters():
        # Norms and scales stay near 1: attention that prefers no patch would not see positions.
        weight.data = 0.3 * torch.randn_like(weight) + (weight if weight.ndim == 1 else 0)
    return net.eval().requires_grad_(False)


def torchs(net):
    """The blocks as torch.nn.TransformerEncoderLayer, the scales folded into the projections."""
    layers = []
    for block in net.blocks:
        layer = nn.TransformerEncoderLayer(
            32, 4, 128, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
        )
        attention, mlp = block.attn, block.mlp
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": attention.qkv.weight,
                "self_attn.in_proj_bias": attention.qkv.bias,
                "self_attn.out_proj.weight": block.ls1.gamma[:, None] * attention.proj.weight,
                "self_attn.out_proj.bias": block.ls1.gamma * attention.proj.bias,
                "linear1.weight": mlp.fc1.weight,
                "linear1.bias": mlp.fc1.bias,
                "linear2.weight": block.ls2.gamma[:, None] * mlp.fc2.weight,
                "linear2.bias": block.ls2.gamma * mlp.fc2.bias,
                **{f"{n}.{k}": v for n in ("norm1", "norm2") for k, v in part(block, n).items()},
            }
        )
        layers.append(layer)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def part(block, name):
    return getattr(block, name).state_dict()


@pytest.mark.parametrize("side", [280, 224])  # as many patches as positions; interpolated
def test_features_are_those_of_a_plain_transformer(net, side):
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    patches = (
        x.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    )
    proj = net.patch_embed["proj"]
    tokens = patches @ proj.weight.flatten(1).T + proj.bias
    positions = net.pos_embed[0, 1:]
    if side == 224:
        table = positions.T.reshape(1, 32, 20, 20)
        # As the published code does, not by size: (16 + 0.1) / 20.
        table = interpolate(table, scale_factor=(0.805, 0.805), mode="bicubic")
        positions = table[0].flatten(1).T
    first = (net.cls_token[0] + net.pos_embed[0, :1]).expand(2, 1, -1)
    out = torchs(net)(torch.cat([first, tokens + positions], 1))
    expected = nn.functional.layer_norm(out[:, 0], (32,), net.norm.weight, net.norm.bias, 1e-6)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def test_vit_l14_has_the_published_tensors():
    with torch.device("meta"):
        state = DINOv2ViT().state_dict()
    assert len(state) == 343
    count = sum(value.numel() for value in state.values())
    assert count == 304_368_640
    assert 0 < 1_217_586_395 - 4 * count < 343 * 500  # bytes of the published file, and its index
    for name, shape in {
        "pos_embed": (1, 1370, 1024),
        "mask_token": (1, 1024),
        "patch_embed.proj.weight": (1024, 3, 14, 14),
        "blocks.23.attn.qkv.bias": (3072,),
        "blocks.0.ls2.gamma": (1024,),
        "blocks.7.mlp.fc1.weight": (4096, 1024),
        "norm.bias": (1024,),
    }.items():
        assert state[name].shape == shape


def test_bicubic_images_are_antialiased_and_normalised():
    x = interpolate(IMAGES.float(), (224, 224), mode="bicubic", antialias=True) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((x.movedim(1, -1) - mean) / std).movedim(-1, 1)
    torch.testing.assert_close(prepare(IMAGES, "bicubic"), expected)
    assert (prepare(IMAGES, "bicubic") - prepare(IMAGES, "bilinear")).abs().max() > 0.1


def test_bilinear_features_are_torch_fidelitys(net):
    """Its extractor around our network, which it would fetch from GitHub."""
    module = import_beside_torchvision("torch_fidelity.feature_extractor_dinov2", "test", "eval")
    theirs = module.FeatureExtractorDinoV2.__new__(module.FeatureExtractorDinoV2)
    nn.Module.__init__(theirs)
    theirs.features_list, theirs.model = ["dinov2"], net
    theirs.feature_extractor_internal_dtype = torch.float32
    (expected,) = theirs(IMAGES)
    (features,) = DINOv2Features(net, "bilinear")(IMAGES)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
