"""Laws of t against the official samplers' statistics and exact quantiles; grids; index laws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from fastflow.errors import ConfigError
from fastflow.rng import Draws
from fastflow.times import (
    LogitNormal,
    LogNormal,
    LogNormalIndex,
    PolynomialIndex,
    Shifted,
    TimeLaw,
    TruncatedLogNormal,
    TruncatedLogStudentT,
    Uniform,
    UniformIndex,
    karras_grid,
)
from reference_data import reference

LAWS: dict[str, TimeLaw] = {
    "lognormal": LogNormal(mean=-1.1, std=2.0),
    "truncated": TruncatedLogNormal(mean=-1.1, std=2.0),
    "student": TruncatedLogStudentT(),
    "uniform": Uniform(),
    "logit": LogitNormal(mean=-0.4, std=1.0),
    "shifted": Shifted(shift=5.0),
    "polynomial": PolynomialIndex(),
}
every_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)

# Which law, with which options, reproduces each stored FastGen sampler.
FASTGEN: dict[str, TimeLaw] = {
    "0": TruncatedLogNormal(mean=-1.1, std=2.0),
    "1": TruncatedLogNormal(mean=-1.0, std=1.4),
    "2": TruncatedLogStudentT(df=0.01, loc=0.0, scale=0.2, t_min=1.0),
    "3": Uniform(t_min=0.002, t_max=80.0),
    "4": PolynomialIndex(),
    "5": LogitNormal(mean=-0.6, std=1.6, t_max=0.999),
    "6": Uniform(t_min=0.001, t_max=0.999),
    "7": Shifted(shift=5.0),
    "8": LogitNormal(mean=0.3, std=0.9, t_max=math.pi / 2),
    "9": Uniform(t_max=math.pi / 2),
}


def levels(n: int) -> Tensor:
    """Midpoints of n equal parts of (0, 1)."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


class Levels(Draws):
    """Draws whose uniform numbers are the midpoints."""

    def uniform(self, *_: Any, **__: Any) -> Tensor:
        return levels(self.size)


def midpoints(n: int) -> Draws:
    return Levels(seed=0, step=0, indices=tuple(range(n)))


@pytest.mark.parametrize("case", FASTGEN)
def test_fastgen_samplers(case: str) -> None:
    """500,000 official draws: mean, spread and quantiles within 5 standard errors."""
    stored, law = reference("fastgen_t_samplers").values[case], FASTGEN[case]
    t = law.quantile(levels(200_000))
    lowest, highest = law.quantile(torch.tensor([1e-11, 1 - 1e-11], dtype=torch.float64)).tolist()
    assert lowest <= stored["t"]["min"] * (1 + 1e-12)
    assert stored["t"]["max"] <= highest * (1 + 1e-12)
    for name, values in (("t", t), ("log_t", t.log())):
        if name not in stored:
            continue
        official = stored[name]
        error = official["std"] / math.sqrt(official["n"])
        assert abs(values.mean().item() - official["mean"]) < 5 * error
        kurtosis = ((values - values.mean()) ** 4).mean() / values.var() ** 2
        spread = math.sqrt((kurtosis.item() - 1) / 4) * error
        assert abs(values.std().item() - official["std"]) < 5 * spread
        for level, quantile in zip(official["quantile_levels"], official["quantiles"], strict=True):
            margin = 5 * math.sqrt(level * (1 - level) / official["n"])
            slack = 1e-12 * abs(quantile)
            assert (values < quantile - slack).double().mean().item() <= level + margin
            assert (values <= quantile + slack).double().mean().item() >= level - margin


def test_fastgen_polynomial_ends() -> None:
    t, official = PolynomialIndex().quantile(levels(20_000)), reference("fastgen_t_samplers")
    stored = official.values["4"]["t"]
    assert t.min().item() == pytest.approx(stored["min"], rel=1e-13)
    assert t.max().item() == pytest.approx(stored["max"], rel=1e-13)
    assert len(t.unique()) == 997


def test_shifted_law_keeps_the_official_clamp() -> None:
    t = Shifted(shift=5.0).quantile(levels(100_000))
    assert (t == 0.999).double().mean().item() == pytest.approx(0.004, abs=1e-4)


@every_law
def test_laws_are_increasing_quantiles_in_range(law: TimeLaw) -> None:
    ends = torch.tensor([5e-17, 1 - 2**-53], dtype=torch.float64)
    u = torch.cat([ends[:1], levels(1001), ends[1:]])
    t = law.quantile(u)
    assert t.dtype == torch.float64
    assert torch.isfinite(t).all()
    assert (t.diff() >= 0).all()
    for name, compare in (("t_min", torch.ge), ("t_max", torch.le)):
        if name in vars(law):
            assert compare(t, vars(law)[name]).all()


@every_law
def test_each_time_depends_on_its_own_row_only(law: TimeLaw) -> None:
    together = law(Draws(seed=1, step=2, indices=(0, 1, 2, 3)))
    assert together.shape == (4,)
    assert together.dtype == torch.float64
    alone = torch.cat([law(Draws(seed=1, step=2, indices=(i,))) for i in range(4)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, law(Draws(seed=1, step=2, indices=(0, 1, 2, 3)), "r"))


def test_lognormal_is_not_clamped() -> None:
    t = LogNormal(mean=-1.1, std=2.0).quantile(levels(10_000))
    log_t = t.log()
    assert log_t.mean().item() == pytest.approx(-1.1, abs=1e-6)
    assert log_t.std().item() == pytest.approx(2.0, rel=1e-3)
    assert t.min() < 0.002
    assert t.max() > 80


def test_truncated_lognormal_against_exact_quantiles() -> None:
    """TCM's stage 1 (official code's closed form)."""
    u = torch.tensor([0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99], dtype=torch.float64)
    exact = {
        (-1.1, 2.0): [
            *(-5.43014953233077, -4.298950784835606, -3.6132948865156234, -2.4289689812512103),
            *(-1.0944557139702065, 0.24282878854727263, 1.4379070936751757, 2.139450427116908),
            3.353671130561341,
        ],
        (-0.8, 1.6): [
            *(-4.5016078154813615, -3.426981444819596, -2.848102575516804, -1.8785910267168369),
            *(-0.8004877254815398, 0.27736704981406457, 1.2458913601238815, 1.8232339789125522),
            2.8875784878739994,
        ],
    }
    for (mean, std), expected in exact.items():
        log_t = TruncatedLogNormal(mean=mean, std=std).quantile(u).log()
        assert log_t.tolist() == pytest.approx(expected, abs=1e-12)


def test_truncated_student_t_against_exact_quantiles() -> None:
    """TCM's stage 2 (official code's closed form)."""
    u = torch.tensor([0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99], dtype=torch.float64)
    expected = [
        *(0.0011883696264167645, 0.006026864459295214, 0.012595064512054211, 0.042079744590777055),
        *(0.19979299973283626, 0.925666387715174, 2.3460633599936775, 3.2047660576558408),
        4.115904963168367,
    ]
    log_t = TruncatedLogStudentT().quantile(u).log()
    assert log_t.tolist() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    ("df", "loc", "scale", "t_min"),
    [(0.01, 0.0, 0.2, 0.002), (1.0, -1.0, 0.5, 1.0), (5.0, 0.5, 1.0, 0.01), (300.0, 0.0, 0.1, 0.1)],
)
def test_truncated_student_t_against_scipy(
    df: float, loc: float, scale: float, t_min: float
) -> None:
    u = levels(999)
    t = TruncatedLogStudentT(df=df, loc=loc, scale=scale, t_min=t_min).quantile(u)
    law = stats.t(df, loc=loc, scale=scale)
    low, high = law.cdf(math.log(t_min)), law.cdf(math.log(80.0))
    level = (law.cdf(t.log().numpy()) - low) / (high - low)
    assert abs(level - u.numpy()).max() < 1e-12


@pytest.mark.parametrize("n", [2, 5, 18, 40])
def test_karras_grid_of_openai(n: int) -> None:
    ref = reference("openai_scalings")
    config = ref.config
    grid = karras_grid(n, config["sigma_min"], config["sigma_max"], config["rho"])
    descending = torch.cat([grid.flip(0), grid.new_zeros(1)])
    ref.check(f"karras_{n}.f64", descending)
    ref.check(f"karras_{n}", descending)


def test_karras_grid_of_edm() -> None:
    """The 18 noise levels of EDM's CIFAR-10 sampler."""
    values = """80 57.586 40.786 28.375 19.353 12.910 8.4009 5.3152 3.2568 1.9233 1.0882
    .5853 .2964 .1395 .0599 .0229 .0075280 .002"""
    expected = [float(v) for v in values.split()]
    assert karras_grid(18).flip(0).tolist() == pytest.approx(expected, rel=2e-3)
    assert karras_grid(40).flip(0)[22].item() == pytest.approx(1.3824, abs=5e-5)
    assert karras_grid(201).flip(0)[106].item() == pytest.approx(1.9128, abs=5e-5)


@pytest.mark.parametrize("n", [2, 11, 1281])
def test_karras_grid_ends_are_exact(n: int) -> None:
    grid = karras_grid(n)
    assert grid.dtype == torch.float64
    assert len(grid) == n
    assert (grid[0].item(), grid[-1].item()) == (0.002, 80.0)
    assert grid.diff().min() > 0


def test_discretised_lognormal_of_ict() -> None:
    law = LogNormalIndex(mean=-1.1, std=2.0)
    p = law.probabilities(karras_grid(11))
    assert p.shape == (10,)
    assert p.sum().item() == pytest.approx(1, abs=1e-14)
    assert p[0].item() == pytest.approx(0.0626330, abs=5e-8)
    assert p[9].item() == pytest.approx(0.0039796, abs=5e-8)
    assert p.argmax() == 2
    assert karras_grid(11)[2].item() == pytest.approx(0.085087, abs=5e-7)
    fine = law.probabilities(karras_grid(1281))
    assert fine.argmax() == 329
    assert karras_grid(1281)[329].item() == pytest.approx(0.186089, abs=5e-7)
    # The mass inside the range before it is renormalised.
    z = [(math.log(t) + 1.1) / (2 * math.sqrt(2)) for t in (0.002, 80.0)]
    assert (math.erf(z[1]) - math.erf(z[0])) / 2 == pytest.approx(0.99166, abs=5e-6)


@pytest.mark.parametrize("law", [UniformIndex(), LogNormalIndex()])
@pytest.mark.parametrize("n", [2, 3, 19])
def test_index_laws_follow_their_probabilities(law: UniformIndex | LogNormalIndex, n: int) -> None:
    grid, size = karras_grid(n), 20_000
    index = law(midpoints(size), grid)
    assert index.dtype == torch.int64
    counts = torch.bincount(index, minlength=n - 1)
    assert len(counts) == n - 1
    expected = law.probabilities(grid) * size
    assert (counts - expected).abs().max() <= 1 + 1e-6


def test_uniform_index_is_uniform() -> None:
    p = UniformIndex().probabilities(karras_grid(5))
    assert p.tolist() == [0.25] * 4


def test_the_largest_uniform_number_stays_on_the_grid() -> None:
    class Last(Draws):
        def uniform(self, *_: Any, **__: Any) -> Tensor:
            return torch.tensor([1 - 2**-53], dtype=torch.float64)

    draws = Last(seed=0, step=0, indices=(0,))
    for n in (2, 11, 152, 1281):
        for law in (UniformIndex(), LogNormalIndex()):
            assert law(draws, karras_grid(n)).item() == n - 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: LogNormal(mean=0.0, std=0.0),
        lambda: TruncatedLogNormal(mean=0.0, std=1.0, t_min=0.0),
        lambda: TruncatedLogNormal(mean=0.0, std=1.0, t_min=80.0),
        lambda: TruncatedLogNormal(mean=100.0, std=1.0),
        lambda: TruncatedLogStudentT(df=0.0),
        lambda: TruncatedLogStudentT(scale=-1.0),
        lambda: Uniform(t_min=1.0),
        lambda: Uniform(t_max=math.inf),
        lambda: LogitNormal(mean=0.0, std=-1.0),
        lambda: Shifted(shift=0.0),
        lambda: Shifted(shift=2.0, t_max=80.0),
        lambda: PolynomialIndex(last=1000),
        lambda: PolynomialIndex(t_min=0.0),
        lambda: LogNormalIndex(std=0.0),
        lambda: karras_grid(1),
        lambda: karras_grid(5, 0.0),
        lambda: karras_grid(5, rho=0.0),
    ],
)
def test_impossible_values_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="accepted"):
        make()
