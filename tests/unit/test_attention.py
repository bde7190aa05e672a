"""Attention: one formula behind every backend, the choice in forward mode, and its report."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fastflow.errors import ConfigError
from networks.attention import Backend, attention, describe, in_forward_mode

BACKENDS: tuple[Backend, ...] = get_args(Backend)
FORWARD: tuple[Backend, ...] = ("auto", "math", "explicit")
Three = tuple[Tensor, Tensor, Tensor]


def three(dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 2.0) -> Three:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = scale * torch.randn(3, 2, 3, 10, 8, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(torch.einsum("bhqc,bhkc->bhqk", q, k) / math.sqrt(q.shape[-1]))
    return torch.einsum("bhqk,bhkc->bhqc", weights / weights.sum(-1, keepdim=True), v)


def dual_level(f: Callable[..., Tensor], primals: Three, tangents: Three) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        pairs = [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
        primal, tangent = forward_ad.unpack_dual(f(*pairs))
        assert tangent is not None
        return primal, tangent


class Operators(TorchDispatchMode):
    """Records the kernels that run, with the type of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[str, torch.dtype | None]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        self.ran.append((func.__name__, out.dtype if isinstance(out, Tensor) else None))
        return out

    def names(self) -> set[str]:
        return {name.split(".")[0] for name, _ in self.ran}


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_those_of_the_formula(backend: Backend) -> None:
    given = [part.requires_grad_() for part in three()]
    out, expected = attention(*given, backend), formula(*given)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(out)
    grads = torch.autograd.grad(out, given, probe)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, given, probe))


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_may_be_fewer_than_keys_and_parts_may_be_views(backend: Backend) -> None:
    q, k, v = three()
    torch.testing.assert_close(attention(q[:, :, :4], k, v, backend), formula(q[:, :, :4], k, v))
    q, k, v = torch.stack(three(), -1).unbind(-1)
    torch.testing.assert_close(attention(q, k, v, backend), formula(q, k, v))


@pytest.mark.parametrize("differentiate", [torch.func.jvp, dual_level])
@pytest.mark.parametrize("backend", FORWARD)
def test_forward_mode_gives_the_derivative(
    backend: Backend, differentiate: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    given, along = three(), three(seed=1, scale=1.0)
    primal, tangent = differentiate(lambda *a: attention(*a, backend), given, along)
    h = 1e-5
    ahead = formula(*(p + h * t for p, t in zip(given, along, strict=True)))
    behind = formula(*(p - h * t for p, t in zip(given, along, strict=True)))
    torch.testing.assert_close(primal, formula(*given))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("differentiate", [torch.func.jvp, dual_level])
@pytest.mark.parametrize("layout", ["adjacent channels", "views"])
def test_fused_is_refused_in_forward_mode(
    layout: str, differentiate: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    given, along = three(), three(seed=1)
    if layout == "views":  # torch would fall back to a kernel that works
        q, k, v = torch.stack(given, -1).unbind(-1)
        given = (q, k, v)
    with pytest.raises(ConfigError, match="'fused' cannot .* forward mode; use 'auto'"):
        differentiate(lambda *a: attention(*a, "fused"), given, along)
    assert not in_forward_mode()
    torch.testing.assert_close(attention(*given, "fused"), formula(*given))


def test_auto_is_explicit_in_forward_mode_only() -> None:
    given, along = three(torch.float32), three(torch.float32, seed=1)
    with Operators() as here:
        attention(*given)
    assert "_scaled_dot_product_flash_attention_for_cpu" in here.names()
    torch.testing.assert_close(attention(*given), attention(*given, "fused"), rtol=0, atol=0)
    seen: list[bool] = []

    def f(*parts: Tensor) -> Tensor:
        seen.append(in_forward_mode())
        torch.testing.assert_close(
            forward_ad.unpack_dual(attention(*parts)),
            forward_ad.unpack_dual(attention(*parts, "explicit")),
            rtol=0,
            atol=0,
        )
        return attention(*parts)

    dual_level(f, given, along)
    torch.func.jvp(lambda *a: torch.func.jvp(f, a, along)[1], given, along)
    assert seen == [True, True]
    assert not in_forward_mode()


def test_forward_mode_ends_with_an_error_inside() -> None:
    def fail(x: Tensor) -> Tensor:
        raise KeyError

    with pytest.raises(KeyError):
        torch.func.jvp(fail, (torch.ones(1),), (torch.ones(1),))
    assert not in_forward_mode()


@pytest.mark.parametrize("backend", FORWARD)
def test_compiled_forward_mode_agrees(backend: Backend) -> None:
    given, along = three(), three(seed=1)

    def tangent(*both: Tensor) -> Tensor:
        return torch.func.jvp(lambda *a: attention(*a, backend), both[:3], both[3:])[1]

    compiled = torch.compile(tangent, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given, *along), tangent(*given, *along))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_normalised_in_float32(dtype: torch.dtype) -> None:
    given = three(dtype)
    with Operators() as here:
        out = attention(*given, "explicit")
    kinds = [kind for name, kind in here.ran if name.startswith("_softmax")]
    assert kinds == [torch.float32]
    assert out.dtype == dtype
    # float16 ends at 65504: a sum of exponentials in it would not be finite.
    assert attention(*three(dtype, scale=6.0), "explicit").isfinite().all()
    exact = formula(*(part.double() for part in given))
    assert float((out.double() - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_narrows_the_products_only(backend: Backend) -> None:
    given = three(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), Operators() as here:
        out = attention(*given, backend)
    exact = formula(*given)
    assert 0 < float((out.float() - exact).norm() / exact.norm()) < 0.02
    if backend == "explicit":
        kinds = [kind for name, kind in here.ran if name.startswith("_softmax")]
        assert kinds == [torch.float32]


class Boxed:
    """Stands for a tensor and records the functions applied to it."""

    called: list[str]

    def __init__(self, value: Tensor) -> None:
        self.value = value

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    def __truediv__(self, other: float) -> Boxed:
        return self.__torch_function__(Tensor.div, (), (self, other))

    def __matmul__(self, other: Boxed) -> Boxed:
        return self.__torch_function__(torch.matmul, (), (self, other))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Boxed:
        cls.called.append(func.__name__)
        return cls(func(*(a.value if isinstance(a, Boxed) else a for a in args), **(kwargs or {})))


@pytest.mark.parametrize("backend", BACKENDS)
def test_objects_that_stand_for_tensors_are_taken(backend: Backend) -> None:
    Boxed.called = []
    q, k, v = three()
    out: Any = attention(Boxed(q), Boxed(k), Boxed(v), backend)  # type: ignore[arg-type]
    torch.testing.assert_close(out.value, formula(q, k, v))
    expected = "softmax" if backend == "explicit" else "scaled_dot_product_attention"
    assert expected in Boxed.called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_report_names_the_kernel_that_runs(dtype: torch.dtype) -> None:
    with Operators() as here:
        attention(*three(dtype))
    kernel = "flash" if any("flash" in name for name in here.names()) else "math"
    assert describe("auto", "cpu", dtype) == (
        f"fused ({kernel}); explicit under forward-mode differentiation"
    )
    assert describe("fused", torch.device("cpu"), dtype) == (
        f"fused ({kernel}); refused under forward-mode differentiation"
    )
    assert describe("math", "cpu", dtype) == "math"
    assert describe("explicit", "cpu", dtype) == "explicit"


def test_the_report_follows_the_kernels_that_are_allowed() -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert describe("auto", "cpu", torch.float32).startswith("fused (math);")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_report_names_the_kernel_of_the_gpu(dtype: torch.dtype) -> None:
    given = [torch.randn(1, 1, 256, 64, device="cuda", dtype=dtype) for _ in range(3)]
    with Operators() as here:
        attention(*given)
    names = " ".join(here.names())
    kernel = next((k for k in ("flash", "efficient", "cudnn") if f"_{k}_" in names), "math")
    assert describe("auto", "cuda", dtype).startswith(f"fused ({kernel});")
    assert float((attention(*given) - attention(*given, "explicit")).norm()) < 0.1
