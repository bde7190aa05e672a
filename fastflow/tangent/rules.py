"""The derivatives of the torch functions that networks call, as rules for pairs.

A rule calls the function itself on the primals, so that values, graphs and autocast are those of
an ordinary forward pass, and computes the tangent next to it without gradient. Where the Jacobian
is symmetric (elementwise functions, softmax, plain normalisation) the tangent is what torch's own
backward kernel makes of the tangent.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastflow.tangent.pairs import RULES, Pair, Rule, holds_pair, primals, refuse

_Function = Callable[..., Any]
_Args = Sequence[Any]
_Kwargs = Mapping[str, Any]

_ops = torch.ops.aten

_SCORES = 2**25
"""Elements of the largest score matrix that attention's tangent holds at once."""


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _pair(primal: Tensor, tangent: Tensor) -> Pair:
    """A pair of one shape and type: tangents are broadcast, and rounded as the primal is."""
    return Pair(primal, tangent.to(primal.dtype).expand(primal.shape))


def _first(function: _Function, args: _Args, rest: object) -> Pair:
    """The first argument, the only one that depends on the inputs."""
    if not args or not isinstance(args[0], Pair) or holds_pair(rest):
        refuse(f"no rule for {function.__name__}() by any but its first argument")
    return args[0]


def _tangent(value: Any) -> Any:
    """The tangent; zero of a constant tensor or number."""
    if isinstance(value, Pair):
        return value.tangent
    return torch.zeros_like(value) if isinstance(value, Tensor) else 0


# Constants: their values jump or do not depend on the values of what they are given


@_rule(
    *("lt", "le", "gt", "ge", "eq", "ne", "isnan", "isinf", "isfinite", "signbit"),
    *("floor", "ceil", "round", "trunc", "sign", "long", "int", "bool", "argmax", "argmin"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
    *("size", "dim", "numel", "stride", "storage_offset", "element_size", "get_device"),
    *("is_contiguous", "is_floating_point", "is_complex", "bucketize", "searchsorted"),
)
def _constant(function: _Function, args: _Args, kwargs: _Kwargs) -> Any:
    with torch.no_grad():
        return function(*primals(args), **primals(kwargs))


# Linear functions


@_rule(
    *(
        "neg",
        "positive",
        "clone",
        "contiguous",
        "to",
        "type",
        "float",
        "double",
        "half",
        "bfloat16",
    ),
    *("cpu", "cuda", "reshape", "view", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze"),
    *("permute", "transpose", "swapaxes", "swapdims", "movedim", "t", "expand", "broadcast_to"),
    *("repeat", "repeat_interleave", "tile", "roll", "flip", "rot90", "chunk", "split", "unbind"),
    *("tensor_split", "narrow", "select", "index_select", "gather", "take_along_dim", "diagonal"),
    *("__getitem__", "sum", "mean", "cumsum", "diff", "tril", "triu", "unfold", "fold"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "interpolate"),
    *("pixel_shuffle", "pixel_unshuffle"),
)
def _linear(function: _Function, args: _Args, kwargs: _Kwargs) -> Any:
    x, rest = _first(function, args, (args[1:], kwargs)), args[1:]
    primal = function(x.primal, *rest, **kwargs)
    if isinstance(primal, Tensor) and not primal.is_floating_point():
        return primal  # converted to integers
    with torch.no_grad():
        tangent = function(x.tangent, *rest, **kwargs)
    if isinstance(primal, Tensor):
        return Pair(primal, tangent)
    return tuple(Pair(p, t) for p, t in zip(primal, tangent, strict=True))


@_rule("expand_as", "reshape_as", "view_as", "type_as")
def _like(function: _Function, args: _Args, kwargs: _Kwargs) -> Any:
    """Of the second argument only shape or type are used."""
    x, like = args
    like = like.primal if isinstance(like, Pair) else like
    return _linear(function, [x, like], kwargs) if isinstance(x, Pair) else function(x, like)


@_rule("pad")
def _pad(function: _Function, args: _Args, kwargs: _Kwargs) -> Pair:
    x = _first(function, args, (args[1:], kwargs))
    primal = function(x.primal, *args[1:], **kwargs)
    with torch.no_grad():  # what is added is constant: zeros
        pad, mode = _named(args, kwargs, "pad", 1), _named(args, kwargs, "mode", 2, "constant")
        return _pair(primal, F.pad(x.tangent, pad, mode))


@_rule("masked_fill")
def _masked_fill(function: _Function, args: _Args, kwargs: _Kwargs) -> Pair:
    x = _first(function, args, (args[1:], kwargs))
    primal = function(x.primal, *args[1:], **kwargs)
    with torch.no_grad():
        return _pair(primal, x.tangent.masked_fill(_named(args, kwargs, "mask", 1), 0))


@_rule("cat", "concat", "concatenate", "stack", "hstack", "vstack")
def _cat(function: _Function, args: _Args, kwargs: _Kwargs) -> Pair:
    parts, rest = args[0], args[1:]
    primal = function(primals(parts), *rest, **kwargs)
    with torch.no_grad():
        return _pair(primal, function([_tangent(part) for part in parts], *rest, **kwargs))


@_rule("where")
def _where(function: _Function, args: _Args, kwargs: _Kwargs) -> Pair:
    """torch.where(mask, a, b) and a.where(mask, b)."""
    primal = function(*primals(args), **kwargs)
    with torch.no_grad():
        masks = [isinstance(a, Tensor) and a.dtype == torch.bool for a in args]
        tangents = [a if mask else _tangent(a) for a, mask in zip(args, masks, strict=True)]
        return _pair(primal, function(*tangents, **kwargs))


@_rule("add", "sub", "subtract", "__rsub__")
def _sum(function: _Function, args: _Args, kwargs: _Kwargs) -> Pair:
    a, b = args
    primal = function(*primals(args), **kwargs)
    factor = kwargs.get("alpha", 1)
    first, second = {"add": (1, factor), "__rsub__": (-1, 1)}.get(function.__name__, (1, -factor))
    with torch.no_grad():
        if isinstance(a, Pair) and isinstance(b, Pair):
            return _pair(primal, torch.add(a.tangent, b.tangent, alpha=second))
        tangent, sign = (a.tangent, first) if isinstance(a, Pair) else (b.tangent, second)
        return _pair(primal, tangent if sign == 1 else sign * tangent)


# Products


@_rule("mul", "multiply", "matmul", "mm", "bmm", "outer", "einsum")
def _product(function: _Function, args: _Args, kwargs: _Kwargs) -> Pair:
    """The product rule, over all operands that are pairs."""
    primal = function(*primals(args), **kwargs)
    return _pair(primal, _product_tangent(function, args, kwargs))


@_rule("linear", "conv1d", "conv2d", "conv3d")
@_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _layer(function: _Function, args: _Args, kwargs: _Kwargs) -> Pair:
    """The product rule in input and weight, without the bias."""
    if holds_pair((args[2:], kwargs)):
        refuse(f"no rule for {function.__name__}() by its bias")
    primal = function(*primals(args), **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name != "bias"}
    args = [*args[:2], *([None] if len(args) > 2 else []), *args[3:]]
    return _pair(primal, _product_tangent(function, args, kwargs))


@torch.no_grad()
def _product_tangent(function: _Function, args: _Args, kwargs: _Kwargs) -> Tensor:
    plain = primals(list(args))
    terms = [
        function(*plain[:i], operand.tangent, *plain[i + 1 :], **kwargs)
        for i, operand in enumerate(args)
        if isinstance(operand, Pair)
    ]
    if not terms:
        refuse(f"no rule for {function.__name__}() with operands given by name or in a list")
    total: Tensor = functools.reduce(torch.add, terms)
    return total


@_rule("div", "divide", "true_divide")
def _quotient(function: _Function, args: _Args, kwargs: _Kwargs) -> Pair:
    a, b = args
    if kwargs.get("rounding_mode") is not None:
        refuse("no rule for a rounded division")
    primal = function(*primals(args))
    with torch.no_grad():
        if not isinstance(b, Pair):
            return _pair(primal, function(a.tangent, b))
        tangent = -primal * b.tangent
        tangent = tangent + a.tangent if isinstance(a, Pair) else tangent
        return _pair(primal, tangent / b.primal)


@_rule("addcmul")
def _addcmul(function: _Function, args: _Args, kwargs: _Kwargs) -> Pair:
    """c + value a b."""
    c, a, b = args
    primal = function(*primals(args), **kwargs)
    with torch.no_grad():
        tangent = c.tangent if isinstance(c, Pair) else torch.zeros_like(primal)
        for one, other in ((a, b), (b, a)):
            if isinstance(one, Pair):
                tangent = torch.addcmul(tangent, one.tangent, primals(other), **kwargs)
        return _pair(primal, tangent)


# Functions of one argument whose Jacobian is symmetric


@_rule("silu")
def _silu(function: _Function, args: _Args, kwargs: _Kwargs) -> Pair:
    x = _first(function, args, (args[1:], kwargs))
    if _named(args, kwargs, "inplace", 1, False):
        refuse("no rule for silu() in place")
    primal = function(x.primal)
    with torch.no_grad():
        return _pair(primal, _ops.silu_backward(x.tangent, x.primal))


@_rule("gelu")
def _gelu(function: _Function, args: _Args, kwargs: _Kwargs) -> Pair:
    x = _first(function, args, (args[1:], kwargs))
    primal = function(x.primal, **kwargs)
    with torch.no_grad():
        return _pair(primal, _ops.gelu_backward(x.tangent, x.primal, **kwargs))


@_rule("softmax")
def _softmax(function: _Function, args: _Args, kwargs: _Kwargs) -> Pair:
    x = _first(function, args, (args[1:], kwargs))
    dim = _named(args, kwargs, "dim", 1)
    if dim is None:
        refuse("no rule for softmax() without dim")
    primal = function(x.primal, *args[1:], **kwargs)
    with torch.no_grad():
        return _pair(primal, _softmax_tangent(primal, x.tangent, dim))


def _softmax_tangent(weights: Tensor, tangent: Tensor, dim: int) -> Tensor:
    """w (dx - sum w dx) for w = softmax(x)."""
    out: Tensor = _ops._softmax_backward_data(
        tangent.to(weights.dtype), weights, dim, weights.dtype
    )
    return out


@_rule("group_norm")
def _group_norm(function: _Function, args: _Args, kwargs: _Kwargs) -> Pair:
    x = _first(function, args, (args[1:], kwargs))
    primal = function(x.primal, *args[1:], **kwargs)
    groups, weight = _named(args, kwargs, "num_groups", 1), _named(args, kwargs, "weight", 2, None)
    eps = _named(args, kwargs, "eps", 4, 1e-5)
    with torch.no_grad():
        rows, channels, *rest = x.primal.shape
        sizes = (rows, channels, x.primal.numel() // (rows * channels), groups)
        value, tangent = x.primal.contiguous(), x.tangent.to(x.primal.dtype).contiguous()
        _, mean, rstd = torch.native_group_norm(value, None, None, *sizes, eps)
        tangent, _, _ = _ops.native_group_norm_backward(
            tangent, value, mean, rstd, None, *sizes, [True, False, False]
        )
        if weight is not None:
            tangent = tangent * weight.view(-1, *[1] * len(rest))
        return _pair(primal, tangent)


@_rule("layer_norm")
def _layer_norm(function: _Function, args: _Args, kwargs: _Kwargs) -> Pair:
    x = _first(function, args, (args[1:], kwargs))
    primal = function(x.primal, *args[1:], **kwargs)
    shape = list(_named(args, kwargs, "normalized_shape", 1))
    weight, eps = _named(args, kwargs, "weight", 2, None), _named(args, kwargs, "eps", 4, 1e-5)
    with torch.no_grad():
        value, tangent = x.primal.contiguous(), x.tangent.contiguous()
        _, mean, rstd = torch.native_layer_norm(value, shape, None, None, eps)
        tangent, _, _ = _ops.native_layer_norm_backward(
            tangent, value, shape, mean, rstd, None, None, [True, False, False]
        )
        return _pair(primal, tangent if weight is None else tangent * weight)


# Attention and dropout


@_rule("scaled_dot_product_attention")
def _attention(function: _Function, args: _Args, kwargs: _Kwargs) -> Pair:
    """o = P v, P = softmax(c q k^T): do = P dv + dP v; in parts of the queries to save memory."""
    mask, dropout = (
        _named(args, kwargs, "attn_mask", 3, None),
        _named(args, kwargs, "dropout_p", 4, 0),
    )
    others = _named(args, kwargs, "is_causal", 5, False) or kwargs.get("enable_gqa", False)
    if mask is not None or dropout or others:
        refuse("no rule for scaled_dot_product_attention() with a mask, dropout or causality")
    primal = function(*primals(args), **kwargs)
    with torch.no_grad():
        q, k, v = (value.to(primal.dtype) for value in primals(args[:3]))
        dq, dk, dv = (_tangent(value).to(primal.dtype) for value in args[:3])
        scale = kwargs.get("scale") or q.shape[-1] ** -0.5
        wide = torch.promote_types(primal.dtype, torch.float32)
        size = max(1, _SCORES // (q.shape[:-2].numel() * k.shape[-2]))
        parts = []
        for some, dsome in zip(q.split(size, -2), dq.split(size, -2), strict=True):
            some, dsome = some * scale, dsome * scale
            weights = (some @ k.mT).to(wide).softmax(-1)
            change = _softmax_tangent(weights, some @ dk.mT + dsome @ k.mT, -1)
            parts.append(weights.to(v.dtype) @ dv + change.to(v.dtype) @ v)
        return _pair(primal, torch.cat(parts, -2))


@_rule("dropout")
def _dropout(function: _Function, args: _Args, kwargs: _Kwargs) -> Pair:
    """One mask for both."""
    x = _first(function, args, (args[1:], kwargs))
    if _named(args, kwargs, "inplace", 3, False):
        refuse("no rule for dropout() in place")
    p = _named(args, kwargs, "p", 1, 0.5)
    if p == 0 or not _named(args, kwargs, "training", 2, True):
        return x
    if x.primal.is_cuda and p < 1:  # the kernel that dropout() runs there
        primal, kept = torch.native_dropout(x.primal, p, True)
        mask = kept / (1 - p)
    else:  # what dropout() does elsewhere
        mask = F.dropout(torch.ones_like(x.primal), p)
        primal = x.primal * mask
    with torch.no_grad():
        return _pair(primal, x.tangent * mask)


# Functions for which torch's own forward mode is good enough, one call at a time


@_rule(
    *("abs", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "asinh"),
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal"),
    *(
        "square",
        "pow",
        "__rpow__",
        "__rdiv__",
        "hypot",
        "erf",
        "sigmoid",
        "log_sigmoid",
        "softplus",
    ),
    *("relu", "leaky_relu", "elu", "mish", "log_softmax", "logsumexp", "clamp", "clip"),
    *("clamp_min", "clamp_max", "maximum", "minimum", "lerp", "addcdiv", "var", "std", "norm"),
    *("linalg_vector_norm", "prod", "amax", "amin", "rms_norm", "normalize"),
)
def _by_dual_numbers(function: _Function, args: _Args, kwargs: _Kwargs) -> Pair:
    primal = function(*primals(args), **primals(kwargs))
    with dual_numbers():
        out = function(*_duals(args), **_duals(kwargs))
        tangent = forward_ad.unpack_dual(out).tangent
    if tangent is None:
        refuse(f"no rule for {function.__name__}() with these arguments")
    return _pair(primal, tangent)


@contextlib.contextmanager
def dual_numbers() -> Iterator[None]:
    """A level of forward mode without graph. Inference mode has no forward mode and is left."""
    with torch.inference_mode(False), torch.no_grad(), forward_ad.dual_level():
        yield


def dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """A dual number, within `dual_numbers`."""
    if primal.is_inference() or tangent.is_inference():
        primal, tangent = primal.clone(), tangent.clone()
    number: Tensor = forward_ad.make_dual(primal.detach(), tangent)
    return number


def _duals(value: Any) -> Any:
    if isinstance(value, Pair):
        return dual(value.primal, value.tangent)
    if isinstance(value, list | tuple):
        return [_duals(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _duals(item) for name, item in value.items()}
    return value


_REQUIRED = object()


def _named(args: _Args, kwargs: _Kwargs, name: str, place: int, default: Any = _REQUIRED) -> Any:
    """An argument given by name or by place."""
    if name in kwargs:
        return kwargs[name]
    if len(args) > place:
        return args[place]
    assert default is not _REQUIRED, name
    return default
