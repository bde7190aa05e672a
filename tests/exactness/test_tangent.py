"""Tangent engines: every rule against torch's own forward mode, and every guard firing."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from fastflow import distributed
from fastflow.errors import ConfigError
from fastflow.network import Network
from fastflow.tangent import (
    DualNumbers,
    FiniteDifference,
    FunctionalJVP,
    Pairs,
    TangentEngine,
    pairs,
    rules,
    value_and_jvp,
)
from fastflow.tangent.pairs import RULES, Pair
from fastflow.wrappers import VelocityNetwork
from networks.dit import DiT
from networks.mlp import ToyMLP
from tangent_networks import ENGINES, Case, check_sharded, check_sharded_in_process, error

ALL: list[TangentEngine] = [*ENGINES, FiniteDifference(step=1e-3)]
every_engine = pytest.mark.parametrize("engine", ALL, ids=lambda e: type(e).__name__)
exact_engines = pytest.mark.parametrize("engine", ENGINES, ids=lambda e: type(e).__name__)


# Rules

torch.manual_seed(0)
X = torch.rand(2, 4, 6, 6, dtype=torch.float64) * 0.8 + 0.1
Y = torch.rand(2, 4, 6, 6, dtype=torch.float64) * 0.8 + 0.1
C = torch.rand(2, 4, 6, 6, dtype=torch.float64) + 0.5
MASK = C > 1
W = torch.randn(8, 4, 3, 3, dtype=torch.float64)
B8, B4 = torch.randn(8, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
GROUP_NORM = nn.GroupNorm(2, 4).double()
INDEX = torch.tensor([[2, 0, 1, 3, 3, 5]]).expand(2, 4, 6, 6)

# Name of a rule: functions of (x, y) that use it. `t` stands for torch, where x and y have no
# method of that name.
CASES: dict[str, list[Callable[[Any, Any], Any]]] = {
    "neg": [lambda x, y: -x],
    "positive": [lambda x, y: x.positive()],
    "clone": [lambda x, y: x.clone()],
    "contiguous": [lambda x, y: x.transpose(1, 2).contiguous()],
    "to": [lambda x, y: x.to(torch.float32).to(torch.float64), lambda x, y: x.to(C)],
    "type": [lambda x, y: x.type(torch.float64)],
    "float": [lambda x, y: x.float().double()],
    "double": [lambda x, y: x.double()],
    "half": [lambda x, y: x.half()],
    "bfloat16": [lambda x, y: x.bfloat16()],
    "cpu": [lambda x, y: x.cpu()],
    "reshape": [lambda x, y: x.reshape(2, -1), lambda x, y: torch.reshape(x, (8, 36))],
    "view": [lambda x, y: x.view(8, 36)],
    "flatten": [lambda x, y: x.flatten(1)],
    "unflatten": [lambda x, y: x.unflatten(1, (2, 2))],
    "ravel": [lambda x, y: x.ravel()],
    "squeeze": [lambda x, y: x[:1].squeeze(0)],
    "unsqueeze": [lambda x, y: x.unsqueeze(1), lambda x, y: torch.unsqueeze(x, 0)],
    "permute": [lambda x, y: x.permute(0, 2, 3, 1)],
    "transpose": [lambda x, y: x.transpose(1, 2), lambda x, y: x.mT],
    "swapaxes": [lambda x, y: x.swapaxes(1, 2)],
    "swapdims": [lambda x, y: x.swapdims(1, 2)],
    "movedim": [lambda x, y: x.movedim(1, 2)],
    "t": [lambda x, y: x[0, 0].t()],
    "expand": [lambda x, y: x[:, :1].expand(-1, 5, -1, -1)],
    "broadcast_to": [lambda x, y: torch.broadcast_to(x, (3, 2, 4, 6, 6))],
    "repeat": [lambda x, y: x.repeat(2, 1, 1, 1)],
    "repeat_interleave": [lambda x, y: x.repeat_interleave(2, 1)],
    "tile": [lambda x, y: x.tile(2)],
    "roll": [lambda x, y: x.roll(1, 2)],
    "flip": [lambda x, y: x.flip(2)],
    "rot90": [lambda x, y: torch.rot90(x, 1, [2, 3])],
    "chunk": [lambda x, y: x.chunk(2, 1)[1] * y[:, :2]],
    "split": [lambda x, y: x.split([1, 3], 1)[1], lambda x, y: torch.split(x, 2, 1)[0]],
    "unbind": [lambda x, y: x.unbind(1)[2], lambda x, y: list(x)[1]],
    "tensor_split": [lambda x, y: x.tensor_split(3, 1)[0]],
    "narrow": [lambda x, y: x.narrow(1, 1, 2)],
    "select": [lambda x, y: x.select(1, 2)],
    "index_select": [lambda x, y: x.index_select(1, torch.tensor([3, 0]))],
    "gather": [lambda x, y: x.gather(3, INDEX)],
    "take_along_dim": [lambda x, y: torch.take_along_dim(x, INDEX, 3)],
    "diagonal": [lambda x, y: x.diagonal(0, 2, 3)],
    "__getitem__": [lambda x, y: x[:, None, 1:3], lambda x, y: x[..., 0], lambda x, y: x[MASK]],
    "sum": [lambda x, y: x.sum(), lambda x, y: x.sum((1, 2), keepdim=True)],
    "mean": [lambda x, y: x.mean(1), lambda x, y: torch.mean(x, dim=(2, 3))],
    "cumsum": [lambda x, y: x.cumsum(1)],
    "diff": [lambda x, y: torch.diff(x, dim=2)],
    "tril": [lambda x, y: x.tril()],
    "triu": [lambda x, y: x.triu()],
    "unfold": [lambda x, y: F.unfold(x, 3), lambda x, y: x.unfold(2, 2, 2)],
    "fold": [lambda x, y: F.fold(x.reshape(2, 16, 9), (6, 6), 2, stride=2)],
    "avg_pool1d": [lambda x, y: F.avg_pool1d(x[0], 2)],
    "avg_pool2d": [lambda x, y: F.avg_pool2d(x, 2), lambda x, y: nn.AvgPool2d(3)(x)],
    "avg_pool3d": [lambda x, y: F.avg_pool3d(x, 2)],
    "adaptive_avg_pool2d": [lambda x, y: F.adaptive_avg_pool2d(x, (3, 2))],
    "interpolate": [
        lambda x, y: F.interpolate(x, scale_factor=2.0, mode="nearest"),
        lambda x, y: F.interpolate(x, size=(9, 5), mode="bilinear", align_corners=False),
    ],
    "pixel_shuffle": [lambda x, y: F.pixel_shuffle(x, 2)],
    "pixel_unshuffle": [lambda x, y: F.pixel_unshuffle(x, 2)],
    "expand_as": [lambda x, y: x[:, :1].expand_as(y)],
    "reshape_as": [lambda x, y: x.reshape(8, 36).reshape_as(C)],
    "view_as": [lambda x, y: x.view(8, 36).view_as(y)],
    "type_as": [lambda x, y: x.type_as(y), lambda x, y: C.type_as(y) * x],
    "pad": [
        lambda x, y: F.pad(x, (1, 2), value=3.0),
        lambda x, y: F.pad(x, (1, 1, 1, 1), "circular"),
    ],
    "masked_fill": [lambda x, y: x.masked_fill(MASK, 2.0)],
    "cat": [lambda x, y: torch.cat([x, C, y], dim=1), lambda x, y: torch.cat((x, y))],
    "concat": [lambda x, y: torch.concat([x, y], 2)],
    "concatenate": [lambda x, y: torch.concatenate([x, y], 2)],
    "stack": [lambda x, y: torch.stack([x, C, y])],
    "hstack": [lambda x, y: torch.hstack([x, y])],
    "vstack": [lambda x, y: torch.vstack([x, y])],
    "where": [
        lambda x, y: torch.where(MASK, x, y),
        lambda x, y: torch.where(MASK, C, y),
        lambda x, y: torch.where(x > 0.5, x, 2.0),
        lambda x, y: x.where(MASK, y),
        lambda x, y: C.where(MASK, y),
    ],
    "add": [
        lambda x, y: x + y,
        lambda x, y: x + C,
        lambda x, y: C + x,
        lambda x, y: 2 + x,
        lambda x, y: x[:, :1] + C,
        lambda x, y: torch.add(x, y, alpha=3),
        lambda x, y: torch.add(C, y, alpha=3),
    ],
    "sub": [
        lambda x, y: x - y,
        lambda x, y: x - C,
        lambda x, y: C - x,
        lambda x, y: x - 1,
        lambda x, y: torch.sub(x, y, alpha=3),
    ],
    "subtract": [lambda x, y: torch.subtract(x, y)],
    "__rsub__": [lambda x, y: 1 - x],
    "mul": [lambda x, y: x * y, lambda x, y: x * C, lambda x, y: C * x[:, :1], lambda x, y: 3 * x],
    "multiply": [lambda x, y: torch.multiply(x, y)],
    "matmul": [lambda x, y: x @ y, lambda x, y: C @ y, lambda x, y: x @ C],
    "mm": [lambda x, y: torch.mm(x[0, 0], y[0, 0])],
    "bmm": [lambda x, y: torch.bmm(x[0], y[0])],
    "outer": [lambda x, y: torch.outer(x[0, 0, 0], B4), lambda x, y: torch.outer(x.ravel(), B8)],
    "einsum": [
        lambda x, y: torch.einsum("bchw,bcwk->bhk", x, y),
        lambda x, y: torch.einsum("bchw,bcwk,bchw->bk", C, y, x),
    ],
    "linear": [
        lambda x, y: F.linear(x, C[0, 0], C[0, 0, 0]),
        lambda x, y: F.linear(C, y[0, 0], bias=C[0, 0, 0]),
        lambda x, y: F.linear(x, y[0, 0]),
    ],
    "conv1d": [lambda x, y: F.conv1d(x[0], W[:, 0, :, :2].repeat(1, 2, 1), B8)],
    "conv2d": [
        lambda x, y: F.conv2d(x, W, B8, padding=1),
        lambda x, y: F.conv2d(x, W, bias=B8, stride=2),
        lambda x, y: F.conv2d(x, y[:, :, :3, :3]),
    ],
    "conv3d": [lambda x, y: F.conv3d(x[:, None], W[:, :1, None], B8)],
    "conv_transpose1d": [lambda x, y: F.conv_transpose1d(x[0], C[0, 0][:, None, :3])],
    "conv_transpose2d": [
        lambda x, y: F.conv_transpose2d(x, C[0][:, None], stride=2, padding=1, groups=4)
    ],
    "conv_transpose3d": [lambda x, y: F.conv_transpose3d(x[:, None], W[:1, :, None], B4)],
    "div": [lambda x, y: x / y, lambda x, y: x / C, lambda x, y: C / x, lambda x, y: x / 3],
    "divide": [lambda x, y: torch.divide(x, y)],
    "true_divide": [lambda x, y: torch.true_divide(x, y)],
    "addcmul": [
        lambda x, y: torch.addcmul(C, x, y),
        lambda x, y: torch.addcmul(x[:, :1], C, y, value=2),
        lambda x, y: torch.addcmul(x, C, C),
    ],
    "silu": [lambda x, y: F.silu(x), lambda x, y: nn.SiLU()(x)],
    "gelu": [lambda x, y: F.gelu(x), lambda x, y: F.gelu(x, approximate="tanh")],
    "softmax": [
        lambda x, y: x.softmax(1),
        lambda x, y: torch.softmax(x, dim=-1, dtype=torch.float64),
        lambda x, y: F.softmax(x, -1),
    ],
    "group_norm": [
        lambda x, y: F.group_norm(x, 2),
        lambda x, y: F.group_norm(x.transpose(2, 3), 4, B4, B4, 1e-3),
        lambda x, y: GROUP_NORM(x),
    ],
    "layer_norm": [
        lambda x, y: F.layer_norm(x, (6,)),
        lambda x, y: F.layer_norm(x, (6, 6), C[0, 0], C[0, 1], 1e-3),
    ],
    "scaled_dot_product_attention": [
        lambda x, y: F.scaled_dot_product_attention(x, x * y, y),
        lambda x, y: F.scaled_dot_product_attention(x[:, :, :3], C, y, scale=0.3),
        lambda x, y: F.scaled_dot_product_attention(C, y, C),
    ],
    "dropout": [lambda x, y: F.dropout(x, 0.5, training=False), lambda x, y: F.dropout(x, 0.0)],
    "pow": [lambda x, y: x**2, lambda x, y: x**0.5, lambda x, y: x**y, lambda x, y: C**y],
    "__rpow__": [lambda x, y: 2**x],
    "__rdiv__": [lambda x, y: 2 / x],
    "atan2": [lambda x, y: torch.atan2(x, y), lambda x, y: torch.atan2(C, y)],
    "hypot": [lambda x, y: torch.hypot(x, y), lambda x, y: torch.hypot(x, C)],
    "maximum": [lambda x, y: torch.maximum(x, y)],
    "minimum": [lambda x, y: torch.minimum(x, C)],
    "clamp": [lambda x, y: x.clamp(0.3, 0.6), lambda x, y: torch.clamp(x, min=y)],
    "clip": [lambda x, y: x.clip(0.3, 0.6)],
    "clamp_min": [lambda x, y: x.clamp_min(0.4)],
    "clamp_max": [lambda x, y: x.clamp_max(0.4)],
    "lerp": [lambda x, y: torch.lerp(x, y, 0.3), lambda x, y: torch.lerp(C, y, x)],
    "addcdiv": [lambda x, y: torch.addcdiv(x, C, y, value=2)],
    "var": [lambda x, y: x.var(1)],
    "std": [lambda x, y: x.std((1, 2))],
    "norm": [lambda x, y: x.norm(dim=1), lambda x, y: x.norm()],
    "linalg_vector_norm": [
        lambda x, y: torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True),
        lambda x, y: torch.linalg.vector_norm(0 * x, dim=1),
    ],
    "prod": [lambda x, y: x.prod(1)],
    "amax": [lambda x, y: x.amax(1)],
    "amin": [lambda x, y: x.amin((1, 2))],
    "logsumexp": [lambda x, y: x.logsumexp(1)],
    "log_softmax": [lambda x, y: x.log_softmax(1), lambda x, y: F.log_softmax(x, -1)],
    "rms_norm": [lambda x, y: F.rms_norm(x, (6,), C[0, 0, 0])],
    "normalize": [lambda x, y: F.normalize(x, dim=1)],
    "log_sigmoid": [lambda x, y: F.logsigmoid(x)],
    "softplus": [lambda x, y: F.softplus(x)],
    "relu": [lambda x, y: F.relu(x - 0.5)],
    "leaky_relu": [lambda x, y: F.leaky_relu(x - 0.5)],
    "elu": [lambda x, y: F.elu(x - 0.5)],
    "mish": [lambda x, y: F.mish(x)],
}
for _name in (
    *("abs", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "exp"),
    *("exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "square"),
    *("erf", "sigmoid"),
):
    CASES[_name] = [lambda x, y, name=_name: getattr(torch, name)(x)]

CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "lt": lambda x: x < 0.5,
    "le": lambda x: x <= C,
    "gt": lambda x: x < C,
    "ge": lambda x: x >= x,
    "eq": lambda x: x == 0.5,
    "ne": lambda x: x != 0.5,
    **{
        name: lambda x, name=name: getattr(torch, name)(x)
        for name in (
            *("isnan", "isinf", "isfinite", "signbit", "floor", "ceil", "round", "trunc", "sign"),
            *("argmax", "argmin", "zeros_like", "ones_like", "numel", "is_floating_point"),
            "is_complex",
        )
    },
    "long": lambda x: x.long(),
    "int": lambda x: x.to(torch.int32),
    "bool": lambda x: x.bool(),
    "full_like": lambda x: torch.full_like(x, 2.0),
    "empty_like": lambda x: torch.empty_like(x).zero_(),
    "rand_like": lambda x: seeded(torch.rand_like, x),
    "randn_like": lambda x: seeded(torch.randn_like, x),
    "new_zeros": lambda x: x.new_zeros(3),
    "new_ones": lambda x: x.new_ones(3),
    "new_full": lambda x: x.new_full((3,), 2.0),
    "new_empty": lambda x: x.new_empty(3).zero_(),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "size": lambda x: x.size(1),
    "dim": lambda x: x.dim(),
    "stride": lambda x: x.stride(),
    "storage_offset": lambda x: x.storage_offset(),
    "element_size": lambda x: x.element_size(),
    "get_device": lambda x: x.get_device(),
    "is_contiguous": lambda x: x.transpose(0, 1).is_contiguous(),
    "bucketize": lambda x: torch.bucketize(x, torch.tensor([0.2, 0.5], dtype=torch.float64)),
    "searchsorted": lambda x: torch.searchsorted(torch.tensor([0.2, 0.5]).double(), x),
}


def seeded(function: Callable[[Any], Any], x: Any) -> Any:
    torch.manual_seed(3)
    return function(x)


def agree(f: Callable[..., Tensor], *primals: Tensor, tolerance: float = 1e-12) -> None:
    """Value and gradient to the bit those of a plain call, the tangent that of func.jvp."""
    torch.manual_seed(7)
    primals = tuple(p.clone().requires_grad_() for p in primals)
    tangents = tuple(torch.randn_like(p) for p in primals)
    value, tangent = value_and_jvp(f, primals, tangents)
    plain = f(*primals)
    assert torch.equal(value, plain)
    assert value.stride() == plain.stride()
    assert not tangent.requires_grad
    wanted = FunctionalJVP()(f, primals, tangents)[1]
    torch.testing.assert_close(tangent, wanted, rtol=tolerance, atol=tolerance)
    grads = (
        torch.autograd.grad(out.double().sin().sum(), primals, allow_unused=True)
        for out in (value, plain)
    )
    for ours, theirs in zip(*grads, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "number"), [(name, i) for name, cases in CASES.items() for i in range(len(cases))]
)
def test_rule_agrees_with_forward_mode(name: str, number: int, monkeypatch) -> None:
    used = []
    rule = RULES[name]
    monkeypatch.setitem(RULES, name, lambda *args: used.append(name) or rule(*args))
    narrow = name in ("half", "bfloat16")
    agree(CASES[name][number], X, Y, tolerance=1e-2 if narrow else 1e-12)
    assert used


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_plain(name: str) -> None:
    f, plain = CONSTANTS[name], CONSTANTS[name](X)

    def g(x: Any) -> Any:
        found = f(x)
        assert not isinstance(found, Pair)
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(plain))
        return x

    value_and_jvp(g, (X,), (Y,))


def test_every_rule_is_tested() -> None:
    assert RULES.keys() - {"cuda"} == CASES.keys() | CONSTANTS.keys()


def test_attention_in_parts_of_the_queries(monkeypatch) -> None:
    monkeypatch.setattr(rules, "_SCORES", 2 * 4 * 6 * 4 + 1)  # four of six queries at a time
    agree(CASES["scaled_dot_product_attention"][0], X, Y)


def wide(value: Any, like: Any) -> Any:
    return value.to(torch.promote_types(like.dtype, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: F.group_norm(x, 2, B4.to(x.dtype), B4.to(x.dtype)),
        lambda x, y: F.group_norm(x, 2, wide(B4, x), wide(B4, x)),
        lambda x, y: F.layer_norm(x, (6,)),
        lambda x, y: F.layer_norm(x, (6,), wide(C[0, 0, 0], x), wide(C[0, 0, 0], x)),
        lambda x, y: F.scaled_dot_product_attention(x, y, y),
        lambda x, y: F.silu(x) * F.gelu(y) + x.softmax(-1),
        lambda x, y: F.softmax(x, -1, dtype=torch.float32).to(x.dtype) @ y,
        lambda x, y: x / torch.linalg.vector_norm(wide(y, x), dim=1, keepdim=True),
    ],
)
def test_tangents_keep_the_type_of_their_primal(f, dtype: torch.dtype) -> None:
    tangents = (torch.randn_like(X), torch.randn_like(Y))
    wanted = value_and_jvp(lambda x, y: f(x, y).double(), (X, Y), tangents, FunctionalJVP())[1]
    given = [v.to(dtype) for v in (X, Y, *tangents)]
    value, tangent = value_and_jvp(f, given[:2], given[2:])
    assert tangent.dtype == value.dtype
    assert torch.equal(value, f(*given[:2]))
    assert error(tangent, wanted) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_on_a_gpu_is_the_ordinary_one(dtype: torch.dtype) -> None:
    x, dx = (v.to("cuda", dtype) for v in (X, Y))
    torch.manual_seed(0)
    plain = F.dropout(x, 0.3)
    torch.manual_seed(0)
    value, tangent = value_and_jvp(lambda x: F.dropout(x, 0.3), (x,), (dx,))
    assert torch.equal(value, plain)
    torch.testing.assert_close(tangent, dx * (value != 0) / 0.7, rtol=1e-2, atol=0)


def test_one_mask_for_value_and_tangent_in_any_memory_layout() -> None:
    def f(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return F.dropout(x.permute(0, 2, 3, 1), 0.4)

    value, tangent = value_and_jvp(f, (X,), (Y.contiguous(memory_format=torch.channels_last),))
    assert torch.equal(value, f(X))
    dropped = value == 0
    assert 0.3 < dropped.double().mean() < 0.5
    torch.testing.assert_close(tangent, Y.permute(0, 2, 3, 1) / 0.6 * ~dropped)


def test_linear_functions_keep_the_graph_of_none_but_the_value() -> None:
    """As many saved tensors and bytes as in a plain forward pass."""
    case = Case("DDPM++", torch.float32, training=True)

    def saved(action: Callable[[], object]) -> list[tuple[torch.Size, torch.dtype]]:
        found = []

        def pack(tensor: Tensor) -> Tensor:
            found.append((tensor.shape, tensor.dtype))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = action()
        assert kept is not None
        return found

    assert saved(lambda: case.jvp(Pairs())) == saved(lambda: case.f(*case.primals))


def test_recomputed_activations_come_without_tangents(monkeypatch) -> None:
    layer = nn.Linear(3, 3)

    def f(x: Any) -> Any:
        step = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        return step(lambda x: F.silu(layer(x)), x)

    used = []
    rule = RULES["linear"]
    monkeypatch.setitem(RULES, "linear", lambda *args: used.append(1) or rule(*args))
    x = torch.randn(2, 3)
    value, _ = value_and_jvp(f, (x,), (x,))
    assert len(used) == 1
    value.sum().backward()
    assert len(used) == 1
    plain = torch.autograd.grad(F.silu(layer(x)).sum(), layer.weight)[0]
    assert torch.equal(layer.weight.grad, plain)


# What has no rule


@pytest.mark.parametrize(
    ("f", "named"),
    [
        (lambda x: torch.cosine_similarity(x, x), r"cosine_similarity\(\)"),
        (lambda x: x.detach() * x, r"detach\(\)"),
        (lambda x: x.data * x, "'data'"),
        (lambda x: x * x.mean().item(), r"item\(\)"),
        (lambda x: x.add_(1), r"add_\(\)"),
        (lambda x: torch.ones_like(C).add_(x), r"add_\(\)"),
        (lambda x: torch.zeros_like(C).copy_(x), r"copy_\(\)"),
        (lambda x: x if x.sum() else x, "decision by a value"),
        (lambda x: F.silu(x, inplace=True), r"silu\(\) in place"),
        (lambda x: F.dropout(x, 0.5, inplace=True), r"dropout\(\) in place"),
        (lambda x: torch.sin(x, out=torch.empty_like(C)), r"sin\(\)"),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), "rounded division"),
        (lambda x: F.linear(C, C[0, 0], x[0, 0, 0]), r"linear\(\) by its bias"),
        (lambda x: F.group_norm(C, 2, x[0, :, 0, 0]), r"group_norm\(\) by any but its first"),
        (lambda x: F.layer_norm(x, (6,), x[0, 0, 0]), r"layer_norm\(\) by any but its first"),
        (lambda x: F.avg_pool2d(input=x, kernel_size=2), r"avg_pool2d\(\)"),
        (lambda x: x.sort(), r"sort\(\)"),
        (
            lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
            "mask, dropout or causality",
        ),
        (
            lambda x: F.scaled_dot_product_attention(x, x, x, MASK.new_ones(6, 6)),
            "mask, dropout or causality",
        ),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), "dropout"),
    ],
)
def test_what_has_no_rule_is_named(f: Callable[[Any], Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"engine Pairs: .*{named}.*use engine=DualNumbers\(\)"):
        value_and_jvp(f, (X,), (Y,))


def added_in_place(x: Any) -> Any:
    """Twice x + 1: the sum is written into the memory of x."""
    view = x.view(-1)
    view += 1
    return 2 * x


def written(x: Any) -> Any:
    y = 0 * x
    y[:1] = x[:1]
    return y


@pytest.mark.parametrize(
    ("f", "named"),
    [
        (added_in_place, "__iadd__"),
        (lambda x: operator.isub(1 * x, 1), "__isub__"),
        (lambda x: operator.imul(1 * x, 2), "__imul__"),
        (lambda x: operator.itruediv(1 * x, 2), "__idiv__"),
        (lambda x: operator.ipow(1 * x, 2), "pow_"),
        (written, "__setitem__"),
    ],
)
def test_changes_in_place_are_refused(f: Callable[[Any], Any], named: str) -> None:
    """A new pair in the place of the old one would give what shares its memory another value."""
    assert torch.equal(added_in_place(X.clone()), 2 * (X + 1))
    with pytest.raises(ConfigError, match=rf"engine Pairs: no rule for {named}\(\)"):
        value_and_jvp(f, (X,), (Y,))


class Square(torch.autograd.Function):
    """Opaque: no rule, and for torch a forward pass without gradients."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.x = x
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 2 * ctx.x * grads[0]


def reentrant(layer: nn.Module) -> Callable[[Any], Any]:
    return lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)


def without_gradient(layer: nn.Module) -> Callable[[Any], Any]:
    return lambda x: torch.no_grad()(layer)(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    "hide", [lambda layer: lambda x: Square.apply(layer(x)), reentrant, without_gradient]
)
def test_a_graph_that_would_be_cut_is_refused(hide: Callable[..., Any], monkeypatch) -> None:
    """Pairs are objects to an autograd.Function: the weights before it would get no gradient."""
    first, last = nn.Linear(2, 2), nn.Linear(2, 2)
    hidden, x = hide(first), POINTS[0]

    def f(x: Any) -> Any:
        return last(hidden(x))

    with pytest.raises(ConfigError, match=r"gradients off inside.*DualNumbers\(\).*use_reentrant"):
        value_and_jvp(f, (x,), (x,))
    with torch.no_grad():  # without gradients there is nothing to lose
        value_and_jvp(f, (x,), (x,))
    # What the guard is for: without it training goes on, and the first layer stays as it is.
    monkeypatch.setattr(pairs, "_refuse_without_graph", lambda: None)
    value_and_jvp(f, (x,), (x,))[0].sum().backward()
    assert last.weight.grad is not None
    assert first.weight.grad is None


def test_a_number_cannot_be_made_of_a_pair() -> None:
    with pytest.raises(TypeError):
        value_and_jvp(lambda x: x * float(x.sum()), (X,), (Y,))


def test_a_pair_answers_for_its_shape_and_nothing_private() -> None:
    pair = Pair(X, Y)
    assert (pair.shape, pair.ndim, pair.dtype, pair.device) == (X.shape, 4, X.dtype, X.device)
    assert len(pair) == 2
    assert not pair.is_cuda
    for name in ("_version", "nonsense", "__array__"):
        assert not hasattr(pair, name)
    assert hash(pair) == hash(pair)


def test_hooks_and_checkpoints_find_the_tensors_of_a_pair() -> None:
    leaves, tree = pytree.tree_flatten([Pair(X, Y)])
    assert [leaf is tensor for leaf, tensor in zip(leaves, (X, Y), strict=True)] == [True, True]
    assert isinstance(pytree.tree_unflatten(leaves, tree)[0], Pair)


# All engines


def mlp() -> Network:
    torch.manual_seed(0)
    net = VelocityNetwork(ToyMLP(width=8, depth=2))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net


POINTS = (torch.randn(4, 2), torch.rand(4))
DIRECTIONS = (torch.randn(4, 2), torch.ones(4))


@every_engine
def test_value_has_its_graph_and_tangent_has_none(engine: TangentEngine) -> None:
    net = mlp()
    x = POINTS[0].clone().requires_grad_()
    dx = DIRECTIONS[0].clone().requires_grad_()
    value, tangent = value_and_jvp(net, (x, POINTS[1]), (dx, DIRECTIONS[1]), engine)
    assert not tangent.requires_grad
    value.sum().backward()
    assert x.grad is not None
    assert dx.grad is None
    assert all(p.grad is not None for p in net.parameters())


@every_engine
@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_without_gradient_the_tangent_is_the_same(engine: TangentEngine, outer) -> None:
    net = mlp()
    _, wanted = value_and_jvp(net, POINTS, DIRECTIONS, engine)
    with outer():
        value, tangent = value_and_jvp(net, POINTS, DIRECTIONS, engine)
    assert not value.requires_grad
    torch.testing.assert_close(tangent, wanted)


@every_engine
def test_none_stands_for_zero(engine: TangentEngine) -> None:
    net = mlp()
    _, zeros = value_and_jvp(net, POINTS, (DIRECTIONS[0], torch.zeros(4)), engine)
    _, none = value_and_jvp(net, POINTS, (DIRECTIONS[0], None), engine)
    torch.testing.assert_close(none, zeros)
    _, time = value_and_jvp(net, POINTS, (None, DIRECTIONS[1]), engine)
    assert not torch.allclose(time, zeros)


@every_engine
def test_generators_end_where_a_plain_pass_leaves_them(engine: TangentEngine) -> None:
    layer = nn.Linear(2, 2)

    def f(x: Any, t: Any) -> Any:
        return F.dropout(layer(x) * t[:, None], 0.5)

    torch.manual_seed(4)
    plain = f(*POINTS)
    following = torch.rand(1)
    torch.manual_seed(4)
    value, tangent = value_and_jvp(f, POINTS, DIRECTIONS, engine)
    assert torch.equal(torch.rand(1), following)
    assert torch.equal(value, plain)
    assert torch.equal(tangent == 0, value == 0)  # the same masks


@every_engine
def test_a_network_whose_output_is_zero_at_first_is_accepted(engine: TangentEngine) -> None:
    torch.manual_seed(0)
    net = VelocityNetwork(DiT(resolution=4, hidden_size=8, depth=1, num_heads=1))
    x = torch.randn(2, 4, 4, 4)
    value, tangent = value_and_jvp(net, (x, torch.rand(2)), (x, torch.ones(2)), engine)
    assert not value.any()
    assert not tangent.any()


def test_engines_are_parts_with_names() -> None:
    assert len({engine.name for engine in ALL}) == len(ALL)
    assert [engine.exact for engine in ALL] == [True, True, True, False]
    assert Pairs() == Pairs()
    assert FiniteDifference(step=1e-3).name == "finite differences (central, h=0.001)"
    with pytest.raises(ConfigError, match="step"):
        FiniteDifference()
    with pytest.raises(ConfigError, match="scheme"):
        FiniteDifference(step=1e-3, scheme="backward")
    for step in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="FiniteDifference.step"):
            FiniteDifference(step=step)


def test_finite_differences_converge_with_their_orders() -> None:
    x, one = torch.tensor([[0.7]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    errors = {}
    for scheme in ("central", "forward"):
        for h in (1e-2, 1e-3):
            engine = FiniteDifference(step=h, scheme=scheme)
            tangent = value_and_jvp(torch.exp, (x,), (one,), engine)[1]
            errors[scheme, h] = abs(tangent.item() / x.exp().item() - 1)
    for h in (1e-2, 1e-3):
        assert errors["forward", h] == pytest.approx(h / 2, rel=1e-2)
        assert errors["central", h] == pytest.approx(h**2 / 6, rel=1e-2)


@pytest.mark.parametrize("scheme", ["central", "forward"])
def test_finite_differences_under_dropout(scheme) -> None:
    case = Case("DDPM++", torch.float64, training=True)
    wanted = case.jvp(Pairs())[1]

    def f(*args: Any) -> Any:  # without the seed that `case.f` sets
        return case.network(*args[:3], case.cond, case.augment, args[3])

    engine = FiniteDifference(step=1e-6, scheme=scheme)
    torch.manual_seed(1)
    tangent = value_and_jvp(f, case.primals, case.tangents, engine)[1]
    assert error(tangent, wanted) < 1e-3


# Networks that are not ours


class Foreign(nn.Module):
    """Contiguous queries, for which torch picks a fused kernel; and a function without rule."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.dropout = dropout

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        q, k, v = (
            p.contiguous() for p in self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        )
        h = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        return torch.cosine_similarity(h, v, -1) * t[:, None, None]


@pytest.mark.parametrize("engine", [DualNumbers(), FunctionalJVP()], ids=lambda e: e.name)
def test_fused_attention_of_foreign_networks(engine: TangentEngine) -> None:
    torch.manual_seed(0)
    net, x, t = Foreign().double(), torch.randn(2, 5, 8).double(), torch.rand(2).double()
    dx = torch.randn_like(x)
    with pytest.raises(NotImplementedError, match="forward AD|jvp"):
        torch.func.jvp(net, (x, t), (dx, t))
    wanted = value_and_jvp(net, (x, t), (dx, t), FiniteDifference(step=1e-5))[1]
    assert error(value_and_jvp(net, (x, t), (dx, t), engine)[1], wanted) < 1e-7
    with pytest.raises(ConfigError, match=r"no rule for cosine_similarity\(\)"):
        value_and_jvp(net, (x, t), (dx, t))


def test_dropout_inside_attention_is_refused_by_two_passes() -> None:
    x, t = torch.randn(2, 5, 8), torch.rand(2)
    with pytest.raises(ConfigError, match=r"dropout_p=0\.1 .*FunctionalJVP"):
        value_and_jvp(Foreign(dropout=0.1), (x, t), (x, t), DualNumbers())


@pytest.mark.parametrize("engine", [DualNumbers(), FunctionalJVP()], ids=lambda e: e.name)
def test_our_fused_attention_says_so_in_forward_mode(engine: TangentEngine) -> None:
    net = VelocityNetwork(DiT(resolution=4, hidden_size=8, depth=1, num_heads=1, attention="fused"))
    x, t = torch.randn(2, 4, 4, 4), torch.rand(2)
    value_and_jvp(net, (x, t), (x, t))
    with pytest.raises(ConfigError, match="attention: 'fused'"):
        value_and_jvp(net, (x, t), (x, t), engine)


# Guards


def compiled_networks() -> dict[str, Callable[..., Any]]:
    """As one module, in place, a block, a method, a function; none is run."""
    compile_ = functools.partial(torch.compile, backend="eager")
    whole, block, method, function = compile_(mlp()), mlp(), mlp(), mlp()
    block.model.blocks[0].compile(backend="eager")
    method.model.blocks[1].forward = compile_(method.model.blocks[1].forward)
    in_place = mlp()
    in_place.compile(backend="eager")
    called = compile_(lambda x, t: function(x, t))
    return {
        "whole": whole,
        "in place": in_place,
        "block": lambda x, t: block(x, t),
        "method": functools.partial(method.forward),
        "function": called,
        "in a closure": lambda x, t: called(x, t),
        "in a field": Holder(whole).call,
    }


class Holder:
    def __init__(self, network: Any) -> None:
        self.networks = {"student": network}

    def call(self, x: Tensor, t: Tensor) -> Any:
        return self.networks["student"](x, t)


@exact_engines
def test_compiled_networks_are_refused(engine: TangentEngine) -> None:
    for kind, f in compiled_networks().items():
        with pytest.raises(ConfigError, match="is compiled, which loses tangents.*Parallel"):
            pytest.fail(f"{kind}: {value_and_jvp(f, POINTS, DIRECTIONS, engine)}")


class Hidden:
    """Keeps a network where no closure or field shows it."""

    __slots__ = ("network",)

    def __init__(self, network: Any) -> None:
        self.network = network


@exact_engines
def test_compiled_networks_that_are_not_found_lose_nothing(engine: TangentEngine) -> None:
    """Only the first pass of two, which takes no tangent, runs compiled."""
    runs = []

    def backend(graph: Any, inputs: Any) -> Any:
        return lambda *args: runs.append(1) or graph.forward(*args)

    net = mlp()
    wanted = value_and_jvp(net, POINTS, DIRECTIONS)
    hidden = Hidden(torch.compile(net, backend=backend))
    found = value_and_jvp(lambda x, t: hidden.network(x, t), POINTS, DIRECTIONS, engine)
    torch.testing.assert_close(found, wanted)
    after = len(runs)
    hidden.network(*POINTS)
    assert after == (len(runs) - after if isinstance(engine, DualNumbers) else 0)
    assert len(runs) > after


@exact_engines
def test_networks_that_fastflow_compiled_are_accepted(engine: TangentEngine, monkeypatch) -> None:
    monkeypatch.setattr(distributed, "_COMPILER", {"backend": "eager"})
    net = mlp()
    wanted = value_and_jvp(net, POINTS, DIRECTIONS)
    distributed.shard(net, distributed.World(), 1, compile=True)
    for _ in range(2):
        found = value_and_jvp(net, POINTS, DIRECTIONS, engine)
        torch.testing.assert_close(found, wanted)
        net(*POINTS)  # so that compiled code is there


@every_engine
def test_ddp_is_refused(engine: TangentEngine) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(mlp())
        for f in (ddp, lambda x, t: ddp.module(x, t)):
            with pytest.raises(ConfigError, match=r"DistributedDataParallel.*distributed\.shard"):
                value_and_jvp(f, POINTS, DIRECTIONS, engine)
    finally:
        dist.destroy_process_group()


@exact_engines
def test_a_tangent_that_is_lost_on_the_way_is_an_error(engine: TangentEngine) -> None:
    net = mlp()

    def constant(x: Any, t: Any) -> Tensor:
        return net(*POINTS)

    with pytest.raises(ConfigError, match=f"f: its tangent is lost.*{type(engine).__name__}"):
        value_and_jvp(constant, POINTS, DIRECTIONS, engine)

    def detached(x: Any, t: Any) -> Any:
        return net(x.detach(), t.detach())

    with pytest.raises(ConfigError, match="its tangent is lost|detach"):
        value_and_jvp(detached, POINTS, DIRECTIONS, engine)


@exact_engines
def test_f_returns_one_tensor(engine: TangentEngine) -> None:
    with pytest.raises(ConfigError, match="f: tuple returned"):
        value_and_jvp(lambda x: (x, x), (X,), (Y,), engine)


def test_checkpointing_is_refused_by_one_pass_of_func_jvp() -> None:
    layer = nn.Linear(2, 2)

    def f(x: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    x = POINTS[0]
    with pytest.raises(ConfigError, match=r"checkpointing.*Pairs\(\)"):
        value_and_jvp(f, (x,), (x,), FunctionalJVP())
    with torch.no_grad():  # without a backward pass there is nothing to refuse
        tangent = value_and_jvp(f, (x,), (x,), FunctionalJVP())[1]
    torch.testing.assert_close(tangent, x @ layer.weight.T)


def test_other_errors_of_f_come_through() -> None:
    def f(x: Any) -> Any:
        raise RuntimeError("mine")

    for engine in ENGINES:
        with pytest.raises(RuntimeError, match="mine"):
            value_and_jvp(f, (X,), (Y,), engine)


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("primals", "tangents", "named"),
    [
        (POINTS, DIRECTIONS[:1], "tangents: 1 given, accepted: 2"),
        (POINTS, (None, None), "at least one"),
        ((POINTS[0], torch.arange(4)), (None, torch.ones(4)), r"primals\[1\]: torch.int64"),
        ((POINTS[0], POINTS[1].to(BF16)), (None, torch.ones(4, dtype=BF16)), "times in torch.bfl"),
        ((POINTS[0], POINTS[1].half()), (None, torch.ones(4).half()), "times in torch.float16"),
        ((POINTS[0], POINTS[1].to(BF16)), (POINTS[0], None), "times in torch.bfloat16"),
        (POINTS, (DIRECTIONS[0], torch.ones(4, 1)), r"tangents\[1\]: \(4, 1\).*\(4,\)"),
        (POINTS, (DIRECTIONS[0].double(), None), r"tangents\[0\]:.*float64.*float32"),
    ],
)
@every_engine
def test_arguments_that_do_not_fit_are_refused(
    engine: TangentEngine, primals, tangents, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        value_and_jvp(mlp(), primals, tangents, engine)


def test_integers_without_tangent_and_narrow_states_are_accepted() -> None:
    def f(x: Any, label: Tensor) -> Any:
        return x * torch.eye(4, dtype=x.dtype)[label]

    x = torch.randn(2, 4, dtype=BF16)
    value, tangent = value_and_jvp(f, (x, torch.tensor([1, 3])), (x, None))
    assert torch.equal(value, tangent)


# Sharded


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # outputs that are views
def test_sharded_networks_give_the_gradients_of_whole_ones() -> None:
    check_sharded(0, 1, dist.HashStore())


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_pairs_that_hooks_cannot_look_into_fail_the_comparison(monkeypatch) -> None:
    """Why pairs are dataclasses and pytrees: hooks of sharded blocks must find the graph."""
    monkeypatch.delitem(pytree.SUPPORTED_NODES, Pair)
    monkeypatch.delattr(Pair, "__dataclass_fields__")
    with pytest.raises(RuntimeError):
        check_sharded(0, 1, dist.HashStore())


@pytest.mark.dist
def test_networks_sharded_over_two_processes_give_the_gradients_of_whole_ones(
    tmp_path: Path,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mp.spawn(check_sharded_in_process, (2, str(tmp_path / "store")), nprocs=2)
