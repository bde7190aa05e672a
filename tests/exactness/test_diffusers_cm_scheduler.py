"""Few-step sampling as diffusers' CMStochasticIterativeScheduler does it, from our parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastflow.path import VE, scaled
from fastflow.precond import EDMConsistency, EDMScaling
from fastflow.sampling import clamped, multistep
from fastflow.times import karras_grid
from reference_data import reference

REF = reference("diffusers_cm_scheduler")
GRID = karras_grid(40).flip(0)  # theirs falls
S_MIN = 0.002


def times(steps: int) -> Tensor:
    """Their `set_timesteps`: every (40 // steps)-th point of the grid from the top."""
    return GRID[torch.arange(steps) * (40 // steps)]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 40])
def test_times_are_points_of_the_karras_grid(steps):
    check_times(f"n{steps}", times(steps))


def test_chosen_points():
    """[22, 0] counts from the clean end, as CM's two-step times on ImageNet-64 do."""
    chosen = GRID[[0, 22]]
    check_times("custom", chosen)
    assert chosen[1].item() == pytest.approx(1.3824, abs=5e-5)


def check_times(case: str, sigmas: Tensor) -> None:
    """Their sigmas end at 0.002; the network reads 250 ln sigma, 1000 times EDM's c_noise."""
    REF.check(f"{case}.sigmas", torch.cat([sigmas, sigmas.new_tensor([S_MIN])]))
    REF.check(f"{case}.timesteps", 1000 * EDMScaling()(sigmas).c_noise)


def test_boundary_scalings():
    sigma = REF["sigma"]
    a, b = EDMConsistency().coefficients(sigma, torch.full_like(sigma, S_MIN))
    REF.check("boundary.c_skip", a)
    REF.check("boundary.c_out", b)


@pytest.mark.parametrize(
    ("case", "sigmas"), [("step1", times(1)), ("step4", times(4)), ("stepcustom", GRID[[0, 22]])]
)
def test_steps(case, sigmas):
    """Clamped jumps with noise of std sqrt(t^2 - 0.002^2) between: `multistep`."""
    raws = iter(REF[f"{case}.model_output"])
    noises = iter(REF[f"{case}.noise"])
    seen, landed = [], []

    def flow_map(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        assert (s == S_MIN).all()
        seen.append(scaled(EDMScaling()(t).c_in, x))
        out = clamped(EDMConsistency().jump)(x, next(raws), t, s)
        landed.append(out)
        return out

    start = REF[f"{case}.sample"]
    out = multistep(flow_map, start, sigmas.tolist(), noises.__next__, VE(), S_MIN)
    REF.check(f"{case}.scaled_input", torch.stack(seen))
    # What they hand on is already noised for the next step.
    handed = [x / EDMScaling()(t).c_in for x, t in zip(seen[1:], sigmas[1:], strict=True)]
    previous = torch.stack([*(x.float() for x in handed), out])
    torch.testing.assert_close(
        previous, REF[f"{case}.prev_sample"], rtol=1e-4, atol=1e-4 if len(seen) > 1 else 1e-5
    )
    assert out.abs().max() <= 1


def test_cases_cover_what_they_should():
    assert {k.split(".")[0] for k in REF.keys("n")} == {"n1", "n2", "n3", "n4", "n10", "n40"}
    assert {k.split(".")[0] for k in REF.keys("step")} == {"step1", "step4", "stepcustom"}
