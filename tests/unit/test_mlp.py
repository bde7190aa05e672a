"""The toy network starts at zero, knows its noise level and learns a closed-form denoiser."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.wrappers import EDMDenoiser
from networks.mlp import ToyMLP, noise_features

CENTRES = torch.tensor([[0.6, 0.0], [-0.3, 0.5], [-0.3, -0.5]])
SPREAD = 0.1


def true_denoiser(x: Tensor, t: Tensor) -> Tensor:
    """E[x0 | x_t] for three equal Gaussians."""
    variance = SPREAD**2 + t[:, None] ** 2
    distance = (x[:, None, :] - CENTRES).square().sum(-1)
    weights = torch.softmax(-distance / (2 * variance), dim=1)
    return (SPREAD**2 * x + t[:, None] ** 2 * (weights @ CENTRES)) / variance


def test_initial_output_is_zero() -> None:
    net = ToyMLP(data_dim=3, cond_dim=2)
    out = net(torch.randn(5, 3), torch.randn(5), torch.ones(5, 2))
    assert out.shape == (5, 3)
    assert not out.any()
    assert net.sample_shape == (3,)
    assert len(net.shard_units()) == 4


def test_noise_features_are_smooth() -> None:
    c = torch.linspace(-1.6, 1.1, 64, dtype=torch.float64)
    features, slope = torch.func.jvp(noise_features, (c,), (torch.ones_like(c),))
    assert features.shape == (64, 16)
    assert float(slope.abs().max()) <= 4.0
    assert torch.linalg.matrix_rank(features) >= 8


def test_learns_the_denoiser_of_a_mixture() -> None:
    torch.manual_seed(0)
    net = EDMDenoiser(ToyMLP(width=64, depth=2))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)

    def draw(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        x0 = CENTRES[torch.randint(3, (rows,))] + SPREAD * torch.randn(rows, 2)
        t = torch.exp(torch.randn(rows) - 1.0)
        return x0, x0 + t[:, None] * torch.randn(rows, 2), t

    def error() -> float:
        with torch.no_grad():
            _, x, t = draw(4096)
            c_out = 0.5 * t / (t**2 + 0.25).sqrt()
            gap = (net(x, t) - true_denoiser(x, t)) / c_out[:, None]
            return float(gap.square().mean())

    before = error()
    for _ in range(300):
        x0, x, t = draw(256)
        weight = (t**2 + 0.25) / (0.5 * t) ** 2
        loss = (weight[:, None] * (net(x, t) - x0).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error() < 0.1 * before
