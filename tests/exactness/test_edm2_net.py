"""EDM2's network against numbers recorded from the official implementation, and its promises."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from edm2_networks import (
    check_sharded_after_step,
    check_sharded_in_process,
    edm2_denoiser,
    our_name,
    our_weights,
    scrambled,
    small,
)
from fastflow.errors import ConfigError
from fastflow.wrappers import EDMDenoiser
from networks.edm2 import (
    EDM2Block,
    EDM2UNet,
    LogVariance,
    MPConv,
    MPFourier,
    MPPositional,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
    resample,
)
from networks.song_unet import SongUNet
from reference_data import Reference, reference

CASES = ["edm2_net_cond", "edm2_net_uncond"]


def labels(ref: Reference) -> Tensor | None:
    return ref["class_labels"] if "class_labels" in ref else None  # noqa: SIM401, no get()


def inputs(
    net: EDM2UNet, rows: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((rows, *net.sample_shape), generator=generator, dtype=torch.float64)
    c_noise = torch.randn(rows, generator=generator, dtype=torch.float64) / 2
    return x.to(dtype), c_noise.to(dtype)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


# The operations


def test_operations_agree() -> None:
    ref = reference("edm2_ops")
    for suffix, dtype in (("", torch.float32), (".f64", torch.float64)):
        a, b, b_cat, tiny = (ref[k].to(dtype) for k in ("a", "b", "b_cat", "tiny"))
        ref.check(f"normalize{suffix}", normalize(a))
        ref.check(f"normalize_dim1{suffix}", normalize(a, dim=1))
        ref.check(f"normalize_tiny{suffix}", normalize(tiny))
        ref.check(f"mp_silu{suffix}", mp_silu(a))
        for t in (0.5, 0.3):
            ref.check(f"mp_sum_{t}{suffix}", mp_sum(a, b, t))
            ref.check(f"mp_cat_{t}{suffix}", mp_cat(a, b_cat, t))


@pytest.mark.parametrize("direction", ["down", "up"])
@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_agrees(taps: tuple[int, ...], direction: str) -> None:
    ref = reference("edm2_ops")
    name = f"resample_{direction}_{''.join(map(str, taps))}"
    ref.check(name, resample(ref["a"], taps, direction))  # type: ignore[arg-type]


def test_fourier_features_agree() -> None:
    ref = reference("edm2_ops")
    fourier = MPFourier(16)
    fourier.load_state_dict({"freqs": ref["fourier.freqs"], "phases": ref["fourier.phases"]})
    ref.check("fourier", fourier(ref["t"]))
    ref.check("fourier.f64", fourier.double()(ref["t"].double()))


@pytest.mark.parametrize(("name", "kernel"), [("conv3", (3, 3)), ("lin", ())])
def test_convolutions_agree_and_leave_their_weight_alone(
    name: str, kernel: tuple[int, ...]
) -> None:
    ref = reference("edm2_ops")
    weight = ref[f"mpconv.{name}.weight"]
    layer = MPConv(weight.shape[1], weight.shape[0], kernel)
    layer.load_state_dict({"weight": weight})
    x = ref["a"] if kernel else ref["a"][:, :, 0, 0]
    ref.check(f"mpconv.{name}.gain1", layer(x))
    ref.check(f"mpconv.{name}.gain0.37", layer(x, gain=torch.tensor([0.37])))
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=0, atol=0)


# The network


@pytest.mark.parametrize("case", CASES)
def test_outputs_agree(case: str) -> None:
    ref, net = reference(case), edm2_denoiser(case)
    raw: list[Tensor] = []
    net.model.register_forward_hook(lambda module, args, out: raw.append(out))
    keys = sorted(ref.keys("D_"), key=lambda k: k.endswith(".f64"))
    assert len(keys) >= 2
    for key in keys:
        dtype = torch.float64 if key.endswith(".f64") else torch.float32
        net.to(dtype)
        cond = ref["class_labels"].to(dtype) if "label" in key else None
        with torch.no_grad():
            out = net(ref["x"].to(dtype), ref["sigma"].to(dtype), cond=cond)
        assert out.dtype == dtype
        ref.check(key, out)
        raw_key = key.replace("D_", "F_", 1)
        if raw_key in ref:
            ref.check(raw_key, raw[-1])
    ref.check("logvar.f64", net.logvar(ref["sigma"].double())[:, None, None, None])
    ref.check("logvar", net.float().logvar(ref["sigma"])[:, None, None, None])


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_agree(case: str, mode: str) -> None:
    ref, net = reference(case), edm2_denoiser(case)
    if mode == "train":  # the official training forward rewrites the weights first
        net.train().after_step()
    cond = labels(ref)
    out, u = net(ref["x"], ref["sigma"], cond=cond), net.logvar(ref["sigma"])
    loss = (out * ref["loss_probe"]).sum() / out.numel() + 0.1 * u.sum()
    loss.backward()
    ref.check(f"{mode}.loss", loss)
    parameters = dict(net.named_parameters())
    names = ref.keys(f"{mode}.grad.")
    assert len(names) == 4
    for name in names:
        grad = parameters[our_name(name.removeprefix(f"{mode}.grad."))].grad
        assert grad is not None
        ref.check(name, grad.reshape(ref[name].shape))


@pytest.mark.parametrize("case", CASES)
def test_forced_weight_normalisation_agrees(case: str) -> None:
    ref, net = reference(case), edm2_denoiser(case)
    net.train().after_step()
    weights = net.state_dict()
    names = ref.keys("train.after.")
    assert len(names) >= 3
    for name in names:
        ref.check(name, weights[our_name(name.removeprefix("train.after."))])
    norms = ref.values["train.mean_row_norm_after"]
    assert len(norms) > 30
    for name, norm in norms.items():
        rows = weights[our_name(name)].flatten(1).norm(dim=1)
        assert float(rows.mean()) == pytest.approx(norm, rel=1e-5), name
    cond = labels(ref)
    with torch.no_grad():
        ref.check("train.D", net(ref["x"], ref["sigma"], cond=cond))
        ref.check("train.logvar", net.logvar(ref["sigma"])[:, None, None, None])


@pytest.mark.parametrize("case", CASES)
def test_loss_agrees(case: str) -> None:
    """Per pixel w(sigma)/exp(u) (D - x0)^2 + u (arXiv 2312.02696, equation 21)."""
    ref, net = reference(case), edm2_denoiser(case)
    t = torch.exp(-0.4 + 1.0 * ref["edm2loss.rnd_normal"])
    x0 = ref["edm2loss.images"]
    cond = labels(ref)
    sigma_data = net.sigma_data
    with torch.no_grad():
        u = net.logvar(t.flatten())[:, None, None, None]
        error = (net(x0 + t * ref["edm2loss.noise"], t.flatten(), cond=cond) - x0) ** 2
    weight = (t**2 + sigma_data**2) / (t * sigma_data) ** 2
    loss = weight / u.exp() * error + u
    ref.check("edm2loss.per_pixel", loss)
    assert float(loss.mean()) == pytest.approx(ref.values["edm2loss.mean"], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_state_dict_has_the_published_names_in_order(case: str) -> None:
    assert list(edm2_denoiser(case).state_dict()) == list(our_weights(case))


# Weights


def test_initial_weights_are_normalised_and_gains_zero() -> None:
    net = small(cond_dim=3, two_times=True, takes_guidance=True)
    layers = [m for m in net.modules() if isinstance(m, MPConv)]
    assert len(layers) > 10
    for layer in [*layers, LogVariance().linear]:
        fan_in = layer.weight[0].numel()
        norms = layer.weight.detach().flatten(1).norm(dim=1)
        torch.testing.assert_close(
            norms, torch.full_like(norms, math.sqrt(fan_in)), rtol=1e-3, atol=0
        )
    gains = [p for p in net.parameters() if p.ndim == 1]
    assert len(gains) == 3 + len(net.shard_units())
    assert not any(p.any() or p.shape != (1,) for p in gains)


def test_forced_normalisation_repeats_without_effect_and_changes_no_output() -> None:
    net = scrambled(cond_dim=3).train()
    with torch.no_grad():  # so long that the eps of `normalize` is nothing
        for p in net.parameters():
            if p.ndim > 1:
                p.mul_(30)
    x, c = inputs(net)
    before, stored = net(x, c), copy.deepcopy(net.state_dict())
    assert all(torch.equal(value, stored[name]) for name, value in net.state_dict().items())
    net.after_step()
    once = copy.deepcopy(net.state_dict())
    assert relative(net(x, c), before) < 1e-3
    net.after_step()
    for name, value in net.state_dict().items():
        assert torch.allclose(value, once[name], rtol=1e-3, atol=1e-5), name
        changed = not torch.equal(once[name], stored[name])
        assert changed == name.endswith("weight"), name
        if changed:
            norms = value.flatten(1).norm(dim=1) / math.sqrt(value[0].numel())
            torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-3, atol=0)
    assert all(p.requires_grad and p.grad_fn is None for p in net.parameters())


def test_normalisation_of_sharded_weights() -> None:
    check_sharded_after_step(0, 1, dist.HashStore())


@pytest.mark.dist
def test_normalisation_of_weights_sharded_over_two_processes(tmp_path: Path) -> None:
    mp.spawn(check_sharded_in_process, (2, str(tmp_path / "store")), nprocs=2)


# Magnitudes


def test_activations_keep_unit_magnitude_at_the_start() -> None:
    """Zeros beyond the borders and averages of attention take a little away; nothing adds."""
    torch.manual_seed(0)
    net = small(
        resolution=32, in_channels=3, cond_dim=10, channels=64, attn_resolutions=(16,)
    ).eval()
    blocks: dict[str, float] = {}
    ratios: dict[str, float] = {}

    def note(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            magnitude = float(out.square().mean())
            if isinstance(module, EDM2Block):
                blocks[name] = magnitude
            else:
                ratios[name] = magnitude / float(args[0].square().mean())

        return hook

    for name, module in net.named_modules():
        if isinstance(module, EDM2Block | MPConv):
            module.register_forward_hook(note(name, module))
    with torch.no_grad():
        net(*inputs(net, rows=8), torch.eye(10)[:8])
    assert len(blocks) == 10
    assert len(ratios) > 30
    for name, magnitude in blocks.items():
        assert 0.6 < magnitude < 1.2, name
    for name, ratio in ratios.items():
        if name.endswith(("emb_linear", "out_conv")):
            assert ratio == 0.0, name  # their gains
        else:
            assert 0.75 < ratio < 1.25, name


def test_positional_features_are_exactly_of_unit_magnitude() -> None:
    t = torch.linspace(-2, 3, 7, dtype=torch.float64)
    features = MPPositional(10, bandwidth=3.0)(t)
    assert features.shape == (7, 10)
    torch.testing.assert_close(features.square().mean(1), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(features[:, 0], math.sqrt(2) * (3 * t).cos())


def test_bandwidth_scales_the_frequencies() -> None:
    torch.manual_seed(0)
    one = MPFourier(4000)
    torch.manual_seed(0)
    four = MPFourier(4000, bandwidth=4.0)
    torch.testing.assert_close(four.freqs, 4 * one.freqs)
    torch.testing.assert_close(four.phases, one.phases)
    assert float(one.freqs.std()) == pytest.approx(2 * math.pi, rel=0.05)
    assert 0 <= float(one.phases.min()) < 0.01
    assert 2 * math.pi - 0.01 < float(one.phases.max()) < 2 * math.pi
    torch.manual_seed(0)
    narrow = small(bandwidth=0.5).emb_fourier
    torch.manual_seed(0)
    torch.testing.assert_close(2 * narrow.freqs, small().emb_fourier.freqs)
    positional = small(embedding="positional", bandwidth=0.5).emb_fourier
    assert isinstance(positional, MPPositional)
    assert positional.bandwidth == 0.5


# Settings


@pytest.mark.parametrize(
    ("setting", "share", "ignored"),
    [
        ("label_balance", 0.0, "emb_label"),
        ("concat_balance", 1.0, "dec.4x4_in0"),
        ("res_balance", 0.0, "conv_res1"),
        ("attn_balance", 0.0, "attn_proj"),
    ],
)
def test_every_balance_weighs_its_own_sum(setting: str, share: float, ignored: str) -> None:
    def effect(**kwargs: Any) -> bool:
        net = scrambled(cond_dim=3, **kwargs)
        x, c = inputs(net)
        with torch.no_grad():
            before = net(x, c, torch.eye(3))
            for name, p in net.named_parameters():
                if ignored in name:
                    p.copy_(torch.randn_like(p))
            return not torch.equal(net(x, c, torch.eye(3)), before)

    assert effect()
    assert not effect(**{setting: share})


def test_activations_are_clipped() -> None:
    x, emb = 10 * torch.randn(2, 16, 4, 4), torch.randn(2, 5)
    for bound in (None, 256.0, 0.5):
        block = EDM2Block(16, 8, 5, role="decoder", clip_act=bound)
        largest = float(block(x, emb).detach().abs().max())
        assert largest == 0.5 if bound == 0.5 else largest > 1.0


def test_dropout_acts_at_the_chosen_resolutions_only() -> None:
    net = scrambled(dropout=0.4, dropout_resolutions=(4,)).train()
    acting = {
        name: block.dropout for name, block in net.named_modules() if isinstance(block, EDM2Block)
    }
    assert len(acting) == 10
    for name, dropout in acting.items():
        assert dropout == (0.4 if "4x4" in name else 0.0), name
        block = net.get_submodule(name)
        assert isinstance(block, EDM2Block)
        x, emb = torch.randn(1, block.conv_res0.weight.shape[1], 4, 4), torch.randn(1, 32)
        varies = not torch.equal(block._branch(x, emb), block._branch(x, emb))
        assert varies == (dropout > 0), name
    assert all(block.dropout == 0.4 for block in small(dropout=0.4).shard_units())
    assert not any(
        block.dropout for block in small(dropout=0.4, dropout_resolutions=()).shard_units()
    )


def test_label_dropout_zeroes_rows_in_training_only() -> None:
    net = scrambled(cond_dim=5, label_dropout=0.5)
    x, c = inputs(net, rows=16)
    rows = torch.eye(5)[torch.arange(16) % 5]
    with torch.no_grad():
        given, none = net(x, c, rows), net(x, c)
        torch.testing.assert_close(none, net(x, c, torch.zeros(16, 5)), rtol=0, atol=0)
        torch.manual_seed(0)
        mixed = net.train()(x, c, rows)
    kept = [torch.allclose(m, g, atol=1e-5) for m, g in zip(mixed, given, strict=True)]
    dropped = [torch.allclose(m, n, atol=1e-5) for m, n in zip(mixed, none, strict=True)]
    assert all(k != d for k, d in zip(kept, dropped, strict=True))
    assert 0 < sum(kept) < 16


# Second time and guidance


@pytest.mark.parametrize("embedding", ["fourier", "positional"])
def test_second_time_and_guidance_start_without_effect(embedding: str) -> None:
    plain = scrambled(cond_dim=3, embedding=embedding)
    net = small(cond_dim=3, embedding=embedding, two_times=True, takes_guidance=True).eval()
    lacking = net.load_state_dict(plain.state_dict(), strict=False)
    assert lacking.unexpected_keys == []
    assert net.additions() == ("emb_second.", "emb_guidance.")
    assert all(name.startswith(net.additions()) for name in lacking.missing_keys)
    assert plain.additions() == ()
    x, c = inputs(net)
    for second, scale in ((c / 2, None), (-40 * c, torch.tensor([0.0, 3.0, 100.0]))):
        out = net(x, c, torch.eye(3), c_second=second, guidance=scale)
        torch.testing.assert_close(out, plain(x, c, torch.eye(3)), rtol=0, atol=0)
    out.sum().backward()
    for part in (net.emb_second, net.emb_guidance):
        assert part.gain.grad is not None
        assert part.gain.grad.any()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    net.after_step()
    with torch.no_grad():
        base = net(x, c, torch.eye(3), c_second=c / 2)
        for part in (net.emb_second, net.emb_guidance):
            part.gain.fill_(0.5)
        with_both = net(x, c, torch.eye(3), c_second=c / 2)
        assert relative(with_both, base) > 1e-3
        torch.testing.assert_close(
            with_both, net(x, c, torch.eye(3), c_second=c / 2, guidance=torch.ones(3))
        )
        assert relative(net(x, c, torch.eye(3), c_second=c / 3), with_both) > 1e-3
        other = net(x, c, torch.eye(3), c_second=c / 2, guidance=torch.full((3,), 2.0))
        assert relative(other, with_both) > 1e-3


# Promises of raw networks


FULL = {"cond_dim": 3, "two_times": True, "takes_guidance": True}


def call(net: EDM2UNet) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as a function of image and first time; the rest is fixed or follows them."""

    def function(x: Tensor, c: Tensor) -> Tensor:
        out: Tensor = net(x, c, torch.eye(3, dtype=x.dtype), c_second=c / 2, guidance=1 + c**2)
        return out

    return function


@pytest.mark.parametrize("embedding", ["fourier", "positional"])
def test_jvp_equals_float64_finite_differences(embedding: str) -> None:
    net = scrambled(embedding=embedding, bandwidth=0.3, **FULL).double()
    f = call(net)
    (x, c), (dx, dc) = inputs(net, dtype=torch.float64), inputs(net, dtype=torch.float64)
    dx = dx.roll(1, dims=0)
    with torch.no_grad():
        _, tangent = torch.func.jvp(f, (x, c), (dx, dc))
        h = 1e-5
        central = (f(x + h * dx, c + h * dc) - f(x - h * dx, c - h * dc)) / (2 * h)
        assert relative(tangent, central) < 1e-7
        net.float()
        args, tangents = (x.float(), c.float()), (dx.float(), dc.float())
        assert relative(torch.func.jvp(f, args, tangents)[1], central) < 1e-4
        last = torch.channels_last
        args = (args[0].to(memory_format=last), args[1])
        tangents = (tangents[0].to(memory_format=last), tangents[1])
        assert relative(torch.func.jvp(f, args, tangents)[1], central) < 1e-4


def test_jvp_under_bf16_autocast_keeps_one_type() -> None:
    net = scrambled(bandwidth=0.3, **FULL)
    f, seen = call(net), set()
    for name, module in net.named_modules():
        if name.startswith("emb_"):
            module.register_forward_hook(
                lambda m, args, out: seen.update([args[0].dtype, out.dtype])
            )
    x, c = inputs(net)
    with torch.no_grad():
        out, tangent = torch.func.jvp(f, (x, c), (x.roll(1, dims=0), c))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low, low_tangent = torch.func.jvp(f, (x, c), (x.roll(1, dims=0), c))
            u = LogVariance(8)(c)
    assert seen == {torch.float32}
    assert low.dtype == low_tangent.dtype == u.dtype == torch.float32
    assert 0 < relative(low, out) < 0.05
    assert relative(low_tangent, tangent) < 0.1


def test_narrow_images_and_weights_keep_the_embedding_wide() -> None:
    net = scrambled(bandwidth=0.3, **FULL)
    x, c = inputs(net)
    expected = call(net)(x, c)
    layers: list[torch.dtype] = []
    embeddings: list[torch.dtype] = []
    for name, module in net.named_modules():
        if isinstance(module, MPConv) and "conv" in name:
            module.register_forward_hook(lambda m, args, out: layers.append(out.dtype))
        if isinstance(module, EDM2Block):
            module.register_forward_pre_hook(lambda m, args: embeddings.append(args[1].dtype))
    net.bfloat16()
    out = call(net)(x.bfloat16(), c)
    assert out.dtype == torch.bfloat16
    assert set(layers) == {torch.bfloat16}
    assert set(embeddings) == {torch.float32}
    assert relative(out, expected) < 0.1
    torch.testing.assert_close(
        normalize(x.bfloat16()), normalize(x.bfloat16().float()).bfloat16(), rtol=0, atol=0
    )


def test_a_pixel_without_signal_has_finite_derivatives() -> None:
    x = torch.zeros(1, 4, 2, 2, requires_grad=True)
    normalize(x, dim=1).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    zero = torch.zeros(1, 4, 2, 2)
    _, tangent = torch.func.jvp(lambda x: normalize(x, dim=1), (zero,), (torch.ones_like(zero),))
    assert tangent.isfinite().all()


@pytest.mark.parametrize(("role", "direction"), [("encoder", "down"), ("decoder", "up")])
def test_blocks_and_their_jvp_compile_as_one_graph(role: Any, direction: Any) -> None:
    torch.manual_seed(0)
    block = EDM2Block(4, 8, 5, role=role, direction=direction, heads=2)
    torch.nn.init.ones_(block.emb_gain)
    primals = torch.randn(2, 4, 8, 8), torch.randn(2, 5)
    tangents = torch.randn(2, 4, 8, 8), torch.randn(2, 5)

    def both(primals: tuple[Tensor, Tensor], tangents: tuple[Tensor, Tensor]) -> Any:
        return torch.func.jvp(block, primals, tangents)

    with torch.no_grad():
        compiled = torch.compile(both, backend="eager", fullgraph=True)(primals, tangents)
        torch.testing.assert_close(compiled, both(primals, tangents))
    torch.testing.assert_close(
        torch.compile(block, backend="eager", fullgraph=True)(*primals), block(*primals)
    )


def test_rows_do_not_depend_on_the_batch_and_copies_agree() -> None:
    net = scrambled(cond_dim=3).double()
    x, c = inputs(net, rows=4, dtype=torch.float64)
    out = net(x, c)
    torch.testing.assert_close(out[2:3], net(x[2:3], c[2:3]), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(copy.deepcopy(net)(x, c), out, rtol=0, atol=0)
    torch.testing.assert_close(net.float()(x.float(), c), net(x.float(), c.float()))


# The log-variance


def test_log_variance_serves_other_networks() -> None:
    head = LogVariance(channels=20, bandwidth=2.0)
    assert [*head.state_dict()] == ["fourier.freqs", "fourier.phases", "linear.weight"]
    net = EDMDenoiser(
        SongUNet(resolution=8, channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=()),
        logvar_head=head,
    )
    u = net.logvar(torch.tensor([0.1, 1.0, 50.0]))
    assert u.shape == (3,)
    assert len(set(u.tolist())) == 3
    u.sum().backward()
    assert head.linear.weight.grad is not None
    with torch.no_grad():
        head.linear.weight.mul_(5)
        net.after_step()
    assert float(head.linear.weight.detach().norm()) == pytest.approx(math.sqrt(20), rel=1e-3)
    with pytest.raises(ConfigError, match="c_noise: torch.bfloat16 given"):
        head(torch.zeros(2, dtype=torch.bfloat16))


# Sizes


@pytest.mark.parametrize(
    ("channels", "in_channels", "millions"),
    [
        (128, 4, 124.7),
        (192, 3, 280.2),
        (192, 4, 280.2),
        (256, 4, 497.8),
        (320, 4, 777.5),
        (384, 3, 1119.3),
        (384, 4, 1119.3),
        (448, 4, 1523.2),
    ],
)
def test_published_sizes_on_the_meta_device(
    channels: int, in_channels: int, millions: float
) -> None:
    """XS to XXL for 64x64 pixels or latents, with the log-variance head as published."""
    with torch.device("meta"):
        net = EDM2UNet(resolution=64, in_channels=in_channels, cond_dim=1000, channels=channels)
        parts = nn.ModuleList([net, LogVariance()])
    count = sum(p.numel() for p in parts.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_it_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        net = EDMDenoiser(small(**FULL), logvar_head=LogVariance())
        x, t = torch.empty(2, 2, 8, 8), torch.empty(2)
        assert net(x, t, t, torch.empty(2, 3), guidance=t).shape == x.shape
        assert net.logvar(t).shape == t.shape


def test_shard_units_are_the_blocks() -> None:
    net = small()
    units = net.shard_units()
    held = [p for unit in units for p in unit.parameters()]
    assert len(units) == 10
    assert len({id(p) for p in held}) == len(held)
    assert sum(p.numel() for p in held) > 0.5 * sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"resolution": 7}, "resolution: 7 cannot be halved 1 times"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"attn_resolutions": (5,)}, "attn_resolutions: .* no resolution 5.*: 4, 8"),
        ({"dropout_resolutions": (16,)}, "dropout_resolutions: .* no resolution 16"),
        ({"channels_per_head": 5}, "channels_per_head: 5 given, a divisor of 32"),
        ({"num_blocks": 0}, "num_blocks: 0 given"),
        ({"channel_mult_noise": 0}, "channel_mult_noise: 0 given"),
        ({"channel_mult_emb": -1}, "channel_mult_emb: -1 given"),
        ({"dropout": 1.0}, "dropout: 1.0 given"),
        ({"label_dropout": -0.1}, "label_dropout: -0.1 given"),
        ({"res_balance": 1.5}, "res_balance: 1.5 given"),
        ({"clip_act": 0.0}, "clip_act: 0.0 given"),
        ({"bandwidth": 0.0}, "bandwidth: 0.0 given"),
        ({"resample_filter": (1, 2, 1)}, "resample_filter"),
        ({"channels": 15, "channels_per_head": 15, "embedding": "positional"}, "channels: 15"),
    ],
)
def test_impossible_settings_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**kwargs)
