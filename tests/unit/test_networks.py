"""What every raw network promises: forward-mode AD, precision, labels, times, guidance, sizes.

A network joins the promises by a function that makes a small one, put into the lists below.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from fastflow.errors import ConfigError
from networks.adm_unet import DhariwalUNet
from networks.attention import Backend
from networks.dit import DiT
from networks.edm2 import EDM2UNet
from networks.layers import ConvDownsample, FourierEmbedding, GroupNorm, Resample
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
EDM2 = {
    "resolution": 8,
    "in_channels": 2,
    "channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "channels_per_head": 8,
}
DIT = {
    "resolution": 8,
    "patch_size": 2,
    "in_channels": 2,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
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


def edm2(**kwargs: Any) -> EDM2UNet:
    return EDM2UNet(**{**EDM2, **kwargs})


def dit(**kwargs: Any) -> DiT:
    return DiT(**{**DIT, **kwargs})


def mlp(**kwargs: Any) -> ToyMLP:
    return ToyMLP(**{"width": 16, "depth": 2, **kwargs})


UNETS = [ddpmpp, ncsnpp, skip, adm]  # these take augmentation labels
DROPPING = [*UNETS, edm2]  # have dropout
IMAGES = [*DROPPING, dit]  # have attention and label dropout
NETS = [*IMAGES, mlp]
Maker = Callable[..., Any]

# Prefixes of the modules that read times, guidance and labels.
EMBEDDINGS = ("map_", "emb_", "t_embedder", "s_embedder", "w_embedder", "y_embedder")

ALL = {"cond_dim": 5, "two_times": True, "takes_guidance": True}


def full(make: Maker, **kwargs: Any) -> Any:
    """The network with all conditions that every network has."""
    return make(**ALL, **kwargs)


def scramble(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a size that matters, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            fan = max(p[0].numel(), 1) if p.ndim > 1 else 4
            noise = torch.randn(p.shape, generator=generator) / math.sqrt(fan)
            size = 0.3 if ".qkv." in name else 1.0  # saturated attention magnifies rounding
            p.copy_(size * (noise + (1.0 if p.ndim == 1 else 0.0)))
        for name, buffer in net.named_buffers():
            if name.endswith(("freqs", "phases")):  # small: finite differences resolve them
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return net.eval()


def inputs(net: Any, rows: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((rows, *net.sample_shape), generator=generator, dtype=torch.float64)
    c_noise = torch.randn(rows, generator=generator, dtype=torch.float64) / 2
    return x.to(dtype), c_noise.to(dtype)


def conditions(rows: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Class rows, second times and guidance scales for a `full` network."""
    generator = torch.Generator().manual_seed(3)
    second = torch.rand(rows, generator=generator, dtype=torch.float64)
    guidance = 1 + 4 * torch.rand(rows, generator=generator, dtype=torch.float64)
    return torch.eye(5, dtype=dtype)[torch.arange(rows) % 5], second.to(dtype), guidance.to(dtype)


def all_inputs(
    net: Any, rows: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A `full` network as a function of x, both times and guidance, and values for these."""
    x, c = inputs(net, rows, dtype)
    cond, second, guidance = conditions(rows, dtype)

    def call(x: Tensor, c: Tensor, second: Tensor, guidance: Tensor) -> Tensor:
        out: Tensor = net(x, c, cond, c_second=second, guidance=guidance)
        return out

    return call, (x, c, second, guidance)


def directions(*given: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return tuple(
        torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part.dtype)
        for part in given
    )


def moved(given: tuple[Tensor, ...], along: tuple[Tensor, ...], h: float) -> tuple[Tensor, ...]:
    return tuple(part + h * step for part, step in zip(given, along, strict=True))


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


# Forward-mode differentiation


@pytest.mark.parametrize("make", NETS)
def test_jvp_equals_float64_finite_differences(make: Maker) -> None:
    net, given = all_inputs(scramble(full(make)).double(), dtype=torch.float64)
    along = directions(*given)
    h = 1e-5
    with torch.no_grad():
        _, tangent = torch.func.jvp(net, given, along)
        central = (net(*moved(given, along, h)) - net(*moved(given, along, -h))) / (2 * h)
        assert relative(tangent, central) < 1e-7
        for i in (2, 3):  # the second time and guidance by themselves
            alone = tuple(d if j == i else torch.zeros_like(d) for j, d in enumerate(along))
            _, tangent = torch.func.jvp(net, given, alone)
            part = (net(*moved(given, alone, h)) - net(*moved(given, alone, -h))) / (2 * h)
            assert relative(tangent, part) < 1e-6
        single, given = all_inputs(scramble(full(make)))
        tangent = torch.func.jvp(single, given, directions(*given))[1]
        assert relative(tangent, central) < 1e-4


@pytest.mark.parametrize("make", NETS)
def test_jvp_under_bf16_autocast_keeps_one_type(make: Maker) -> None:
    net, given = all_inputs(scramble(full(make)))
    along = directions(*given)
    with torch.no_grad():
        out, tangent = torch.func.jvp(net, given, along)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low, low_tangent = torch.func.jvp(net, given, along)
    assert low.dtype == low_tangent.dtype == torch.float32
    assert 0 < relative(low, out) < 0.05
    assert relative(low_tangent, tangent) < 0.06


@pytest.mark.parametrize("make", IMAGES)
def test_jvp_takes_channels_last_images(make: Maker) -> None:
    net, given = all_inputs(scramble(full(make)))
    along = directions(*given)
    last = torch.channels_last
    _, plain = torch.func.jvp(net, given, along)
    images, steps = given[0].to(memory_format=last), along[0].to(memory_format=last)
    _, other = torch.func.jvp(net, (images, *given[1:]), (steps, *along[1:]))
    assert relative(other, plain) < 1e-5


@pytest.mark.parametrize("make", IMAGES)
def test_attention_backends_agree(make: Maker) -> None:
    net = scramble(make(attention="explicit"))
    given = inputs(net)
    along = directions(*given)
    backends: tuple[Backend, ...] = get_args(Backend)
    with torch.no_grad():
        out, tangent = torch.func.jvp(net, given, along)
        for backend in backends:
            other = scramble(make(attention=backend))
            assert relative(other(*given), out) < 1e-5
            if backend == "fused":
                with pytest.raises(ConfigError, match="attention: 'fused'"):
                    torch.func.jvp(other, given, along)
            else:
                assert relative(torch.func.jvp(other, given, along)[1], tangent) < 1e-5


@pytest.mark.parametrize("make", IMAGES)
def test_attention_has_the_layout_that_fused_kernels_take(make: Maker) -> None:
    net = scramble(make())
    with torch.no_grad(), torch.profiler.profile() as profile:
        net(*inputs(net))
    names = " ".join(event.key for event in profile.key_averages())
    assert "_flash_attention" in names
    assert "_attention_math" not in names


@pytest.mark.parametrize(
    ("make", "size"),  # as small as has every layer: tracing takes seconds
    [
        (ddpmpp, {}),
        (adm, {"channel_mult": (2,), "attn_resolutions": ()}),
        (edm2, {"channel_mult": (1,), "attn_resolutions": ()}),
        (dit, {"depth": 1}),
    ],
    ids=["ddpmpp", "adm", "edm2", "dit"],
)
def test_compiled_jvp_agrees(make: Maker, size: dict[str, Any]) -> None:
    net, given = all_inputs(scramble(full(make, **size)))
    along = directions(*given)

    def tangent(given: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Tensor:
        return torch.func.jvp(net, given, along)[1]

    with torch.no_grad():
        compiled = torch.compile(tangent, backend="eager", fullgraph=True)(given, along)
        assert relative(compiled, tangent(given, along)) < 1e-5


# Precision


@pytest.mark.parametrize("make", NETS)
def test_times_guidance_and_their_embeddings_are_never_narrowed(make: Maker) -> None:
    net = scramble(full(make))
    call, given = all_inputs(net)
    seen: dict[str, set[torch.dtype]] = {}
    for name, module in net.named_modules():
        if name.startswith(EMBEDDINGS):

            def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor, at: str) -> None:
                seen.setdefault(at, set()).update([args[0].dtype, out.dtype])

            module.register_forward_hook(functools.partial(note, at=name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(*given)
    assert len(seen) >= 3
    assert all(kinds == {torch.float32} for kinds in seen.values()), seen
    assert out.dtype == torch.float32
    wide = [part.double() for part in given[1:]]
    torch.testing.assert_close(call(given[0], *wide), call(*given))


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("place", [1, 2, 3])
def test_narrow_times_and_guidance_are_refused(make: Maker, place: int) -> None:
    call, given = all_inputs(full(make))
    name = ("x", "c_noise", "c_second", "guidance")[place]
    narrow = [part.bfloat16() if at == place else part for at, part in enumerate(given)]
    with pytest.raises(ConfigError, match=rf"{name}: torch.bfloat16 given.*float32"):
        call(*narrow)


@pytest.mark.parametrize("make", NETS)
def test_rows_do_not_depend_on_the_batch(make: Maker) -> None:
    net = scramble(full(make)).double()
    x, c = inputs(net, rows=4, dtype=torch.float64)
    cond, second, guidance = conditions(rows=4, dtype=torch.float64)
    whole = net(x, c, cond, c_second=second, guidance=guidance)
    at = slice(2, 3)
    alone = net(x[at], c[at], cond[at], c_second=second[at], guidance=guidance[at])
    torch.testing.assert_close(whole[at], alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("make", NETS)
def test_inputs_are_left_alone_and_the_network_can_be_copied(make: Maker) -> None:
    net = scramble(full(make))
    call, given = all_inputs(net)
    before = [part.clone() for part in given]
    out = all_inputs(copy.deepcopy(net))[0](*given)
    torch.testing.assert_close(list(given), before, rtol=0, atol=0)
    torch.testing.assert_close(out, call(*given), rtol=0, atol=0)
    assert all(p.ndim > 0 for p in net.parameters())
    assert set(net.state_dict()) == {name for name, _ in named_tensors(net)}


# Second time and guidance


def named_tensors(net: nn.Module) -> list[tuple[str, Tensor]]:
    return [*net.named_parameters(), *net.named_buffers()]


def extended(net: nn.Module, make: Maker, **kwargs: Any) -> Any:
    """The network that `kwargs` ask for with the weights of `net`, its additions as initialised."""
    other = make(**kwargs).eval()
    missing, unexpected = other.load_state_dict(net.state_dict(), strict=False)
    assert unexpected == []
    for prefix in other.additions():
        assert any(name.startswith(prefix) for name in missing)
    assert [name for name in missing if not name.startswith(other.additions())] == []
    return other


@pytest.mark.parametrize("make", NETS)
def test_second_time_and_guidance_do_nothing_at_first(make: Maker) -> None:
    net = scramble(make(cond_dim=5))
    x, c = inputs(net)
    cond, second, guidance = conditions()
    zero, far = torch.zeros_like(c), torch.full_like(c, 900.0)
    assert net.additions() == ()
    with torch.no_grad():
        out = net(x, c, cond)
        both = extended(net, make, **ALL)
        assert len(both.additions()) == 2
        for s in (c, zero, far, second):
            for w in (None, zero, guidance):
                same = both(x, c, cond, c_second=s, guidance=w)
                torch.testing.assert_close(same, out, rtol=0, atol=0)
        times = extended(net, make, cond_dim=5, two_times=True)
        torch.testing.assert_close(times(x, c, cond, c_second=second), out, rtol=0, atol=0)
        guided = extended(net, make, cond_dim=5, takes_guidance=True)
        torch.testing.assert_close(guided(x, c, cond, guidance=guidance), out, rtol=0, atol=0)
        torch.testing.assert_close(guided(x, c, cond), out, rtol=0, atol=0)
    assert (*times.additions(), *guided.additions()) == both.additions()


@pytest.mark.parametrize("make", UNETS)
def test_additions_of_unets_are_named_as_promised(make: Maker) -> None:
    names = set(make(cond_dim=5, augment_dim=4).state_dict())
    more = set(full(make, augment_dim=4).state_dict()) - names
    assert all(name.startswith(("map_second.", "map_guidance.")) for name in more)
    assert {"map_second.layer.weight", "map_guidance.weight"} <= more


@pytest.mark.parametrize("make", NETS)
def test_second_time_and_guidance_can_be_learnt_from_the_first_step(make: Maker) -> None:
    net = extended(scramble(make(cond_dim=5)), make, **ALL)
    call, given = all_inputs(net)
    out = call(*given)
    (out * torch.randn_like(out)).mean().backward()
    for prefix in net.additions():
        grads = [p.grad for name, p in net.named_parameters() if name.startswith(prefix)]
        assert all(grad is not None for grad in grads)
        assert any(float(grad.norm()) > 1e-6 for grad in grads), prefix


@pytest.mark.parametrize("make", NETS)
def test_second_time_and_guidance_count_once_learnt(make: Maker) -> None:
    net = scramble(full(make))
    call, (x, c, second, guidance) = all_inputs(net)
    with torch.no_grad():
        out = call(x, c, second, guidance)
        for other in (call(x, c, second + 0.5, guidance), call(x, c, second, guidance + 2)):
            assert relative(other, out) > 1e-3
        cond = conditions()[0]
        one = call(x, c, second, torch.ones_like(c))
        torch.testing.assert_close(net(x, c, cond, c_second=second), one, rtol=0, atol=0)


@pytest.mark.parametrize("make", NETS)
def test_wrong_use_of_second_time_and_guidance_is_refused(make: Maker) -> None:
    plain, times = make(), make(two_times=True)
    x, c = inputs(plain)
    kind = type(plain).__name__
    with pytest.raises(ConfigError, match=f"c_second: given to {kind} with two_times=False"):
        plain(x, c, c_second=c)
    with pytest.raises(ConfigError, match=f"c_second: not given to {kind} with two_times=True"):
        times(x, c)
    with pytest.raises(ConfigError, match=f"guidance: given to {kind} with takes_guidance=False"):
        times(x, c, c_second=c, guidance=c)


@pytest.mark.parametrize("make", [ddpmpp, ncsnpp, skip])
def test_reset_parameters_keeps_the_additions_without_effect(make: Maker) -> None:
    net = scramble(full(make, augment_dim=4))
    net.reset_parameters()
    call, (x, c, second, guidance) = all_inputs(net)
    out = call(x, c, second, guidance)
    assert out.detach().any()
    torch.testing.assert_close(call(x, c, second + 1, guidance * 2), out, rtol=0, atol=0)
    assert net.map_second.augment.weight.detach().any()


@pytest.mark.parametrize("make", UNETS)
def test_the_second_time_reads_labels_too(make: Maker) -> None:
    net = scramble(full(make, augment_dim=4))
    x, c = inputs(net)
    cond, second, guidance = conditions()

    def call() -> Tensor:
        out: Tensor = net(x, c, cond, torch.ones(3, 4), second, guidance)
        return out

    with torch.no_grad():
        out = call()
        for name, p in net.map_second.named_parameters():
            before = p.clone()
            p.zero_()
            assert relative(call(), out) > 1e-4, name
            p.copy_(before)


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


@pytest.mark.parametrize("make", NETS)
def test_every_parameter_gets_a_gradient_without_labels(make: Maker) -> None:
    net = full(make, **({"augment_dim": 4} if make in UNETS else {}))
    x, c = inputs(net)
    net(x, c, c_second=c).sum().backward()
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


@pytest.mark.parametrize("make", [ddpmpp, adm, edm2, dit])
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


@pytest.mark.parametrize("make", DROPPING)
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


def test_fourier_frequencies_have_the_scale_that_is_asked_for() -> None:
    torch.manual_seed(0)
    wide, slow = ncsnpp(channels=128), ncsnpp(channels=128, fourier_scale=0.02)
    assert isinstance(slow.map_noise, FourierEmbedding)
    assert float(wide.map_noise.freqs.std()) == pytest.approx(16.0, rel=0.15)
    assert float(slow.map_noise.freqs.std()) == pytest.approx(0.02, rel=0.15)


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
        (lambda: ncsnpp(fourier_scale=0.0), "fourier_scale: 0.0 given, a finite number above 0"),
        (lambda: ncsnpp(fourier_scale=math.nan), "fourier_scale: nan given"),
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
