"""Where in time the loss comes from."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastflow.callback import Observer
from fastflow.errors import ConfigError
from fastflow.logging import JsonLines
from fastflow.state import TrainState


class LossByTime(Observer):
    """Appends the mean weighted loss of each bucket of start times to `loss_by_time.jsonl`.

    Each line: step, edges, and per bucket the mean loss (null without samples) and the count;
    the first bucket lies below the first edge, the last one above the last edge. Sums are kept
    on the device and read only for a line.

    Args:
        every: steps between lines.
        edges: increasing times between the buckets; None takes seven that divide the path's
            range, at most from 0.002 to 80, evenly in the logarithm of its noise-to-signal ratio.

    Raises:
        ConfigError: `every` below 1, or edges that do not increase.
    """

    def __init__(self, every: int = 500, edges: tuple[float, ...] | None = None) -> None:
        if every < 1:
            raise ConfigError(f"LossByTime.every: {every} given, 1 or more accepted")
        if edges is not None and not (edges and all(a < b for a, b in itertools.pairwise(edges))):
            raise ConfigError(f"LossByTime.edges: {edges} given, increasing times accepted")
        self._every = every
        self._given = edges
        self._edges = torch.empty(0)
        self._sums = torch.empty(0)

    def on_start(self, state: TrainState) -> None:
        edges = self._given if self._given is not None else _even_edges(state)
        self._edges = torch.tensor(edges, dtype=torch.float64, device=state.world.device)
        self._sums = torch.zeros(2, len(edges) + 1, device=state.world.device)
        if state.world.is_main:
            _file(state).rewind(state.step)

    def after_step(self, state: TrainState) -> None:
        assert state.loss is not None
        bucket = torch.bucketize(state.loss.times.double(), self._edges)
        inside = bucket[:, None] == torch.arange(len(self._edges) + 1, device=bucket.device)
        loss = state.loss.per_sample.float()[:, None]
        # `where` and not a product: one infinite loss must not spoil the other buckets.
        self._sums[0] += torch.where(inside, loss, 0.0).sum(0)
        self._sums[1] += inside.sum(0)
        if state.step % self._every == 0:
            self._write(state)

    def _write(self, state: TrainState) -> None:
        sums, counts = state.world.sum(self._sums).tolist()
        self._sums.zero_()
        if state.world.is_main:
            means = [s / n if n else None for s, n in zip(sums, counts, strict=True)]
            record = {"step": state.step, "edges": self._edges.tolist(), "loss": means}
            _file(state).write(record | {"count": [int(n) for n in counts]})


def _even_edges(state: TrainState) -> list[float]:
    path = state.method.path
    bounds: Tensor = path.nsr(torch.tensor([path.t_min, path.t_max], dtype=torch.float64))
    # From pure data to pure noise there would be no even division.
    low, high = bounds.clamp(0.002, 80.0).log().tolist()
    inner = torch.linspace(low, high, 9, dtype=torch.float64)[1:-1].exp()
    edges: list[float] = path.t_of_nsr(inner).tolist()
    return edges


def _file(state: TrainState) -> JsonLines:
    return JsonLines(state.run_dir / "loss_by_time.jsonl")
