"""What the network is made of, and what it costs."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from fastflow.callback import Observer
from fastflow.distributed import reshard
from fastflow.errors import ConfigError, MissingPackageError
from fastflow.network import Network
from fastflow.state import TrainState


class ModelSummary(Observer):
    """Prints parameters and multiply-accumulates by module, also into `model.txt`.

    Args:
        depth: how deep modules are listed.
        counter: "torch" counts convolutions and matrix products, attention included, with
            torch's FlopCounterMode; "fvcore" prints fvcore's table, which misses fused attention.

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
        was_training = network.training
        network.eval()
        try:
            with torch.no_grad():
                table = self._table(network, _inputs(network, state.world.device), self._depth)
        finally:
            network.train(was_training)
            reshard(network)
        if state.world.is_main:
            print(table)
            (state.run_dir / "model.txt").write_text(table + "\n")


Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _inputs(network: Network, device: torch.device) -> Inputs:
    """One sample at t = 1."""
    x = torch.zeros(1, *network.sample_shape, device=device)
    t = torch.ones(1, device=device)
    s = t / 2 if network.two_times else None
    cond = torch.zeros(1, network.cond_dim, device=device) if network.cond_dim else None
    return x, t, s, cond


def _torch_table(network: Network, inputs: Inputs, depth: int) -> str:
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        network(*inputs)
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(network).__name__
    total = sum(p.numel() for p in network.parameters())
    rows = [(root, total, flops.get("Global", 0))]
    for name, module in network.named_modules():
        level = name.count(".") + 1
        if name and level <= depth and any(True for _ in module.parameters()):
            label = f"{'  ' * level}{name.rpartition('.')[2]} ({type(module).__name__})"
            rows.append((label, _count(module), flops.get(f"{root}.{name}", 0)))
    width = max(len(label) for label, _, _ in rows)
    lines = [f"{'module':<{width}}  {'parameters':>12}  {'share':>6}  {'GMACs':>8}"]
    lines += [
        f"{label:<{width}}  {count:>12,}  {count / max(total, 1):>6.1%}  {cost / 2e9:>8.4f}"
        for label, count, cost in rows
    ]
    return "\n".join([*lines, "GMACs: 1e9 multiply-accumulates of one forward pass of one sample"])


def _fvcore_table(network: Network, inputs: Inputs, depth: int) -> str:
    from fvcore.nn import FlopCountAnalysis, flop_count_table

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing; what is not counted is said in the docs
        analysis = FlopCountAnalysis(network, inputs).unsupported_ops_warnings(False)
        analysis = analysis.uncalled_modules_warnings(False)
        return str(flop_count_table(analysis, max_depth=depth))


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
