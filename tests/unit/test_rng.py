"""Randomness is a function of names and indices, and never leaks between uses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from fastflow.rng import Draws, PairedRNG, SampleNoise, fold_in, isolated_rng, seed_step


def test_fold_in_is_the_same_in_every_process():
    code = "from fastflow.rng import fold_in; print(fold_in(7, 'noise', 3))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == fold_in(7, "noise", 3) == 8609955986570220963


def test_fold_in_tells_its_arguments_apart():
    keys = [(0,), (1,), (-1,), (0, 1, 2), (0, 12), (0, "12"), (0, "1", "2"), (0, "a", "bc")]
    keys += [(0, "ab", "c"), (0, "i1;"), (0, 1), (2**70, 1)]
    values = {fold_in(*key) for key in keys}
    assert len(values) == len(keys)
    assert all(0 <= value < 2**63 for value in values)


def all_draws(draws):
    return [
        draws.normal("noise", (3, 4)),
        draws.normal("noise", (2,), torch.float64),
        draws.uniform("time"),
        draws.uniform("crop", (2,), torch.float32),
        draws.integers("label", 10),
    ]


def test_a_row_depends_on_its_own_index_only():
    whole = Draws(seed=1, step=2, indices=(4, 5, 6, 7))
    shuffled = Draws(seed=1, step=2, indices=torch.tensor([7, 4]))
    for a, b in zip(all_draws(whole), all_draws(shuffled), strict=True):
        assert torch.equal(a[[3, 0]], b)
    for a, b in zip(all_draws(whole), all_draws(whole.select(slice(1, 3))), strict=True):
        assert torch.equal(a[1:3], b)


@pytest.mark.parametrize("other", [Draws(1, 2, (0,)), Draws(2, 1, (0,)), Draws(1, 1, (1,))])
def test_seed_step_and_index_all_matter(other):
    here = Draws(1, 1, (0,))
    assert not torch.equal(here.normal("a", (8,)), other.normal("a", (8,)))
    assert not torch.equal(here.uniform("a"), other.uniform("a"))


def test_names_are_independent_streams_and_repeat():
    draws = Draws(0, 0, tuple(range(4)))
    first = draws.normal("x", (5,))
    assert torch.equal(first, draws.normal("x", (5,)))
    assert not torch.equal(first, draws.normal("eps", (5,)))


def test_draws_follow_their_laws():
    draws = Draws(0, 0, tuple(range(4000)))
    normal, uniform = draws.normal("n", (2,), torch.float64), draws.uniform("u", (2,))
    assert normal.dtype == uniform.dtype == torch.float64
    assert draws.normal("n", (2,)).dtype == torch.float32
    assert abs(normal.mean()) < 0.03
    assert abs(normal.std() - 1) < 0.03
    assert abs(uniform.mean() - 0.5) < 0.01
    assert abs(uniform.var() - 1 / 12) < 0.004
    # Neighbouring indices must not give correlated rows.
    assert abs((uniform[1:, 0] - 0.5).mul(uniform[:-1, 0] - 0.5).mean()) < 0.005
    counts = torch.bincount(draws.integers("k", 4), minlength=4)
    assert counts.shape == (4,)
    assert (counts - 1000).abs().max() < 120


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_uniform_never_reaches_its_ends(dtype, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda row, generator: row.zero_())
    low = Draws(0, 0, (0,)).uniform("u", dtype=dtype)
    assert 0 < low < 1e-7
    assert torch.isfinite(torch.special.ndtri(low)).all()
    largest = 1 - torch.finfo(dtype).eps / 2
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda row, generator: row.fill_(largest))
    assert Draws(0, 0, (0,)).uniform("u", dtype=dtype) < 1


@pytest.mark.parametrize(("share", "rows"), [(0.0, 0), (0.25, 7), (0.29, 8), (0.99, 29), (1.0, 30)])
def test_a_share_is_exact_in_every_step(share, rows):
    for step in range(20):
        draws = Draws(seed=3, step=step, indices=tuple(range(30)), total=30)
        assert draws.rows_in(share) == rows == int(draws.share("edge", share).sum())


def test_a_share_does_not_depend_on_how_the_batch_is_divided():
    whole = Draws(1, 2, tuple(range(30)), total=30)
    chosen = whole.share("edge", 0.3)
    parts = [whole.select(slice(i, i + 7)).share("edge", 0.3) for i in range(0, 30, 7)]
    assert torch.equal(torch.cat(parts), chosen)
    order = torch.randperm(30)
    shuffled = Draws(1, 2, order, total=30)
    assert torch.equal(shuffled.share("edge", 0.3), chosen[order])
    assert torch.equal(whole.share("edge", 0.3), chosen)
    # A larger share of the same name contains it.
    assert bool(whole.share("edge", 0.5)[chosen].all())


def test_every_row_is_chosen_equally_often():
    """Counts over 2000 steps, each Binomial(2000, 1/4), and of neighbours together."""
    masks = torch.stack(
        [Draws(0, step, tuple(range(16)), total=16).share("edge", 0.25) for step in range(2000)]
    ).double()
    assert ((masks.sum(0) - 500).abs() < 4.5 * (2000 * 0.25 * 0.75) ** 0.5).all()
    together = (masks[:, 1:] * masks[:, :-1]).sum(0)
    p = 0.25 * 3 / 15
    assert ((together - 2000 * p).abs() < 4.5 * (2000 * p * (1 - p)) ** 0.5).all()


@pytest.mark.parametrize("other", [Draws(1, 2, (0,)), Draws(2, 1, (0,))])
def test_seed_step_and_name_of_a_share_matter(other):
    rows = tuple(range(64))
    here, there = Draws(1, 1, rows, total=64), Draws(other.seed, other.step, rows, total=64)
    assert not torch.equal(here.share("edge", 0.5), there.share("edge", 0.5))
    assert not torch.equal(here.share("edge", 0.5), here.share("equal", 0.5))


def test_a_share_needs_the_size_of_the_global_batch():
    with pytest.raises(ValueError, match="total: 0 given"):
        Draws(0, 0, (0, 1)).share("edge", 0.5)
    with pytest.raises(ValueError, match="total: 0 given"):
        Draws(0, 0, (0, 1)).rows_in(0.5)


def test_draws_on_the_cpu_are_the_same_numbers():
    away = Draws(1, 2, (3, 4), device="meta", total=8)
    here = away.on_cpu()
    assert here.device == "cpu"
    assert torch.equal(here.uniform("t"), Draws(1, 2, (3, 4)).uniform("t"))
    assert torch.equal(here.share("edge", 0.5), Draws(1, 2, (3, 4), total=8).share("edge", 0.5))
    assert away.move(torch.ones(2)).device.type == "meta"


def test_draws_leave_the_global_stream_alone():
    before = torch.get_rng_state()
    all_draws(Draws(0, 0, (0, 1)))
    Draws(0, 0, (0, 1), total=4).share("edge", 0.5)
    SampleNoise([1, 2]).normal((3,))
    assert torch.equal(before, torch.get_rng_state())


def test_sample_noise_does_not_depend_on_the_batch():
    many, one = SampleNoise(range(5)), SampleNoise([3])
    for shape in [(2, 3), (4,), (2, 3)]:
        assert torch.equal(many.normal(shape)[3], one.normal(shape)[0])
    assert many.integers(1000)[3] == one.integers(1000)[0]
    assert many.normal((2,)).dtype == torch.float64
    assert many.size == 5


def test_sample_noise_goes_on():
    noise = SampleNoise([0])
    assert not torch.equal(noise.normal((4,)), noise.normal((4,)))


class TestPairedRNG:
    net = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 3), nn.Dropout(0.5))
    x = torch.linspace(-1, 1, 24).reshape(4, 6)

    def test_both_passes_draw_the_same_masks(self):
        with isolated_rng(0, "cpu"):
            pair = PairedRNG.snapshot("cpu")
            online = self.net(self.x)
            with pair.replay(), torch.no_grad():
                target = self.net(self.x)
            assert torch.equal(online, target)
            assert not torch.equal(online, self.net(self.x))

    def test_the_stream_goes_on_as_after_one_pass(self):
        with isolated_rng(0, "cpu"):
            self.net(self.x)
            expected = torch.rand(5)
        with isolated_rng(0, "cpu"):
            pair = PairedRNG.snapshot("cpu")
            self.net(self.x)
            with pair.replay():
                self.net(self.x)
                torch.rand(100)
            assert torch.equal(torch.rand(5), expected)

    def test_the_stream_is_restored_after_an_error(self):
        with isolated_rng(0, "cpu"):
            pair = PairedRNG.snapshot("cpu")
            torch.rand(3)
            before = torch.get_rng_state()
            with pytest.raises(ZeroDivisionError), pair.replay():
                _ = torch.rand(9)[0] / (1 // 0)
            assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.gpu
    def test_masks_are_shared_on_a_gpu_too(self):
        device = torch.device("cuda")
        dropout = nn.Dropout(0.5)
        ones = torch.ones(64, 64, device=device)
        with isolated_rng(0, device):
            dropout(ones)
            expected = torch.rand(5, device=device)
        with isolated_rng(0, device):
            pair = PairedRNG.snapshot(device)
            online = dropout(ones)
            with pair.replay():
                target = dropout(ones)
            assert torch.equal(online, target)
            assert torch.equal(torch.rand(5, device=device), expected)


@pytest.mark.gpu
def test_times_are_equal_on_all_devices():
    here, there = Draws(0, 0, (3, 9)), Draws(0, 0, (3, 9), "cuda")
    assert there.uniform("t").is_cuda
    assert torch.equal(here.uniform("t"), there.uniform("t").cpu())
    assert torch.equal(here.integers("k", 99), there.integers("k", 99).cpu())
    assert torch.equal(there.on_cpu().uniform("t"), here.uniform("t"))
    assert torch.equal(there.normal("n", (4,))[1], there.select(slice(1, 2)).normal("n", (4,))[0])


def test_isolated_rng_is_reproducible_and_leaves_no_trace():
    before = torch.get_rng_state()
    with isolated_rng(5, "cpu"):
        first = torch.rand(4)
    with isolated_rng(5, "cpu"):
        assert torch.equal(torch.rand(4), first)
    with isolated_rng(6, "cpu"):
        assert not torch.equal(torch.rand(4), first)
    assert torch.equal(before, torch.get_rng_state())


def test_seed_step_names_the_stream_of_a_step_and_rank():
    with isolated_rng(0, "cpu"):
        seen = set()
        for key in [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]:
            seed_step(*key)
            seen.add(torch.rand(1).item())
        assert len(seen) == 4
        seed_step(0, 1, 0)
        assert torch.rand(1).item() in seen
