"""What a network costs: parameters, multiply-accumulates, and the kernels of its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from fastflow.errors import ConfigError
from fastflow.network import Network


def _sdpa(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(q, k, v)
    return flops


def _sdpa_backward(
    grad: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any
) -> int:
    flops: int = sdpa_backward_flop_count(grad, q, k, v)
    return flops


# torch counts the fused attention of GPUs only.
_OF_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
}


def flop_counter() -> FlopCounterMode:
    """Counts floating-point operations of convolutions and matrix products while it is entered."""
    return FlopCounterMode(display=False, custom_mapping=_OF_CPU)


class Cost(NamedTuple):
    """The cost of one forward pass of one sample.

    Attributes:
        parameters: their number.
        macs: multiply-accumulates of convolutions and matrix products, attention included.
        macs_of: the same by name of the module.
        attention: the kernel in an ordinary pass, "flash" say, or "explicit" where the formula
            is written out; after a slash that in forward-mode differentiation, if another. "-"
            without attention.
    """

    parameters: int
    macs: int
    macs_of: Mapping[str, int]
    attention: str


def count(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in module.parameters())


def one_sample(network: Network, device: torch.device) -> tuple[Tensor | None, ...]:
    """The arguments of `Network.forward` for one sample at t = 1 with everything it takes."""
    x = torch.zeros(1, *network.sample_shape, device=device)
    t = torch.ones(1, device=device)
    s = t / 2 if network.two_times else None
    cond = torch.zeros(1, network.cond_dim, device=device) if network.cond_dim else None
    augment = torch.zeros(1, network.augment_dim, device=device) if network.augment_dim else None
    arguments = (x, t, s, cond, augment, t if network.takes_guidance else None)
    given = max(n for n, argument in enumerate(arguments) if argument is not None)
    return arguments[: given + 1]  # a network need not name what it does not take


@contextmanager
def evaluating(network: Network) -> Iterator[None]:
    """In evaluation mode, without gradients, and without compiled code, which counters do not see.

    Whether the network was in training mode is restored.
    """
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        network.train(was_training)


def measure(network: Network, device: torch.device, kernels: torch.device) -> Cost:
    """Run one sample through a network and count.

    Args:
        network: on `device`, which may be "meta": then nothing is computed. Where it is sharded,
            every process must call this, and reshard it afterwards.
        device: where the network is.
        kernels: the device for which kernels of attention are named.
    """
    inputs = one_sample(network, device)
    counter = flop_counter()
    with evaluating(network):
        with counter, _Attention(kernels) as ordinary:
            network(*inputs)
        attention = _both(ordinary.text, lambda: network(*inputs), kernels)
    root = f"{type(network).__name__}."
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return Cost(
        parameters=count(network),
        macs=counter.get_total_flops() // 2,
        macs_of={name.removeprefix(root): value // 2 for name, value in flops.items()},
        attention=attention,
    )


def _both(ordinary: str, run: Callable[[], object], kernels: torch.device) -> str:
    """The kernels of an ordinary pass, and of one in forward mode where they are others."""
    if not ordinary:
        return "-"
    try:
        with forward_ad.dual_level(), _Attention(kernels) as seen:
            run()
    except ConfigError:  # of a network whose attention knows no forward mode
        return f"{ordinary}/refused"
    return ordinary if seen.text == ordinary else f"{ordinary}/{seen.text}"


class _Attention(TorchFunctionMode):
    """Sees which kernels attention takes while it is entered."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._seen: set[str] = set()

    @property
    def text(self) -> str:
        return "+".join(sorted(self._seen))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self._seen.add(self._kernel(args[0]))
        elif func in (torch.softmax, Tensor.softmax, F.softmax):
            self._seen.add("explicit")
        return func(*args, **(kwargs or {}))

    def _kernel(self, q: Tensor) -> str:
        q = torch.empty(1, 1, *q.shape[-2:], device=self._device, dtype=q.dtype)
        return SDPBackend(torch._fused_sdp_choice(q, q, q)).name.removesuffix("_ATTENTION").lower()
