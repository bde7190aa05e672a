import dataclasses
import math

import pytest
import torch

from evaluation_fakes import DATA, GaussianMap, Model, PictureModel, TwoTimes, together
from fastflow.data.dataset import Table
from fastflow.data.toy import GaussianMixture2D
from fastflow.distributed import World
from fastflow.errors import ConfigError, DataError, DivergenceError
from fastflow.evaluation.evaluate import evaluate
from fastflow.evaluation.extractors import DigitFeatures, quantise
from fastflow.evaluation.metrics import FID
from fastflow.evaluation.sampling import class_labels
from fastflow.evaluation.spec import Evaluation
from fastflow.evaluation.statistics import FeatureStatistics, save_moments
from fastflow.evaluation.toy_metrics import EnergyDistance, FlowMapError, energy_distance
from fastflow.rng import SampleNoise

TOY = (FlowMapError(samples=50), EnergyDistance(samples=100))


@pytest.fixture
def pictures():
    levels = torch.randint(0, 17, (90, 1, 8, 8), generator=torch.Generator().manual_seed(3))
    return Table("noise", levels.float() / 8 - 1, None, num_classes=0, flip=False)


def run(model, evaluation, data=DATA, **kwargs):
    return evaluate(model, evaluation, data, World(), **kwargs)


@pytest.mark.parametrize("method", [GaussianMap(), TwoTimes()])
def test_the_exact_map_has_no_error(method, tmp_path):
    """In one step and, re-noising or jumping, in three: the exact sampler sees the same noise."""
    evaluation = Evaluation(metrics=TOY, samples=100, steps=(1, 3), batch_size=32)
    rows = run(Model(method), evaluation, cache=tmp_path)
    found = {(r.metric, r.steps): r for r in rows}
    assert found["flow_map_error", 1].value < 1e-11
    assert found["flow_map_error", 3].value < 1e-11
    assert found["flow_map_error", 1].samples == 50
    assert abs(found["energy_distance", 1].value) < 0.03
    assert abs(found["energy_distance", 1].baseline) < 0.03


def test_a_wrong_map_shows():
    evaluation = Evaluation(metrics=TOY, samples=100, steps=(1,))
    error, energy = run(Model(GaussianMap(error=0.5)), evaluation)
    assert math.isclose(error.value, 0.25, rel_tol=1e-5)
    assert energy.value > 0.1


def test_conditional_models_meet_the_map_of_their_class():
    data = GaussianMixture2D(modes=3, size=300)

    class Conditional(Model):
        def sample(self, seeds, steps=1, times=None, cond=None):
            start = 80 * SampleNoise(seeds).normal((2,))
            t, s = (torch.full((len(seeds),), v, dtype=torch.float64) for v in (80.0, 0.0))
            return data.oracle.conditional_flow_map(start, t, s, cond.argmax(1)).float()

    model = Conditional(GaussianMap(), cond_dim=3)
    evaluation = Evaluation(metrics=(FlowMapError(samples=40),), samples=40, steps=(1,))
    (row,) = run(model, evaluation, data)
    assert row.value < 1e-10


JUMPS = FlowMapError(samples=50, jumps=((80.0, 1.0), (3.0, 0.0), (0.5, 0.1)))
JUMP_NAMES = ["jump_error_80_1", "jump_error_3_0", "jump_error_0.5_0.1"]


@pytest.mark.parametrize("error", [0.0, 0.5])
def test_jumps_between_two_times_are_scored_beside_one_step(error):
    evaluation = Evaluation(metrics=(JUMPS,), samples=60, steps=(1, 2))
    rows = run(Model(TwoTimes(error=error)), evaluation)
    found = {(r.metric, r.steps): r.value for r in rows}
    assert [key for key in found if key[1] == 1] == [
        (name, 1) for name in ("flow_map_error", *JUMP_NAMES)
    ]
    assert [key for key in found if key[1] == 2] == [("flow_map_error", 2)]
    for name in JUMP_NAMES:
        assert found[name, 1] == pytest.approx(error**2, abs=1e-9)


def test_jumps_start_where_the_exact_map_leads_each_class():
    data = GaussianMixture2D(modes=3, size=300)
    starts = []

    class Conditional(Model):
        def sample(self, seeds, steps=1, times=None, cond=None):
            return torch.zeros(len(seeds), 2)

        def jump(self, x, t, s, cond=None):
            starts.append((x, cond.argmax(1)))
            times = (torch.full((len(x),), v, dtype=torch.float64) for v in (t, s))
            return data.oracle.conditional_flow_map(x, *times, starts[-1][1])

    jumps = ((1.0, 0.2), (0.0021, 0.0))
    metric = FlowMapError(samples=400, jumps=jumps)
    evaluation = Evaluation(metrics=(metric,), samples=400, steps=(1,), seed=5)
    rows = run(Conditional(TwoTimes(), cond_dim=3), evaluation, data)
    assert [row.value < 1e-10 for row in rows] == [False, True, True]
    x, labels = starts[1]
    assert torch.equal(labels, class_labels(range(5, 405), 3))
    for k in range(3):
        centre = x[labels == k].mean(0)
        torch.testing.assert_close(centre, data.oracle.means[k], rtol=0, atol=0.05)


def test_jumps_on_several_processes():
    evaluation = Evaluation(metrics=(JUMPS,), samples=20, steps=(1,), batch_size=16)
    model = Model(TwoTimes(error=0.5))
    for rows in together(3, lambda world: evaluate(model, evaluation, DATA, world)):
        assert [row.metric for row in rows] == ["flow_map_error", *JUMP_NAMES]
        assert [row.value for row in rows] == pytest.approx([0.25] * 4, rel=1e-6)


def test_jumps_that_cannot_be_scored_are_refused():
    with pytest.raises(ConfigError, match="0 <= s < t"):
        FlowMapError(jumps=((0.5, 0.5),))
    with pytest.raises(ConfigError, match="leave them out"):
        run(Model(GaussianMap()), Evaluation(metrics=(JUMPS,)))
    beyond = FlowMapError(jumps=((81.0, 0.0),))
    with pytest.raises(ConfigError, match="up to 80"):
        run(Model(TwoTimes()), Evaluation(metrics=(beyond,)))


def test_rows_tell_what_produced_them():
    evaluation = Evaluation(
        metrics=TOY, samples=60, steps=(2,), times={2: (5.0,)}, seed=7, blocks=3, batch_size=25
    )
    model = Model(GaussianMap(error=0.1))
    row = run(model, evaluation)[1]
    assert model.asked == list(range(7, 7 + 180))
    assert (row.experiment, row.method, row.dataset) == ("toy", "GaussianMap", "gaussian2d")
    assert (row.steps, row.times, row.nfe) == (2, (80.0, 5.0), 2)
    assert (row.samples, row.generated, row.first_seed, row.blocks) == (60, 60, 7, 3)
    assert (row.weights, row.step, row.images, row.batch_size) == ("ema_0.99", 100, 6400, 64)
    assert len(set(row.values)) == 3
    assert math.isclose(row.value, sum(row.values) / 3)
    assert row.min == min(row.values)
    mean = row.value
    assert math.isclose(row.std, math.sqrt(sum((v - mean) ** 2 for v in row.values) / 2))
    assert row.reference_hash == DATA.fingerprint()
    assert row.torch == torch.__version__
    assert row.hardware.startswith("1 x ")
    assert row.seconds > 0
    assert (row.train_seconds, row.trained_on) == (12.5, "1 x GPU")


def test_fid_rows_tell_what_produced_them(tmp_path, pictures):
    model = PictureModel(GaussianMap(), shape=(1, 8, 8), pictures=pictures)
    evaluation = Evaluation(
        metrics=(FID(extractor=DigitFeatures()),), samples=90, steps=(1,), quantisation="none"
    )
    (row,) = run(model, evaluation, pictures, cache=tmp_path)
    assert row.value < 1e-8  # the samples are the data
    assert (row.metric, row.label) == ("fid", "FID-90")
    assert row.extractor == "digit-classifier-64"
    assert len(row.extractor_hash) == 64
    assert row.reference == "noise, all 90"
    assert row.reference_hash == pictures.fingerprint()
    assert row.quantisation == "none, 17 levels"
    assert (row.better, row.spread) == ("lower", None)
    assert row.baseline is None


def test_the_number_of_processes_changes_rounding_only(tmp_path, pictures):
    """Also with fewer batches than processes: who has none takes part and adds nothing."""
    model = PictureModel(
        GaussianMap(), shape=(1, 8, 8), pictures=pictures, change=lambda x: x * 0.8
    )
    metric = FID(extractor=DigitFeatures())
    for samples, bound in ((70, 1e-9), (25, 1e-6)):  # the second has a singular covariance
        evaluation = Evaluation(metrics=(metric,), samples=samples, steps=(1,), batch_size=20)
        (alone,) = run(model, evaluation, pictures, cache=tmp_path / "one")
        folder = tmp_path / f"three{samples}"
        shared = together(
            3, lambda w, e=evaluation, f=folder: evaluate(model, e, pictures, w, cache=f)
        )
        again = together(
            3, lambda w, e=evaluation, f=folder: evaluate(model, e, pictures, w, cache=f)
        )
        for (row,) in (*shared, *again):
            assert math.isclose(row.value, alone.value, rel_tol=bound)
            assert row.samples == samples


def test_toy_metrics_on_several_processes():
    evaluation = Evaluation(metrics=TOY, samples=90, steps=(1,), batch_size=16)
    alone = run(Model(GaussianMap(error=0.1)), evaluation)
    for rows in together(
        4, lambda world: evaluate(Model(GaussianMap(error=0.1)), evaluation, DATA, world)
    ):
        for row, single in zip(rows, alone, strict=True):
            assert math.isclose(row.value, single.value, rel_tol=1e-9)


def test_the_batch_size_changes_rounding_only():
    values = []
    for size in (7, 100):
        evaluation = Evaluation(metrics=TOY, samples=100, steps=(2,), batch_size=size)
        values.append([r.value for r in run(Model(GaussianMap(error=0.1)), evaluation)])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_reference_statistics_from_a_file(tmp_path, pictures):
    extractor = DigitFeatures().build(torch.device("cpu"))
    statistics = FeatureStatistics(64)
    statistics.update(extractor(pictures.fetch(torch.arange(90))[0]).features)
    save_moments(statistics.moments(), tmp_path / "ref.npz")
    metric = FID(extractor=DigitFeatures(), reference=str(tmp_path / "ref.npz"))
    model = PictureModel(GaussianMap(), shape=(1, 8, 8), pictures=pictures)
    (row,) = run(model, Evaluation(metrics=(metric,), samples=90, steps=(1,)), pictures)
    assert row.value < 1e-8
    assert row.reference == "ref.npz (provenance unknown)"
    assert len(row.reference_hash) == 64

    narrow = FeatureStatistics(3)
    narrow.update(torch.randn(9, 3))
    save_moments(narrow.moments(), tmp_path / "ref.npz")
    with pytest.raises(DataError, match="of 3 features, but digit-classifier-64 has 64"):
        run(model, Evaluation(metrics=(metric,), samples=90, steps=(1,)), pictures)


def test_the_cache_is_used_and_told_apart(tmp_path, pictures):
    model = PictureModel(GaussianMap(), shape=(1, 8, 8), pictures=pictures)
    metric = FID(extractor=DigitFeatures())
    evaluation = Evaluation(metrics=(metric,), samples=20, steps=(1,))
    first = run(model, evaluation, pictures, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    assert run(model, evaluation, pictures, cache=tmp_path)[0].value == first[0].value
    assert file.stat().st_mtime_ns == before
    # Real images are the same bytes whatever the rule for generated ones.
    run(model, dataclasses.replace(evaluation, quantisation="floor"), pictures, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    run(model, dataclasses.replace(evaluation, quantisation="none"), pictures, cache=tmp_path)
    other = Table("noise", pictures.fetch(torch.arange(80))[0], None, num_classes=0, flip=False)
    run(model, evaluation, other, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_metrics_refuse_what_they_cannot_measure(tmp_path, pictures):
    with pytest.raises(ConfigError, match="images"):
        run(Model(GaussianMap()), Evaluation(metrics=(FID(extractor=DigitFeatures()),)))
    model = PictureModel(GaussianMap(), shape=(1, 8, 8), pictures=pictures)
    with pytest.raises(ConfigError, match="not known"):
        run(model, Evaluation(metrics=(FlowMapError(),)), pictures)


def test_a_sample_that_is_not_finite_stops_the_evaluation():
    def damage(x):
        x[3] = math.nan
        return x

    model = Model(GaussianMap(), change=damage)
    with pytest.raises(DivergenceError, match="seed 13 .*ema_0.99.*100"):
        run(model, Evaluation(metrics=TOY, samples=20, steps=(1,), seed=10))


def test_progress_is_told():
    told = []
    evaluation = Evaluation(metrics=TOY, samples=50, steps=(1, 2), blocks=2, batch_size=20)
    run(Model(GaussianMap()), evaluation, progress=lambda *a: told.append(a))
    assert told[:3] == [
        ("1 step (block 1 of 2)", 20, 50),
        ("1 step (block 1 of 2)", 40, 50),
        ("1 step (block 1 of 2)", 50, 50),
    ]
    assert told[-1] == ("2 steps (block 2 of 2)", 50, 50)


def test_classes_are_uniform_and_follow_from_the_seed():
    labels = class_labels(range(6000), 5)
    assert torch.equal(labels[100:200], class_labels(range(100, 200), 5))
    assert all(1080 < n < 1320 for n in labels.bincount().tolist())
    assert class_labels(range(3), 0) is None


def test_quantisation_rules():
    x = torch.tensor([-2.0, -1, -0.5, 0, 0.999, 1, 2])
    assert quantise(x, "truncate").tolist() == [0, 0, 64, 128, 255, 255, 255]
    assert quantise(x, "floor").tolist() == [0, 0, 63, 127, 254, 255, 255]
    # Rounded down after the sum: 127.9 is the level 128 nearest to it, or the 127 below.
    assert (quantise(torch.tensor(0.4 / 127.5), "truncate")) == 128
    assert (quantise(torch.tensor(0.4 / 127.5), "floor")) == 127
    assert quantise(x, "none") is x
    stored = torch.arange(256, dtype=torch.float32) / 127.5 - 1
    for rule in ("truncate", "floor"):
        assert torch.equal(quantise(stored, rule), torch.arange(256, dtype=torch.uint8))


def test_energy_distance_in_closed_form():
    """For points on a line it is 2 times the integral of (F - G)^2: uniform, shifted by d < 1."""
    n, d = 2000, 0.25
    x = (torch.arange(n).double() + 0.5)[:, None] / n
    expected = 2 * (d**2 - d**3 / 3)
    assert energy_distance(x, x + d) == pytest.approx(expected, rel=0.02)
    generator = torch.Generator().manual_seed(0)
    values = [
        energy_distance(*torch.randn(2, 60, 2, dtype=torch.float64, generator=generator))
        for _ in range(200)
    ]
    assert abs(sum(values) / 200) < 0.01  # unbiased: a biased one would be near 0.03
