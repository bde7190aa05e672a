"""Softmax attention over tokens: which implementation runs, and a text that says so.

Every operation is a plain torch function, so that the arguments may also be objects that stand for
tensors through `__torch_function__`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastflow.errors import ConfigError

Backend = Literal["auto", "fused", "math", "explicit"]
"""How attention is computed.

- "fused": `scaled_dot_product_attention` with the kernel that torch picks; it cannot be
  differentiated in forward mode, which is refused.
- "math": the same restricted to torch's unfused kernel.
- "explicit": the formula written out; differentiable in forward mode, also when compiled.
- "auto": "fused", but "explicit" while forward-mode differentiation is in progress.
"""


def attention(q: Tensor, k: Tensor, v: Tensor, backend: Backend = "auto") -> Tensor:
    """softmax(q k^T / sqrt(width)) v. The weights are normalised in float32 or wider.

    Args:
        q, k, v: queries, keys and values [B, heads, tokens, width], in one type. Fused kernels
            want neighbouring channels next to each other in memory.
        backend: see `Backend`.

    Returns:
        [B, heads, tokens, width].

    Raises:
        ConfigError: "fused" in forward mode.
    """
    if backend == "auto":
        backend = "explicit" if in_forward_mode() else "fused"
    if backend == "explicit":
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
        wide = torch.promote_types(scores.dtype, torch.float32)
        return torch.softmax(scores, dim=-1, dtype=wide).to(v.dtype) @ v
    if backend == "math":
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)
    if in_forward_mode():
        raise ConfigError(
            "attention: 'fused' cannot be differentiated in forward mode; use 'auto', which "
            "leaves the fused kernel only then, or 'explicit' or 'math'"
        )
    return F.scaled_dot_product_attention(q, k, v)


def in_forward_mode() -> bool:
    """Whether `torch.func.jvp` or a `forward_ad.dual_level` is in progress."""
    return forward_ad._current_level >= 0


def describe(
    backend: Backend,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    tokens: int = 256,
    width: int = 64,
) -> str:
    """What `attention` runs for q, k, v [1, 1, tokens, width] of this device and type.

    Returns:
        Such as "fused (flash); explicit under forward-mode differentiation".
    """
    if backend in ("math", "explicit"):
        return backend
    q = torch.empty(1, 1, tokens, width, device=device, dtype=dtype)
    kernel = SDPBackend(torch._fused_sdp_choice(q, q, q)).name.removesuffix("_ATTENTION").lower()
    if backend == "fused":
        return f"fused ({kernel}); refused under forward-mode differentiation"
    return f"fused ({kernel}); explicit under forward-mode differentiation"
