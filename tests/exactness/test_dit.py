"""DiT against numbers recorded from the official implementation; its initial values and sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastflow.errors import ConfigError
from fastflow.wrappers import NoiseDenoiser, VelocityNetwork
from networks.dit import DiT, DiTBlock, grid_positions
from reference_data import Reference, reference

CASES = ["dit_ls0", "dit_ls1"]
SMALL: dict[str, Any] = {
    "resolution": 8,
    "in_channels": 2,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
}
RENAMED = {"input_size": "resolution", "num_classes": "cond_dim"}
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def official(case: str, **kwargs: Any) -> DiT:
    """The network of a stored case with its weights, in evaluation mode."""
    ref = reference(case)
    config = {RENAMED.get(k, k): v for k, v in ref.config.items() if k != "class_dropout_prob"}
    net = DiT(**{**config, **kwargs})
    net.load_state_dict(ref.weights("net."), strict=True)
    return net.eval()


def class_rows(classes: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """One-hot rows; class `width`, that of the null class, is the zero row."""
    rows = torch.cat([torch.eye(width, dtype=dtype), torch.zeros(1, width, dtype=dtype)])
    return rows[classes]


def run(net: DiT, ref: Reference, dtype: torch.dtype = torch.float32) -> Tensor:
    out: Tensor = net(
        ref["x"].to(dtype), ref["t"].to(dtype), class_rows(ref["y"], net.cond_dim, dtype)
    )
    return out


def small(**kwargs: Any) -> DiT:
    return DiT(**{**SMALL, **kwargs})


def scrambled(net: nn.Module) -> Any:
    """The network with random parameters of a size that matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p[0].numel() + 3))
    return net


# Recorded numbers


@pytest.mark.parametrize("case", CASES)
def test_outputs_agree(case: str) -> None:
    ref, net = reference(case), official(case)
    assert {0, 1} <= set((ref["y"] == net.cond_dim).int().tolist())  # with and without a class
    with torch.no_grad():
        ref.check("out", run(net, ref))
        ref.check("out.f64", run(net.double(), ref, torch.float64))


@pytest.mark.parametrize("case", CASES)
def test_state_dict_has_the_published_names_in_order(case: str) -> None:
    ref, net = reference(case), official(case)
    named = {f"net.{name}": list(value.shape) for name, value in net.state_dict().items()}
    stored = {name: shape for name, (_, *shape) in ref.info["weights"]["names"].items()}
    assert list(named.items()) == list(stored.items())


@pytest.mark.parametrize("case", CASES)
def test_positions_agree(case: str) -> None:
    ref = reference(case)
    width = ref.config["hidden_size"]
    side = ref.config["input_size"] // ref.config["patch_size"]
    ref.check("pos_embed.f64", grid_positions(side, width)[None])
    fresh = DiT(resolution=2 * side, hidden_size=width, num_heads=1, depth=1)
    ref.check("pos_embed", fresh.pos_embed)
    assert fresh.pos_embed.dtype == torch.float32
    assert "pos_embed" in dict(fresh.named_buffers())


@pytest.mark.parametrize("case", CASES)
def test_embeddings_of_time_and_class_agree(case: str) -> None:
    ref, net = reference(case), official(case)
    ref.check("t_freq", net.t_embedder.features(ref["t"]))
    ref.check("t_emb", net.t_embedder(ref["t"]))
    dropped = torch.where(ref["force_drop_ids"] == 1, net.cond_dim, ref["y"])
    assert not torch.equal(dropped, ref["y"])
    ref.check("y_drop", net.y_embedder(class_rows(dropped, net.cond_dim)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_guided_outputs_agree(case: str, scale: float) -> None:
    """The official form: one half twice, and guidance of its first three channels only."""
    ref, net = reference(case), official(case)
    half = ref["cfg.x"].chunk(2)[0]
    with torch.no_grad():
        out = net(torch.cat([half, half]), ref["cfg.t"], class_rows(ref["cfg.y"], net.cond_dim))
    cond, none = out[:, :3].chunk(2)
    guided = none + scale * (cond - none)
    ref.check(f"cfg.out_scale{scale}", torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1))


@pytest.mark.parametrize("case", CASES)
def test_gradients_agree(case: str) -> None:
    ref, net = reference(case), official(case)
    out = run(net, ref)
    loss = (out * ref["loss_probe"]).sum() / out.numel()
    loss.backward()
    ref.check("loss", loss)
    parameters = dict(net.named_parameters())
    keys = ref.keys("grad.")
    assert len(keys) == 4
    for key in keys:
        grad = parameters[key.removeprefix("grad.")].grad
        assert grad is not None
        ref.check(key, grad)


def test_published_weights_stay_exact_with_a_second_time_and_guidance() -> None:
    ref, plain = reference("dit_ls1"), official("dit_ls1")
    config = {RENAMED.get(k, k): v for k, v in ref.config.items() if k != "class_dropout_prob"}
    net = DiT(**config, two_times=True, takes_guidance=True)
    missing, unexpected = net.load_state_dict(ref.weights("net."), strict=False)
    assert unexpected == []
    assert net.additions() == ("s_embedder.", "w_embedder.")
    assert all(name.startswith(net.additions()) for name in missing)
    assert len(missing) == 8
    rows = class_rows(ref["y"], net.cond_dim)
    with torch.no_grad():
        expected = plain(ref["x"], ref["t"], rows)
        for second, guidance in ((0.0, None), (1.0, 7.5), (999.0, 0.0)):
            s = torch.full_like(ref["t"], second)
            w = None if guidance is None else torch.full_like(s, guidance)
            out = net(ref["x"], ref["t"], rows, c_second=s, guidance=w)
            assert torch.equal(out, expected)


# Class rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_class_rows_are_rows_of_the_table_to_the_bit(dtype: torch.dtype) -> None:
    embedder = scrambled(small(cond_dim=1000).y_embedder).to(dtype)
    table = embedder.embedding_table.weight
    assert table.shape == (1001, 16)
    order = torch.randperm(1001)
    with torch.no_grad():
        assert torch.equal(embedder(class_rows(order, 1000, dtype)), table[order])
        mixed = torch.zeros(1, 1000, dtype=dtype)
        mixed[0, 3], mixed[0, 8] = 0.25, 0.5
        between = 0.25 * table[3] + 0.5 * table[8] + 0.25 * table[-1]
        torch.testing.assert_close(embedder(mixed)[0], between)


def test_without_a_null_class_the_zero_row_adds_nothing() -> None:
    net = scrambled(small(cond_dim=6, null_class=False))
    table = net.y_embedder.embedding_table.weight
    assert table.shape == (6, 16)
    order = torch.randperm(6)
    assert torch.equal(net.y_embedder(class_rows(order, 6)), table[order])
    x, c = torch.randn(3, *net.sample_shape), torch.rand(3)
    unconditional = scrambled(small())
    assert not hasattr(unconditional, "y_embedder")
    weights = {k: v for k, v in net.state_dict().items() if not k.startswith("y_embedder.")}
    unconditional.load_state_dict(weights, strict=True)
    assert torch.equal(net(x, c), unconditional(x, c))
    assert not torch.allclose(net(x, c, class_rows(order[:3], 6)), net(x, c))


def test_dropped_labels_become_the_null_class() -> None:
    net = scrambled(small(cond_dim=5, label_dropout=0.5))
    x, c = torch.randn(32, *net.sample_shape), torch.rand(32)
    rows = class_rows(torch.arange(32) % 5, 5)
    torch.manual_seed(0)
    seen: list[Tensor] = []
    net.y_embedder.register_forward_hook(lambda module, args, out: seen.append(out))
    net.train()(x, c, rows)
    net.eval()(x, c, rows)
    trained, evaluated = seen
    table = net.y_embedder.embedding_table.weight
    assert torch.equal(evaluated, rows @ table[:5])
    null = (trained == table[-1]).all(dim=1)
    assert 0 < int(null.sum()) < 32
    assert torch.equal(trained[~null], evaluated[~null])


# Initial values


def test_initial_values() -> None:
    torch.manual_seed(0)
    net = DiT(
        resolution=16,
        hidden_size=128,
        depth=2,
        num_heads=2,
        cond_dim=100,
        two_times=True,
        takes_guidance=True,
    )
    x, c = torch.randn(3, 4, 16, 16), torch.rand(3)
    assert not net(x, c, c_second=c).detach().any()
    tokens = torch.randn(3, 64, 128)
    assert torch.equal(net.blocks[0](tokens, torch.randn(3, 128)), tokens)
    zero = ("adaLN_modulation", "final_layer", "s_embedder.mlp.2", "w_embedder.mlp.2")
    normal = ("embedder.mlp.0", "embedder.mlp.2", "embedding_table")
    for name, p in net.state_dict().items():
        if name == "pos_embed":
            continue
        if name.endswith("bias") or any(part in name for part in zero):
            assert not p.any(), name
        elif any(part in name for part in normal):
            assert float(p.std()) == pytest.approx(0.02, rel=0.05), name
            assert abs(float(p.mean())) < 1e-3
            assert float(p.abs().max()) > 3 * 0.02  # not uniform
        else:
            bound = math.sqrt(6 / (p[0].numel() + len(p)))  # patches are the inputs of a layer
            assert 0.95 * bound < float(p.abs().max()) <= bound, name
            assert float(p.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05), name


# Precision and forward mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_keep_primal_and_tangent_in_one_type(dtype: torch.dtype) -> None:
    block = scrambled(DiTBlock(16, 2, 32, "auto"))
    given = (torch.randn(3, 9, 16).to(dtype), torch.randn(3, 16).to(dtype))
    along = (torch.randn(3, 9, 16).to(dtype), torch.randn(3, 16).to(dtype))
    exact = torch.func.jvp(block, tuple(p.float() for p in given), tuple(p.float() for p in along))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, tangent = torch.func.jvp(block, given, along)
    assert out.dtype == tangent.dtype == dtype
    for low, high in zip((out, tangent), exact, strict=True):
        assert float(((low.float() - high).norm() / high.norm()).detach()) < 0.03


def test_blocks_compile_whole_and_in_forward_mode() -> None:
    block = scrambled(DiTBlock(16, 2, 32, "auto"))
    given = (torch.randn(3, 9, 16), torch.randn(3, 16))
    along = (torch.randn(3, 9, 16), torch.randn(3, 16))

    def tangent(given: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(block, given, along)

    whole: dict[str, Any] = {"backend": "eager", "fullgraph": True}
    torch.testing.assert_close(torch.compile(block, **whole)(*given), block(*given))
    torch.testing.assert_close(torch.compile(tangent, **whole)(given, along), tangent(given, along))


def test_tokens_keep_full_precision_under_autocast() -> None:
    """Only the branches are narrow: the sum over the blocks is not."""
    net = scrambled(small(depth=3))
    kinds: list[torch.dtype] = []
    for block in net.blocks:
        block.register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
        block.attn.register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(torch.randn(2, 2, 8, 8), torch.rand(2))
    assert kinds == [torch.bfloat16, torch.float32] * 3


# Sizes


def on_meta(**kwargs: Any) -> DiT:
    with torch.device("meta"):
        return DiT(cond_dim=1000, **kwargs)


def counted(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_published_sizes(size: str, millions: int) -> None:
    """arXiv 2212.09748 and 2401.08740, with patches of 2; files hold fixed positions as well."""
    width, depth, heads = SIZES[size]
    kwargs: dict[str, Any] = {"hidden_size": width, "depth": depth, "num_heads": heads}
    net = on_meta(**kwargs, learn_sigma=True)
    assert round(counted(net) / 1e6) == millions
    block = (3 + 1 + 4 + 4 + 6) * width**2 + (3 + 1 + 4 + 1 + 6) * width
    time = (256 + 1) * width + (width + 1) * width
    for patch in (2, 4, 8):
        net = on_meta(**kwargs, patch_size=patch, two_times=True)
        values = 4 * patch**2
        outer = (values + 1) * width + 1001 * width + (width + 1) * (values + 2 * width)
        assert counted(net) == depth * block + 2 * time + outer
        assert net.pos_embed.shape == (1, (32 // patch) ** 2, width)


def test_the_size_of_meanflow() -> None:
    """DiT-B/2 of arXiv 2505.13447 has 131.1 M parameters with the embedding of the second time."""
    assert counted(on_meta(two_times=True)) / 1e6 == pytest.approx(131.1, abs=0.05)


def test_the_meta_device_needs_only_a_state_dict() -> None:
    source = scrambled(small(cond_dim=3, two_times=True))
    with torch.device("meta"):
        net = small(cond_dim=3, two_times=True)
        shape = net(torch.empty(2, 2, 8, 8), torch.empty(2), c_second=torch.empty(2)).shape
    assert shape == (2, 2, 8, 8)
    net.to_empty(device="cpu").load_state_dict(source.state_dict())
    x, c = torch.randn(2, 2, 8, 8), torch.rand(2)
    assert torch.equal(net(x, c, c_second=c), source(x, c, c_second=c))


def test_any_width_of_the_feed_forward_layers() -> None:
    """Ratios come from files as quotients, which need not give back whole numbers."""
    width, inner = 44, 15
    assert int(width * (inner / width)) != inner
    with torch.device("meta"):
        net = small(hidden_size=width, depth=1, mlp_ratio=inner / width)
    assert net.blocks[0].mlp.fc1.out_features == inner


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: small(resolution=9), "patch_size: 2 given, a divisor of the resolution 9"),
        (lambda: small(num_heads=3), "hidden_size: 16 given, a multiple of 4 and of num_heads=3"),
        (lambda: small(hidden_size=6), "hidden_size: 6 given, a multiple of 4"),
        (lambda: small(depth=0), "depth: 0 given"),
        (lambda: small(patch_size=0), "patch_size: 0 given"),
        (lambda: small(mlp_ratio=0.0), "mlp_ratio: 0.0 given"),
        (lambda: small(cond_dim=-1), "cond_dim: -1 given"),
        (lambda: small(label_dropout=1.0), "label_dropout: 1.0 given"),
    ],
)
def test_impossible_sizes_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


# In the wrappers of the papers


def test_learned_variances_are_no_part_of_the_prediction() -> None:
    ref, net = reference("dit_ls1"), official("dit_ls1").double()
    x, rows = ref["x"].double(), class_rows(ref["y"], net.cond_dim, torch.float64)
    denoiser = NoiseDenoiser(net)
    step = ref["t"].double().floor()
    sigma = denoiser.path.nsr(step)
    wide = sigma[:, None, None, None]
    with torch.no_grad():
        denoised = denoiser(x * (1 + wide**2).sqrt(), sigma, cond=rows)
        expected = x * (1 + wide**2).sqrt() - wide * net(x, step, rows)[:, :4]
    torch.testing.assert_close(denoised, expected, rtol=1e-8, atol=1e-8)
    velocity = VelocityNetwork(net, data_at=1)
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(velocity(x, t, cond=rows), -net(x, 1 - t, rows)[:, :4])
