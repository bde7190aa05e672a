"""What the network is made of, what it costs, and which kernels its attention takes."""

from __future__ import annotations

import warnings
from typing import Literal

import torch

from fastflow.callback import Observer
from fastflow.distributed import reshard
from fastflow.errors import ConfigError, MissingPackageError
from fastflow.measure import count, evaluating, measure, one_sample
from fastflow.network import Network
from fastflow.state import TrainState


class ModelSummary(Observer):
    """Prints parameters and multiply-accumulates by module, also into `model.txt`.

    Args:
        depth: how deep modules are listed.
        counter: "torch" counts convolutions and matrix products, attention included, with
            torch's FlopCounterMode, and says how attention is computed; "fvcore" prints fvcore's
            table, which misses fused attention.

    Raises:
        ConfigError: `depth` below 1.
        MissingPackageError: (when a run is set up) fvcore is not installed.
    """

    def __init__(self, depth: int = 2, counter: Literal["torch", "fvcore"] = "torch") -> None:
        if depth < 1:
            raise ConfigError(f"ModelSummary.depth: {depth} given, 1 or more accepted")
        self._depth = depth
        self._table = {"torch": _torch_table, "fvcore": _fvcore_table}[counter]
        self._fvcore = counter == "fvcore"

    def setup(self, state: TrainState) -> None:
        if self._fvcore:
            try:
                import fvcore  # noqa: F401
            except ImportError:
                raise MissingPackageError("fvcore", "ModelSummary", "flops") from None

    def on_start(self, state: TrainState) -> None:
        """Every process looks, for a sharded network needs all of them; one prints."""
        network = state.networks.student
        try:
            table = self._table(network, state.world.device, self._depth)
        finally:
            reshard(network)
        if state.world.is_main:
            print(table)
            (state.run_dir / "model.txt").write_text(table + "\n")


def _torch_table(network: Network, device: torch.device, depth: int) -> str:
    cost = measure(network, device, kernels=device)
    rows = [(type(network).__name__, cost.parameters, cost.macs)]
    for name, module in network.named_modules():
        level = name.count(".") + 1
        if name and level <= depth and any(True for _ in module.parameters()):
            label = f"{'  ' * level}{name.rpartition('.')[2]} ({type(module).__name__})"
            rows.append((label, count(module), cost.macs_of.get(name, 0)))
    width = max(len(label) for label, _, _ in rows)
    lines = [f"{'module':<{width}}  {'parameters':>12}  {'share':>6}  {'GMACs':>8}"]
    lines += [
        f"{label:<{width}}  {number:>12,}  {number / max(cost.parameters, 1):>6.1%}  "
        f"{macs / 1e9:>8.4f}"
        for label, number, macs in rows
    ]
    lines.append("GMACs: 1e9 multiply-accumulates of one forward pass of one sample")
    if cost.attention != "-":
        ordinary, _, forward_mode = cost.attention.partition("/")
        rest = f"; {forward_mode} in forward-mode differentiation" if forward_mode else ""
        lines.append(f"attention: {ordinary} on {device.type}{rest}")
    return "\n".join(lines)


def _fvcore_table(network: Network, device: torch.device, depth: int) -> str:
    from fvcore.nn import FlopCountAnalysis, flop_count_table

    with warnings.catch_warnings(), evaluating(network):
        warnings.simplefilter("ignore")  # of tracing; what is not counted is said in the docs
        analysis = FlopCountAnalysis(network, one_sample(network, device))
        analysis = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return str(flop_count_table(analysis, max_depth=depth))
