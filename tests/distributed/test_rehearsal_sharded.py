"""A step rehearsed for one of two processes holds and sends what a real one of two does."""

from __future__ import annotations

import pytest

from fastflow.counting import Traffic
from fastflow.experiment import Parallel
from fastflow.rehearsal import rehearse
from processes import Processes
from real_step import counted
from tiny import digits

SAMPLES = 16


@pytest.mark.parametrize(
    "parallel",
    [
        Parallel(shard=2),
        pytest.param(Parallel(shard=1), marks=pytest.mark.dist),
        pytest.param(Parallel(shard=2, checkpoint=True), marks=pytest.mark.dist),
    ],
)
def test_a_rehearsed_step_holds_and_sends_what_a_real_one_does(
    parallel: Parallel, two: Processes
) -> None:
    experiment = digits(batch_size=2 * SAMPLES, parallel=parallel)
    real, _ = two.run(counted, experiment, SAMPLES)
    traffic = Traffic()
    step = rehearse(experiment, 2, [SAMPLES], traffic)
    for item in ("parameters", "gradients", "emas", "companions"):
        assert getattr(step, item) == getattr(real, item), item
    assert step.optimizer == pytest.approx(real.optimizer, rel=0.05)  # the steps' own numbers
    assert step.working(SAMPLES) == pytest.approx(real.working, rel=0.05)
    assert real.two <= 1.02 * (step.working(SAMPLES) + step.accumulated) <= 1.15 * real.two
    assert dict(traffic.sent) == real.sent
