"""A run in memory for tests of callbacks: a tiny network and the trainer's order of hooks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fastflow.callback import Callback, Driver, Observer
from fastflow.distributed import World
from fastflow.method import FlowMapMethod, Loss, Networks
from fastflow.network import Network
from fastflow.path import VE
from fastflow.path import Path as Interpolant
from fastflow.rng import seed_step
from fastflow.state import TrainState


class Tiny(Network):
    """A network with a parameter, a persistent and a non-persistent buffer, and dropout."""

    def __init__(self, shape: tuple[int, ...] = (3,), cond_dim: int = 0) -> None:
        super().__init__()
        size = torch.Size(shape).numel()
        self.sample_shape = shape
        self.cond_dim = cond_dim
        self.first = nn.Linear(size, 4)
        self.second = nn.Linear(4, size)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fixed", torch.ones(2), persistent=False)

    def forward(self, x, t, s=None, cond=None, augment=None):
        hidden = self.drop(torch.tanh(self.first(x.flatten(1)) / (1 + t[:, None])))
        return self.second(hidden).reshape(x.shape).clone()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoise(FlowMapMethod):
    """Jumps straight to what the network predicts."""

    @property
    def path(self) -> Interpolant:
        return VE()

    def loss(self, nets, batch, now):
        raise NotImplementedError

    def flow_map(self, net, x, t, s, cond=None) -> Tensor:
        return net(x, t.float(), cond=cond)


def make_state(run_dir: Path, *, shape: tuple[int, ...] = (3,), steps: int = 20, **changes):
    """A state with an AdamW optimizer; `changes` go into the experiment."""
    torch.manual_seed(0)
    student = Tiny(shape, changes.pop("cond_dim", 0))
    experiment = SimpleNamespace(
        name="tiny",
        steps=steps,
        batch_size=8,
        precision="fp32",
        evaluation=SimpleNamespace(times={2: (1.0,)}),
        **changes,
    )
    return TrainState(
        experiment=experiment,
        method=Denoise(),
        world=World(),
        networks=Networks(student),
        optimizer=torch.optim.AdamW(student.parameters(), lr=1e-2),
        run_dir=run_dir,
        saver=SimpleNamespace(save=lambda keep: None, last_saved=lambda: None),
    )


def begin(state: TrainState, callbacks: list[Callback]) -> None:
    for callback in callbacks:
        callback.setup(state)
    for callback in callbacks:
        callback.on_start(state)


def step(state: TrainState, callbacks: list[Callback], poison=None) -> None:
    """One step in the trainer's order; `poison(state)` may spoil the gradients."""
    drivers = [c for c in callbacks if isinstance(c, Driver)]
    student = state.networks.student
    seed_step(0, state.step, 0)
    state.curriculum.clear()
    for driver in drivers:
        driver.before_step(state)
    state.optimizer.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(state.step)
    x = torch.randn(8, *student.sample_shape, generator=generator)
    times = torch.rand(8, generator=generator) * 10 + 0.1
    per_sample = (student(x, times) - x).flatten(1).square().mean(1)
    per_sample.mean().backward()
    state.loss = Loss(per_sample.detach(), times)
    state.metrics = {"loss": per_sample.detach().mean(), "lr": 1e-2}
    if poison is not None:
        poison(state)
    for driver in drivers:
        driver.before_update(state)
    state.optimizer.step()
    state.step += 1
    state.seconds += 0.25
    for driver in drivers:
        driver.after_update(state)
    for callback in callbacks:
        if isinstance(callback, Observer):
            callback.after_step(state)


def finish(state: TrainState, callbacks: list[Callback]) -> None:
    for callback in callbacks:
        callback.on_end(state)


def run(state: TrainState, callbacks: list[Callback], steps: int) -> None:
    """Begin, train until `steps` steps are done, and end."""
    begin(state, callbacks)
    while state.step < steps:
        step(state, callbacks)
    finish(state, callbacks)
