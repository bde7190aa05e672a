"""Samples from seeds: times, independence of the batch, agreement with training's own sampling."""

import dataclasses
import math

import pytest
import torch

from evaluation_fakes import DATA, GaussianMap, TwoTimes
from fastflow.errors import ConfigError
from fastflow.generate import default_times, generate, step_times
from fastflow.model import Model
from fastflow.network import Network
from fastflow.path import VE, Linear
from fastflow.times import karras_grid
from tiny import digits, toy, train


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnPath(GaussianMap):
    landing: float = 0.0
    linear: bool = False

    @property
    def path(self):
        return Linear() if self.linear else VE()

    @property
    def s_min(self):
        return self.landing


def test_default_times_are_a_karras_grid_without_its_last_point():
    method = GaussianMap()
    grid = karras_grid(5, 0.002, 80.0, rho=7.0).flip(0).tolist()
    assert default_times(method, 4) == pytest.approx(grid[:4])
    assert default_times(method, 1) == (80.0,)
    assert default_times(method, 4)[0] == 80.0


@pytest.mark.parametrize("method", [OnPath(landing=0.5), OnPath(linear=True), GaussianMap()])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_default_times_are_usable_on_every_path(method, steps):
    times = default_times(method, steps)
    assert step_times(method, steps, times[1:]) == times
    assert len(times) == steps
    assert all(math.isfinite(t) for t in times)


@pytest.mark.parametrize(
    ("steps", "between"),
    [
        (0, None),
        (-1, None),
        (1, (0.5,)),
        (2, ()),
        (2, (80.0,)),
        (2, (100.0,)),
        (2, (0.0,)),
        (2, (-1.0,)),
        (2, (float("nan"),)),
        (3, (0.2, 0.8)),
        (3, (0.8, 0.8)),
    ],
)
def test_steps_and_times_that_do_not_fit(steps, between):
    with pytest.raises(ConfigError, match="accepted") as caught:
        step_times(GaussianMap(), steps, between)
    assert str(between if between is not None else steps) in str(caught.value)


def test_given_times_start_at_t_max():
    assert step_times(GaussianMap(), 3, (5.0, 0.8)) == (80.0, 5.0, 0.8)


@pytest.mark.parametrize("method", [GaussianMap(), TwoTimes()])
def test_the_exact_map_gives_samples_of_the_data(method):
    """However many steps: mean and covariance of the samples are those of the data."""
    for steps in (1, 3):
        times = step_times(method, steps)
        x = generate(method, Network(), range(4000), (2,), times)
        assert x.dtype == torch.float32
        mean = DATA.oracle.mean.float()
        torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.03)
        torch.testing.assert_close(x.T.cov(), DATA.oracle.cov.float(), rtol=0.1, atol=0.01)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("digits") / "run"
    return train(digits(steps=3), run_dir), run_dir


def test_a_sample_depends_on_its_seed_and_class_alone(run):
    """To the rounding of a batched computation; the noise it starts from is equal to the bit."""
    model = Model.load(run[1])
    torch.manual_seed(0)
    for parameter in model.network.parameters():  # after three steps they say little
        parameter.add_(0.1 * torch.randn_like(parameter))
    classes = torch.eye(10)[[3, 1, 4, 1, 5, 9]]
    seeds = [5, 17, 2**40, 3, 0, 8]
    for steps in (1, 3):
        together = model.sample(seeds, steps, cond=classes)
        for rows in ([0], [4], [2, 5], [5, 2, 1], [0, 0]):
            some = model.sample([seeds[i] for i in rows], steps, cond=classes[rows])
            torch.testing.assert_close(some, together[rows], rtol=1e-4, atol=1e-5)
        assert torch.equal(model.sample(seeds, steps, cond=classes), together)
        others = (model.sample(seeds, steps), model.sample(seeds[::-1], steps, cond=classes))
        for other in others:
            assert (other - together).flatten(1).abs().amax(1).min() > 0.01


def test_sampling_takes_nothing_from_the_global_generator(run):
    model = Model.load(run[1])
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    model.sample(range(2), steps=2)
    assert torch.equal(torch.rand(3), expected)


def test_a_loaded_model_samples_as_training_did(run):
    state, run_dir = run
    student = state.networks.student
    for name in state.emas:
        model = Model.load(run_dir, name)
        times = model.times(2)
        with state.emas[name].swapped_into(student):
            live = generate(state.method, student, range(4), student.sample_shape, times)
        assert torch.equal(model.sample(range(4), 2), live)
    assert student.training  # left as it was
    live = generate(state.method, student, range(4), student.sample_shape, (80.0,))
    assert torch.equal(Model.load(run_dir, "student").sample(range(4)), live)
    assert not torch.equal(Model.load(run_dir).sample(range(4)), live)


def test_times_come_from_the_experiment_unless_given(tmp_path):
    evaluation = dataclasses.replace(toy().evaluation, times={2: (0.7,)})
    train(toy(steps=1, evaluation=evaluation), tmp_path / "run")
    model = Model.load(tmp_path / "run")
    assert model.times(2) == (80.0, 0.7)
    assert model.times(2, (0.9,)) == (80.0, 0.9)
    assert model.times(3) == default_times(model.method, 3)
    assert torch.equal(model.sample(range(2), 2), model.sample(range(2), 2, (0.7,)))
    assert not torch.equal(model.sample(range(2), 2), model.sample(range(2), 2, (0.9,)))
    with pytest.raises(ConfigError, match="1 decreasing values between 80 and 0"):
        model.sample(range(2), 2, (0.9, 0.5))
    assert (model.nfe(2), model.shape, model.cond_dim) == (2, (2,), 0)
