"""Curricula, decays, gaps and learning rates against official tables and published formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastflow.errors import ConfigError
from fastflow.progress import Progress
from fastflow.schedules import (
    AdaptiveDecay,
    ConstantLR,
    ConstantRatio,
    CosineLR,
    Curriculum,
    DoublingDiscretization,
    FixedDecay,
    FixedDiscretization,
    Gap,
    InverseSqrtLR,
    LearningRate,
    LinearRamp,
    LinearWarmup,
    RatioStages,
    SigmoidRatio,
    SqrtDiscretization,
)
from reference_data import reference


def at(step: int, total: int = 800_000, batch: int = 512, **curriculum: float) -> Progress:
    return Progress(
        step=step,
        images=step * batch,
        total_steps=total,
        batch_size=batch,
        curriculum=curriculum,
    )


def number(curriculum: Curriculum, step: int, total: int) -> int:
    values = curriculum(at(step, total))
    assert set(values) == curriculum.provides == {"N"}
    assert values["N"] == int(values["N"])
    return int(values["N"])


def test_openai_progressive_scales_with_adaptive_decay() -> None:
    case = reference("openai_ema_scales").values["0"]
    kwargs = case["kwargs"]
    scales = SqrtDiscretization(s0=kwargs["start_scales"], s1=kwargs["end_scales"])
    decay = AdaptiveDecay(mu0=kwargs["start_ema"], s0=kwargs["start_scales"])
    for step, mu, n in case["rows"]:
        assert number(scales, step, kwargs["total_steps"]) == n
        assert decay(at(step, N=n)) == pytest.approx(mu, rel=1e-12)


@pytest.mark.parametrize("case", ["1", "2"])
def test_openai_scales_with_fixed_decay(case: str) -> None:
    stored = reference("openai_ema_scales").values[case]
    kwargs = stored["kwargs"]
    scales: Curriculum = SqrtDiscretization(s0=kwargs["start_scales"], s1=kwargs["end_scales"])
    if kwargs["scale_mode"] == "fixed":
        scales = FixedDiscretization(n=kwargs["start_scales"])
    decay = FixedDecay(mu=kwargs["start_ema"])
    for step, mu, n in stored["rows"]:
        if case == "2" and step == 0:
            # ceil(sqrt(100) - 1) + 1: the code starts with s0 points, not with s0 + 1.
            assert n == kwargs["start_scales"]
        assert number(scales, step, kwargs["total_steps"]) == n
        assert decay(at(step)) == mu


def test_grid_sizes_of_the_cm_paper() -> None:
    steps = (0, 1, 8_000, 80_000, 200_000, 400_000, 800_000)
    numbers = [number(SqrtDiscretization(s0=2, s1=150), k, 800_000) for k in steps]
    assert numbers == [2, 3, 16, 48, 76, 107, 151]
    numbers = [number(SqrtDiscretization(s0=2, s1=200), k, 800_000) for k in (0, 400_000, 800_000)]
    assert numbers == [2, 143, 201]
    assert number(SqrtDiscretization(s0=1, s1=10), 0, 800_000) == 2


def test_adaptive_decay_of_the_cm_paper() -> None:
    """The formula at N scales; the official code has one grid point more than scales."""
    decay = AdaptiveDecay(mu0=0.9, s0=2)
    expected = {2: 0.9, 3: 0.932170, 18: 0.988362, 151: 0.998605}
    for scales, mu in expected.items():
        assert decay(at(0, N=scales + 1)) == pytest.approx(mu, abs=5e-7)
    assert decay(at(0, N=2)) == pytest.approx(0.9**2)
    assert decay.needs == {"N"}
    assert FixedDecay(mu=0.0).needs == frozenset()


def test_adaptive_decay_without_its_curriculum_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'N' was not provided"):
        AdaptiveDecay()(at(0))


def test_grid_sizes_of_ict() -> None:
    law = DoublingDiscretization(s0=10, s1=1280)
    total = 400_000
    numbers = [number(law, 50_000 * stage, total) for stage in range(9)]
    assert numbers == [11, 21, 41, 81, 161, 321, 641, 1281, 1281]
    assert number(law, 49_999, total) == 11
    assert number(law, 10**9, total) == 1281


def test_doubling_stops_at_s1_also_off_powers_of_two() -> None:
    law = DoublingDiscretization(s0=10, s1=50)  # K' = floor(100 / (log2(5) + 1)) = 30
    assert [number(law, k, 100) for k in (0, 29, 30, 60, 90, 99)] == [11, 11, 21, 41, 51, 51]
    assert number(DoublingDiscretization(s0=3, s1=3), 5, 10) == 4
    assert number(DoublingDiscretization(), 1, 2) == 21  # fewer steps than stages


@pytest.mark.parametrize("case", ["ct.0", "ct.1"])
def test_fastgen_ratio_stages(case: str) -> None:
    stored = reference("fastgen_callbacks").values[case]
    kwargs = stored["kwargs"]
    law = RatioStages(
        q=kwargs["q"], kimg_per_stage=kwargs["kimg_per_stage"], limit=kwargs["ratio_limit"]
    )
    assert law.provides == {"stage", "ratio"}
    for iteration, stage, ratio, _ in stored["rows"]:
        values = law(at(iteration, batch=kwargs["batch_size"]))
        assert set(values) == law.provides
        assert values["stage"] == stage
        assert values["ratio"] == pytest.approx(ratio, rel=1e-12)


def test_ect_ratio_stages() -> None:
    for name, ratio in reference("ect_schedule").values["ratio"].items():
        q, stage = (int(part.lstrip("qstage")) for part in name.split("."))
        law = RatioStages(q=q, kimg_per_stage=1.0)
        assert law(at(stage, batch=1000)) == {
            "stage": stage,
            "ratio": pytest.approx(ratio, rel=1e-12),
        }
        if stage > 0:
            assert law(at(stage * 1000 - 1, batch=1))["stage"] == stage - 1


def test_equal_ratios_of_ect() -> None:
    ratios = {
        RatioStages(q=q, kimg_per_stage=1.0)(at(stage, batch=1000))["ratio"]
        for q, stage in ((256, 0), (2, 7), (4, 3))
    }
    assert ratios == {1 - 1 / 256}


def test_very_late_stages_do_not_overflow() -> None:
    law = RatioStages(q=256, kimg_per_stage=0.001, limit=0.999)
    assert law(at(10**6)) == {"stage": 512e6, "ratio": 0.999}
    assert RatioStages(q=2, kimg_per_stage=0.001)(at(10**6))["ratio"] == 1.0


def test_stages_go_on_from_an_earlier_run() -> None:
    law = RatioStages(q=2, kimg_per_stage=1.0, offset_images=2500)
    assert law(at(0))["stage"] == 2
    assert law(at(1, batch=500))["stage"] == 3


@pytest.mark.parametrize("q", [2, 4, 256])
@pytest.mark.parametrize("kind", ["const", "sigmoid"])
def test_ect_gaps(q: int, kind: str) -> None:
    ref = reference("ect_schedule")
    gap: Gap = SigmoidRatio(k=8.0, b=1.0) if kind == "sigmoid" else ConstantRatio()
    law = RatioStages(q=q, kimg_per_stage=1.0)
    rows = [gap(ref["t"], law(at(stage, batch=1000))["ratio"]) for stage in range(9)]
    ref.check(f"r.q{q}.{kind}.k8.b1", torch.stack(rows))


def test_sigmoid_gap_values() -> None:
    def r(t: float, stage: int) -> float:
        ratio = 1 - 2.0 ** -(stage + 1)
        return SigmoidRatio()(torch.tensor([t], dtype=torch.float64), ratio).item()

    # At stage 0 the gap swallows all times up to ln 7: those rows are plain denoising.
    assert r(math.log(7) - 1e-9, 0) == 0
    assert r(math.log(7) + 1e-6, 0) > 0
    assert r(2.0, 0) == pytest.approx(0.046377, abs=5e-7)
    assert r(5.0, 0) == pytest.approx(2.366143, abs=5e-7)
    assert r(80.0, 0) == pytest.approx(40)
    assert r(1.0, 3) == pytest.approx(0.803029, abs=5e-7)
    assert r(0.002, 7) == pytest.approx(0.001961, abs=5e-7)
    assert r(1.0, 7) == pytest.approx(0.987689, abs=5e-7)
    assert r(80.0, 7) == pytest.approx(79.6875)


def test_fastgen_floor_never_passes_t() -> None:
    t = torch.tensor([1e-4, 0.002, 0.003, 1.0, 80.0], dtype=torch.float64)
    floored, free = SigmoidRatio(r_min=0.002)(t, 0.5), SigmoidRatio()(t, 0.5)
    assert floored[:4].tolist() == [1e-4, 0.002, 0.002, 0.002]
    assert floored[4] == free[4]
    assert (floored <= t).all()
    assert floored.dtype == torch.float64
    assert free[:4].tolist() == [0, 0, 0, 0]


def test_edm2_learning_rates() -> None:
    for row in reference("edm2_lr_schedule").values["rows"]:
        law: LearningRate = ConstantLR()
        if row["ref_batches"] > 0:
            law = InverseSqrtLR(ref_batches=row["ref_batches"])
        law = LinearWarmup(images=row["rampup_Mimg"] * 10**6, law=law)
        now = Progress(
            step=row["cur_nimg"] // row["batch_size"],
            images=row["cur_nimg"],
            total_steps=1,
            batch_size=row["batch_size"],
        )
        assert row["ref_lr"] * law(now) == pytest.approx(row["lr"], rel=1e-12)


def test_fastgen_inverse_sqrt_in_iterations() -> None:
    law = InverseSqrtLR(ref_batches=2000)
    assert law(at(2000)) == 1
    assert law(at(8000)) == pytest.approx(0.5)


def test_cosine_learning_rate() -> None:
    law = CosineLR(final=0.1)
    values = [law(at(k, total=100)) for k in (0, 50, 100, 200)]
    assert values == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_linear_ramp() -> None:
    ramp = LinearRamp(steps=10_000)
    assert [ramp(at(k)) for k in (0, 5000, 10_000, 20_000)] == [0.0, 0.5, 1.0, 1.0]
    assert LinearRamp(steps=0)(at(0)) == 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: RatioStages(q=1.0, kimg_per_stage=1.0),
        lambda: RatioStages(q=2.0, kimg_per_stage=0.0),
        lambda: RatioStages(q=2.0, kimg_per_stage=1.0, limit=1.5),
        lambda: RatioStages(q=2.0, kimg_per_stage=1.0, offset_images=-1),
        lambda: SqrtDiscretization(s0=0),
        lambda: DoublingDiscretization(s0=20, s1=10),
        lambda: FixedDiscretization(n=1),
        lambda: FixedDecay(mu=1.1),
        lambda: AdaptiveDecay(mu0=1.0),
        lambda: AdaptiveDecay(s0=0),
        lambda: SigmoidRatio(k=-1.0),
        lambda: SigmoidRatio(r_min=-1.0),
        lambda: InverseSqrtLR(ref_batches=0.0),
        lambda: CosineLR(final=2.0),
        lambda: LinearWarmup(images=-1),
        lambda: LinearRamp(steps=-1),
    ],
)
def test_impossible_values_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="accepted"):
        make()
