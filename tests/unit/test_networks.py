"""What every raw network promises: forward-mode AD, precision, labels, initial values, sizes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastflow.errors import ConfigError
from networks.adm_unet import DhariwalUNet
from networks.layers import ConvDownsample, GroupNorm, Resample, attention
from networks.mlp import ToyMLP
from networks.song_unet import SongUNet
from networks.unet import UNet, UNetBlock

SMALL = {"resolution": 8, "in_channels": 2, "out_channels": 2, "channel_mult": (1, 2)}
SONG = {**SMALL, "channels": 8, "num_blocks": 1, "attn_resolutions": (4,), "dropout": 0.0}
NCSN = {
    **SONG,
    "embedding": "fourier",
    "channel_mult_noise": 2,
    "encoder": "residual",
    "resample_filter": (1, 3, 3, 1),
}
ADM = {
    **SMALL,
    "channels": 32,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "dropout": 0.0,
}


def ddpmpp(**kwargs: Any) -> SongUNet:
    return SongUNet(**{**SONG, **kwargs})


def ncsnpp(**kwargs: Any) -> SongUNet:
    return SongUNet(**{**NCSN, **kwargs})


def skip(**kwargs: Any) -> SongUNet:
    return SongUNet(**{**NCSN, "encoder": "skip", "decoder": "skip", **kwargs})


def adm(**kwargs: Any) -> DhariwalUNet:
    return DhariwalUNet(**{**ADM, **kwargs})


def mlp(**kwargs: Any) -> ToyMLP:
    return ToyMLP(**{"width": 16, "depth": 2, **kwargs})


UNETS = [ddpmpp, ncsnpp, skip, adm]
NETS = [*UNETS, mlp]
Maker = Callable[..., Any]


def scramble(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a size that matters, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            fan = max(p[0].numel(), 1) if p.ndim > 1 else 4
            noise = torch.randn(p.shape, generator=generator) / math.sqrt(fan)
            p.copy_(noise + (1.0 if p.ndim == 1 else 0.0))
        for name, buffer in net.named_buffers():
            if name.endswith("freqs"):  # small, so that finite differences resolve them
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return net.eval()


def inputs(net: Any, rows: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((rows, *net.sample_shape), generator=generator, dtype=torch.float64)
    c_noise = torch.randn(rows, generator=generator, dtype=torch.float64) / 2
    return x.to(dtype), c_noise.to(dtype)


def directions(x: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    dx = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    dc = torch.randn(c_noise.shape, generator=generator, dtype=torch.float64)
    return dx.to(x.dtype), dc.to(c_noise.dtype)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


# Forward-mode differentiation


@pytest.mark.parametrize("make", NETS)
def test_jvp_equals_float64_finite_differences(make: Maker) -> None:
    net = scramble(make()).double()
    x, c = inputs(net, dtype=torch.float64)
    dx, dc = directions(x, c)
    with torch.no_grad():
        _, tangent = torch.func.jvp(net, (x, c), (dx, dc))
        h = 1e-5
        central = (net(x + h * dx, c + h * dc) - net(x - h * dx, c - h * dc)) / (2 * h)
        assert relative(tangent, central) < 1e-7
        single = scramble(make())
        args, tangents = (x.float(), c.float()), (dx.float(), dc.float())
        assert relative(torch.func.jvp(single, args, tangents)[1], central) < 1e-4


@pytest.mark.parametrize("make", NETS)
def test_jvp_under_bf16_autocast_keeps_one_type(make: Maker) -> None:
    net = scramble(make())
    x, c = inputs(net)
    dx, dc = directions(x, c)
    with torch.no_grad():
        out, tangent = torch.func.jvp(net, (x, c), (dx, dc))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low, low_tangent = torch.func.jvp(net, (x, c), (dx, dc))
    assert low.dtype == low_tangent.dtype == torch.float32
    assert 0 < relative(low, out) < 0.05
    assert relative(low_tangent, tangent) < 0.1


@pytest.mark.parametrize("make", UNETS)
def test_jvp_takes_channels_last_images(make: Maker) -> None:
    net = scramble(make())
    x, c = inputs(net)
    dx, dc = directions(x, c)
    last = torch.channels_last
    _, plain = torch.func.jvp(net, (x, c), (dx, dc))
    _, other = torch.func.jvp(net, (x.to(memory_format=last), c), (dx.to(memory_format=last), dc))
    assert relative(other, plain) < 1e-5


def test_fused_attention_agrees_and_is_differentiable_under_the_math_kernel() -> None:
    explicit, fused = scramble(ddpmpp()), scramble(ddpmpp(attention="fused"))
    x, c = inputs(explicit)
    tangents = directions(x, c)
    assert relative(fused(x, c), explicit(x, c)) < 1e-5
    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(fused, (x, c), tangents)
    assert relative(tangent, torch.func.jvp(explicit, (x, c), tangents)[1]) < 1e-5


@pytest.mark.parametrize("make", [ddpmpp, adm])
def test_compiled_jvp_agrees(make: Maker) -> None:
    net = scramble(make())
    x, c = inputs(net)
    tangents = directions(x, c)

    def tangent(x: Tensor, c: Tensor, dx: Tensor, dc: Tensor) -> Tensor:
        return torch.func.jvp(net, (x, c), (dx, dc))[1]

    with torch.no_grad():
        compiled = torch.compile(tangent, backend="eager", fullgraph=True)(x, c, *tangents)
        assert relative(compiled, tangent(x, c, *tangents)) < 1e-5


# Precision


@pytest.mark.parametrize("make", NETS)
def test_noise_embedding_is_never_narrowed(make: Maker) -> None:
    net = scramble(make())
    seen: list[torch.dtype] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.extend([args[0].dtype, out.dtype])

    for name, module in net.named_modules():
        if name.startswith("map_"):
            module.register_forward_hook(note)
    x, c = inputs(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x, c)
    assert len(seen) >= 2
    assert set(seen) == {torch.float32}
    assert out.dtype == torch.float32
    torch.testing.assert_close(net(x, c.double()), net(x, c))


@pytest.mark.parametrize("make", NETS)
def test_narrow_noise_level_is_refused(make: Maker) -> None:
    net = make()
    x, c = inputs(net)
    with pytest.raises(ConfigError, match=r"c_noise: torch.bfloat16 given.*float32"):
        net(x, c.bfloat16())


@pytest.mark.parametrize("make", NETS)
def test_rows_do_not_depend_on_the_batch(make: Maker) -> None:
    net = scramble(make()).double()
    x, c = inputs(net, rows=4, dtype=torch.float64)
    torch.testing.assert_close(net(x, c)[2:3], net(x[2:3], c[2:3]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("make", NETS)
def test_inputs_are_left_alone_and_the_network_can_be_copied(make: Maker) -> None:
    net = scramble(make())
    x, c = inputs(net)
    before = x.clone(), c.clone()
    out = copy.deepcopy(net)(x, c)
    torch.testing.assert_close((x, c), before, rtol=0, atol=0)
    torch.testing.assert_close(out, net(x, c), rtol=0, atol=0)
    assert all(p.ndim > 0 for p in net.parameters())


# Labels


@pytest.mark.parametrize("make", NETS)
def test_no_class_is_the_zero_row(make: Maker) -> None:
    net = scramble(make(cond_dim=5))
    x, c = inputs(net)
    assert net.cond_dim == 5
    with torch.no_grad():
        none, zero = net(x, c), net(x, c, torch.zeros(3, 5))
        torch.testing.assert_close(none, zero, rtol=0, atol=0)
        rows = torch.eye(5)[[0, 1, 4]]
        assert relative(net(x, c, rows), none) > 1e-3
        swapped = net(x, c, rows[[1, 0, 2]])
        torch.testing.assert_close(swapped[2], net(x, c, rows)[2])
        assert relative(swapped[0], net(x, c, rows)[0]) > 1e-3


@pytest.mark.parametrize("make", UNETS)
def test_no_augmentation_is_the_zero_row(make: Maker) -> None:
    net = scramble(make(augment_dim=4))
    x, c = inputs(net)
    none, zero = net(x, c), net(x, c, augment=torch.zeros(3, 4))
    torch.testing.assert_close(none, zero, rtol=0, atol=0)
    assert relative(net(x, c, augment=torch.randn(3, 4)), none) > 1e-3


@pytest.mark.parametrize("make", UNETS)
def test_every_parameter_gets_a_gradient_without_labels(make: Maker) -> None:
    net = make(cond_dim=5, augment_dim=4)
    x, c = inputs(net)
    net(x, c).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("make", NETS)
def test_labels_of_another_shape_are_refused(make: Maker) -> None:
    net = make(cond_dim=5)
    x, c = inputs(net)
    with pytest.raises(ConfigError, match=r"cond: shape \(3, 4\) given, \(3, 5\) accepted"):
        net(x, c, torch.zeros(3, 4))
    with pytest.raises(ConfigError, match="cond_dim=0"):
        make()(x, c, torch.zeros(3, 5))
    with pytest.raises(ConfigError, match="augment_dim=0"):
        net(x, c, augment=torch.zeros(3, 2))


@pytest.mark.parametrize("make", [ddpmpp, adm])
def test_label_dropout_zeroes_whole_rows_in_training_only(make: Maker) -> None:
    net = scramble(make(cond_dim=5, label_dropout=0.5))
    x, c = inputs(net, rows=16)
    rows = torch.eye(5)[torch.arange(16) % 5]
    with torch.no_grad():
        given, none = net(x, c, rows), net(x, c)
        torch.manual_seed(0)
        mixed = net.train()(x, c, rows)
    kept = [torch.allclose(m, g, atol=1e-5) for m, g in zip(mixed, given, strict=True)]
    dropped = [torch.allclose(m, n, atol=1e-5) for m, n in zip(mixed, none, strict=True)]
    assert all(k != d for k, d in zip(kept, dropped, strict=True))
    assert 0 < sum(kept) < 16


@pytest.mark.parametrize("make", UNETS)
def test_dropout_is_active_in_training_only_and_follows_the_seed(make: Maker) -> None:
    net, plain = scramble(make(dropout=0.3)), scramble(make())
    x, c = inputs(net)
    with torch.no_grad():
        torch.testing.assert_close(net(x, c), plain(x, c), rtol=0, atol=0)
        net.train()
        torch.manual_seed(3)
        first, second = net(x, c), net(x, c)
        torch.manual_seed(3)
        again = net(x, c)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert relative(second, first) > 1e-3


# Initial values


def test_initial_song_unet_is_nearly_zero_and_xavier() -> None:
    torch.manual_seed(0)
    net = ddpmpp(channels=32, cond_dim=6)
    x, c = inputs(net)
    out = net.eval()(x, c)
    assert 0 < float(out.detach().abs().max()) < 1e-3
    for name, p in net.state_dict().items():
        if "norm" in name or name.endswith("resample_filter"):
            continue
        if name.endswith("bias"):
            assert not p.any(), name
            continue
        fan_in, fan_out = p[0].numel(), p[:, 0].numel()
        gain = 1.0
        if any(part in name for part in ("conv1", "proj", "aux_conv")):
            gain = 1e-5
        elif "qkv" in name:
            gain = math.sqrt(0.2)
        bound = gain * math.sqrt(6 / (fan_in + fan_out))
        assert 0.9 * bound < float(p.abs().max()) <= bound, name
        if p.numel() > 2000:
            assert float(p.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_initial_adm_is_zero_and_kaiming() -> None:
    torch.manual_seed(0)
    net = adm(cond_dim=50, augment_dim=4)
    x, c = inputs(net)
    assert not net.eval()(x, c).any()
    for name, p in net.state_dict().items():
        if "norm" in name or name.endswith("resample_filter"):
            continue
        if any(part in name for part in ("conv1", "proj", "out_conv", "map_augment")):
            assert not p.any(), name
        elif name == "map_label.weight":
            assert float(p.std()) == pytest.approx(1.0, rel=0.05)
        elif p.ndim > 1:
            bound = 1 / math.sqrt(p[0].numel())
            assert 0.8 * bound < float(p.abs().max()) <= bound, name
        else:
            assert p.any(), name


# Sizes and structure


@pytest.mark.parametrize(
    ("build", "millions"),
    [
        (lambda: SongUNet(resolution=32, channel_mult=(2, 2, 2), augment_dim=9), 55.73),
        (lambda: SongUNet(resolution=64, channel_mult=(1, 2, 2, 2), augment_dim=9), 61.81),
        (
            lambda: SongUNet(
                resolution=32,
                channel_mult=(2, 2, 2),
                augment_dim=9,
                embedding="fourier",
                channel_mult_noise=2,
                encoder="residual",
                resample_filter=(1, 3, 3, 1),
            ),
            56.40,
        ),
        (lambda: DhariwalUNet(resolution=64, cond_dim=1000), 295.90),
    ],
    ids=["ddpmpp-cifar10", "ddpmpp-64", "ncsnpp-cifar10", "adm-imagenet64"],
)
def test_published_sizes_on_the_meta_device(build: Callable[[], UNet], millions: float) -> None:
    with torch.device("meta"):
        net = build()
        x, c = torch.empty(2, *net.sample_shape), torch.empty(2)
        assert net(x, c).shape == x.shape
    count = sum(p.numel() for p in net.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("make", NETS)
def test_shard_units_are_disjoint_and_hold_most_parameters(make: Maker) -> None:
    net = make()
    units = net.shard_units()
    held = [p for unit in units for p in unit.parameters()]
    assert len(units) >= 2
    assert len({id(p) for p in held}) == len(held)
    assert sum(p.numel() for p in held) > 0.5 * sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("direction", ["down", "up"])
def test_the_box_filter_has_the_numbers_of_the_general_one(direction: str) -> None:
    resample = Resample((1, 1), direction)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 8, 8)
    fast = resample(x)
    resample.box = False
    torch.testing.assert_close(fast, resample(x))
    torch.testing.assert_close(fast.mean(), x.mean())


def test_the_blur_keeps_a_constant_inside() -> None:
    x = torch.ones(1, 1, 8, 8)
    down, up = Resample((1, 3, 3, 1), "down")(x), Resample((1, 3, 3, 1), "up")(x)
    assert down.shape == (1, 1, 4, 4)
    assert up.shape == (1, 1, 16, 16)
    torch.testing.assert_close(down[..., 1:-1, 1:-1], torch.ones(1, 1, 2, 2))
    torch.testing.assert_close(up[..., 1:-1, 1:-1], torch.ones(1, 1, 14, 14))
    assert ConvDownsample(1, 2, 3, (1, 3, 3, 1))(x).shape == (1, 2, 4, 4)


def test_attention_averages_values_by_weights() -> None:
    q, k = torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3)
    v = torch.tensor([[[[1.0, 2.0, 6.0], [0.0, 3.0, 0.0]]]])
    for backend in ("explicit", "fused"):
        out = attention(q, k, v, backend)  # type: ignore[arg-type]
        torch.testing.assert_close(out, v.mean(-1, keepdim=True).expand(1, 1, 2, 3))
        assert out.is_contiguous()


def test_attention_stands_where_it_is_asked_for() -> None:
    names = [n for n, m in ddpmpp().named_modules() if isinstance(m, UNetBlock) and m.heads]
    assert names == ["enc.4x4_block0", "dec.4x4_in0", "dec.4x4_block1"]
    assert not any(m.heads for m in adm(channels=16).shard_units())
    assert any(m.heads for m in adm().shard_units())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ddpmpp(resolution=7), "resolution: 7 cannot be halved 1 times"),
        (lambda: ddpmpp(channel_mult=()), "channel_mult"),
        (lambda: ddpmpp(attn_resolutions=(5,)), "attn_resolutions: .* no resolution 5.*: 4, 8"),
        (lambda: ddpmpp(channels=3), "channels: a layer of width 3"),
        (lambda: ddpmpp(num_blocks=0), "num_blocks: 0 given"),
        (lambda: ddpmpp(dropout=1.0), "dropout: 1.0 given"),
        (lambda: ddpmpp(label_dropout=-0.1), "label_dropout: -0.1 given"),
        (lambda: ddpmpp(resample_filter=(1, 2, 1)), "resample_filter"),
        (lambda: ddpmpp(out_channels=0), "out_channels: 0 given"),
        (lambda: adm(channels=0), "channels: 0 given"),
        (lambda: adm(dropout=2.0), "dropout: 2.0 given"),
        (lambda: mlp(depth=0), "depth: 0 given"),
        (lambda: GroupNorm(144, 1e-5), "width 144"),
    ],
)
def test_impossible_sizes_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
