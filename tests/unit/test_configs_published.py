"""The published experiments: complete without a download, and with the numbers of their recipes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastflow.build import build_callbacks, check_augment, check_fit
from fastflow.config import build, from_plain, load_experiment, to_plain
from fastflow.consistency import PseudoHuber
from fastflow.data.cifar10 import Cifar10
from fastflow.data.dataset import Dataset
from fastflow.data.edm_zip import ImageZip
from fastflow.data.latents import LatentZip
from fastflow.ema import ConstantEMA, HalfLifeEMA, PowerEMA
from fastflow.experiment import Experiment
from fastflow.method import Frozen, Networks
from fastflow.schedules import ConstantLR, InverseSqrtLR, LinearWarmup, RatioStages
from fastflow.times import LogNormal, TruncatedLogNormal, TruncatedLogStudentT

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "experiments"
PATHS = {
    path.stem.removeprefix("config_"): path
    for family in ("EDM", "EDM2", "DiT")
    for path in sorted((FOLDER / family).glob("config_*.py"))
}

CONST, POWER, TCM = (0.9999, 0.99995, 0.9996), (96.99, 16.97, 6.94), (16.97, 96.99, 6.94)

# name: batch, steps, Mimg, optimizer, lr, betas, eps, lr law, dropout, EMAs, precision, clip
TRAINING: dict[str, tuple[Any, ...]] = {
    "cm_cifar10": (512, 350_000, 179.2, "RAdam", 1e-4, 0.999, 1e-8, 0, 0.2, CONST, "fp32", 1e6),
    "cm_cifar10_fast": (128, 8000, 1.024, "RAdam", 1e-4, 0.999, 1e-8, 0, 0.2, 0.9993, "fp32", 1e6),
    "ict_cifar10": (1024, 400_000, 409.6, "RAdam", 1e-4, 0.999, 1e-8, 0, 0.3, 0.99993, "fp32", 1e6),
    "ect_cifar10": (128, 400_000, 51.2, "RAdam", 1e-4, 0.999, 1e-8, 0, 0.2, 0.9999, "fp32", 1e6),
    "sct_cifar10": (512, 400_000, 204.8, "RAdam", 1e-4, 0.99, 1e-8, 0, 0.2, 5e5, "fp32", 1e6),
    "scd_cifar10": (512, 500_000, 256, "RAdam", 1e-4, 0.99, 1e-8, 0, 0.0, CONST, "fp32", 1e6),
    "tcm_cifar10": (1024, 300_000, 307.2, "RAdam", 5e-5, 0.999, 1e-8, 0, 0.2, CONST, "fp32", 1e6),
    "mf_cifar10": (1024, 10**6, 1024, "Adam", 6e-4, 0.999, 1e-8, "w", 0.2, CONST, "fp32", 1e6),
    "edm_cifar10": (512, 390_625, 200, "Adam", 1e-3, 0.999, 1e-8, "w", 0.13, 5e5, "fp32", 1e6),
    "fm_cifar10": (512, 390_625, 200, "Adam", 1e-3, 0.999, 1e-8, "w", 0.13, 5e5, "fp32", 1e6),
    "cm_in64": (1024, 150_000, 153.6, "Adam", 1e-3, 0.99, 1e-8, 2000, 0.2, POWER, "fp16", 1e6),
    "scd_in64": (1024, 600_000, 614.4, "Adam", 7e-5, 0.99, 1e-11, 35_000, 0.0, CONST, "bf16", 10),
    "cm_s": (1024, 150_000, 153.6, "Adam", 1e-3, 0.99, 1e-8, 2000, 0.4, POWER, "fp32", 1e6),
    "cm_xl": (1024, 150_000, 153.6, "Adam", 7e-4, 0.99, 1e-8, 2000, 0.5, POWER, "fp32", 1e6),
    "scm_xl": (2048, 400_000, 819.2, "Adam", 7e-5, 0.99, 1e-11, 35_000, 0.45, POWER, "fp16", 1e6),
    "tcm_s": (1024, 400_000, 409.6, "Adam", 5e-4, 0.99, 1e-8, 8000, 0.4, TCM, "fp16", 1e6),
    "tcm_xl": (1024, 400_000, 409.6, "Adam", 1e-4, 0.99, 1e-8, 8000, 0.5, TCM, "fp16", 1e6),
    "ict_s": (4096, 800_000, 3276.8, "Adam", 1e-3, 0.99, 1e-8, 2000, 0.4, 0.99997, "fp32", 1e6),
    "mf_b": (1024, 1_200_000, 1228.8, "Adam", 1e-4, 0.95, 1e-8, 0, None, CONST, "bf16", 1e6),
    "mf_xl": (1024, 1_200_000, 1228.8, "Adam", 1e-4, 0.95, 1e-8, 0, None, CONST, "bf16", 1e6),
}

# name: steps and FID of each expected row, in order
EXPECTED = {
    "cm_cifar10": [(1, 2.92), (1, 3.60), (2, 2.11)],
    "cm_cifar10_fast": [(2, 2.73)],
    "ict_cifar10": [(1, 2.83), (2, 2.46)],
    "ect_cifar10": [(1, 3.60), (2, 2.11)],
    "sct_cifar10": [(1, 2.85), (2, 2.06), (1, 3.23)],
    "scd_cifar10": [(1, 3.22), (1, 3.66), (2, 2.52)],
    "tcm_cifar10": [(1, 2.46), (2, 2.05), (1, 2.70)],
    "mf_cifar10": [(1, 2.82), (1, 2.92)],
    "edm_cifar10": [(35, 1.97)],
    "fm_cifar10": [(127, 2.58)],
    "cm_in64": [(1, 4.02), (2, 3.20)],
    "scd_in64": [(1, 2.44), (2, 1.66)],
    "cm_s": [(1, 4.05), (1, 4.05), (2, 2.79)],
    "cm_xl": [(1, 2.49), (2, 1.67)],
    "scm_xl": [(1, 2.04), (2, 1.48)],
    "tcm_s": [(1, 2.88), (2, 2.31)],
    "tcm_xl": [(1, 2.20), (2, 1.62), (1, 2.23)],
    "ict_s": [(1, 4.02), (2, 3.20)],
    "mf_b": [(1, 6.17)],
    "mf_xl": [(1, 3.19), (1, 3.43), (2, 2.93)],
}

# Millions of parameters: FastGen's counts (less the second heads), the EDM2 and DiT papers'.
PARAMETERS = {
    **dict.fromkeys(("mf_cifar10",), (55.80, 0.01)),
    **dict.fromkeys(("cm_in64", "scd_in64"), (295.9, 0.05)),
    **dict.fromkeys(("cm_s", "tcm_s", "ict_s"), (280.2, 0.05)),
    **dict.fromkeys(("cm_xl", "tcm_xl", "scm_xl"), (1119.3, 0.05)),
    "mf_b": (131.1, 0.05),
    "mf_xl": (676, 0.6),
    "ict_cifar10": (56.5, 0.3),
}
DDPMPP = (55.73, 0.01)

# Methods with a ratio. name: q, kimg of a stage, limit, images before, c, weight
RATIO: dict[str, tuple[Any, ...]] = {
    "cm_cifar10": (2, 6400, 0.999, 0, 1e-8, "InverseGap"),
    "cm_cifar10_fast": (256, 512_000, 0.999, 0, 1e-8, "InverseGap"),
    "ect_cifar10": (2, 6400, 1.0, 0, 0.0, "InverseGap"),
    "tcm_cifar10": (2, 1000, 0.999, 179_200_000, 1e-8, "InverseGap"),
    "cm_in64": (4, 3200, 0.9961, 0, 0.06, "InverseCout"),
    "cm_s": (4, 3200, 0.9961, 0, 0.06, "InverseCout"),
    "cm_xl": (4, 3200, 0.9961, 0, 0.06, "InverseCout"),
    "tcm_s": (4, 1000, 0.9961, 153_600_000, 0.06, "InverseCout"),
    "tcm_xl": (4, 1000, 0.9961, 153_600_000, 0.06, "InverseCout"),
}

CIFAR, IN64 = {"t_min": 0.002, "t_max": 80.0}, {"mean": -0.8, "std": 1.6}
SECOND_STAGE = TruncatedLogStudentT(df=0.01, loc=0.0, scale=0.2, t_min=1.0, t_max=80.0)
TIMES = {
    "cm_cifar10": TruncatedLogNormal(mean=-1.1, std=2.0, **CIFAR),
    "cm_cifar10_fast": TruncatedLogNormal(mean=-1.1, std=2.0, **CIFAR),
    "ect_cifar10": LogNormal(mean=-1.1, std=2.0),
    "sct_cifar10": LogNormal(mean=-1.0, std=1.4),
    "scd_cifar10": TruncatedLogNormal(mean=-1.0, std=1.4, **CIFAR),
    "edm_cifar10": LogNormal(mean=-1.2, std=1.2),
    "cm_in64": TruncatedLogNormal(**IN64, **CIFAR),
    "cm_s": TruncatedLogNormal(**IN64, **CIFAR),
    "cm_xl": TruncatedLogNormal(**IN64, **CIFAR),
    "scd_in64": TruncatedLogNormal(mean=-1.0, std=1.6, **CIFAR),
    "scm_xl": LogNormal(mean=-1.0, std=1.6),
    **dict.fromkeys(("tcm_cifar10", "tcm_s", "tcm_xl"), SECOND_STAGE),
}


def load(name: str) -> Experiment:
    loaded = load_experiment(str(PATHS[name]), kind=Experiment)
    assert isinstance(loaded, Experiment)
    return loaded


EXPERIMENTS = {name: load(name) for name in PATHS}
each = pytest.mark.parametrize("name", PATHS)


def arguments(experiment: Experiment, callback: str) -> list[dict[str, Any]]:
    return [dict(n.kwargs) for n in experiment.callbacks if n.target.__name__ == callback]


class Shape(Dataset):
    """Says what the data of an experiment is like."""

    name, flip = "shape", False

    def __init__(self, kind: type[Dataset]) -> None:
        known: dict[type[Dataset], tuple[tuple[int, ...], int]] = {
            Cifar10: ((3, 32, 32), 10),
            ImageZip: ((3, 64, 64), 1000),
            LatentZip: ((4, 32, 32), 1000),
        }
        self.shape, self.num_classes = known[kind]

    def __len__(self) -> int:
        raise AssertionError("not read")

    def fetch(self, indices):
        raise AssertionError("not read")

    def fingerprint(self) -> str:
        raise AssertionError("not read")


def test_each_table_has_each_experiment():
    assert TRAINING.keys() == EXPECTED.keys() == PATHS.keys()
    assert [EXPERIMENTS[name].name for name in PATHS] == list(PATHS)


@each
def test_it_is_complete(name):
    """All parts but data and weights, on the meta device; drivers, method and network fit."""
    experiment = EXPERIMENTS[name]
    method = experiment.method
    callbacks = build_callbacks(experiment)
    labels = [node["law"].label for node in arguments(experiment, "EMACallback")]
    assert callbacks
    assert len(labels) == len(set(labels))

    data = Shape(experiment.data.target)
    with torch.device("meta"):
        student = build(experiment.network, at="network")
        companions = {
            key: build((spec.network if isinstance(spec, Frozen) else None) or experiment.network)
            for key, spec in method.companions().items()
        }
    check_fit(method, student, data)
    check_augment(experiment.augment, student, data)
    method.check(Networks(student, companions))
    assert student.cond_dim in (0, data.num_classes)
    assert student.has_logvar == (type(method).__name__ == "SCM")  # else it would get no gradient

    count = sum(p.numel() for p in student.model.parameters()) / 1e6
    published, tolerance = PARAMETERS.get(name, DDPMPP)
    assert count == pytest.approx(published, abs=tolerance)


@each
def test_it_survives_its_own_description(name):
    experiment = EXPERIMENTS[name]
    assert from_plain(to_plain(experiment)) == experiment


@each
def test_training_is_that_of_the_recipe(name):
    experiment, row = EXPERIMENTS[name], TRAINING[name]
    batch, steps, million, optimizer, lr, beta2, eps, law, dropout, emas, precision, clip = row
    assert (experiment.batch_size, experiment.steps) == (batch, steps)
    assert batch * steps / 1e6 == pytest.approx(million)
    given = experiment.optimizer.kwargs
    assert experiment.optimizer.target.__name__ == optimizer
    assert (given["lr"], given["betas"], given["eps"]) == (lr, (0.9, beta2), eps)
    assert given.get("weight_decay", 0) == 0
    if law == 0:
        assert experiment.lr == ConstantLR()
    elif law == "w":
        images = 9765 * 1024 if name == "mf_cifar10" else 10_000_000
        assert experiment.lr == LinearWarmup(images=images)
    else:
        assert experiment.lr == InverseSqrtLR(ref_batches=law)
    model = experiment.network.kwargs["model"].kwargs
    assert model.get("dropout") == dropout
    if PATHS[name].parent.name == "EDM2":
        assert model["dropout_resolutions"] == (16, 8)
    laws = [node["law"] for node in arguments(experiment, "EMACallback")]
    if isinstance(emas, tuple):
        kind, key = (ConstantEMA, "beta") if emas is CONST else (PowerEMA, "gamma")
        assert laws == [kind(**{key: value}) for value in emas]
    elif emas < 1:
        assert laws == [ConstantEMA(beta=emas)]
    else:
        assert [type(law) for law in laws] == [HalfLifeEMA]
        assert laws[0].half_life_images == emas
    assert experiment.precision == precision
    assert [node["max_norm"] for node in arguments(experiment, "GradClipCallback")] == [clip]


@pytest.mark.parametrize("name", RATIO)
def test_ratio_distance_and_weight(name):
    experiment = EXPERIMENTS[name]
    q, kimg, limit, before, c, weight = RATIO[name]
    schedule = RatioStages(q=q, kimg_per_stage=kimg, limit=limit, offset_images=before)
    assert arguments(experiment, "CTScheduleCallback") == [{"schedule": schedule}]
    method: Any = experiment.method
    assert method.distance == PseudoHuber(c=c)
    assert type(method.weight).__name__ == weight
    gap = method.pairs.gap if hasattr(method, "pairs") else method.gap
    assert (gap.k, gap.b) == (8.0, 1.0)
    assert method.s_min == 0
    assert getattr(method, "shift", 0.0) == (0.003 if name == "ect_cifar10" else 0.0)


@pytest.mark.parametrize("name", TIMES)
def test_the_law_of_t(name):
    method: Any = EXPERIMENTS[name].method
    assert (method.pairs.times if hasattr(method, "pairs") else method.times) == TIMES[name]


@pytest.mark.parametrize("name", ["tcm_cifar10", "tcm_s", "tcm_xl"])
def test_a_second_stage_goes_on_from_its_first(name):
    experiment = EXPERIMENTS[name]
    method: Any = experiment.method
    (stage,) = experiment.prerequisites
    first = load_experiment(str(ROOT / stage.config), kind=Experiment)
    assert stage.run_dir == f"runs/{first.name}" == experiment.init_from == method.stage1.weights
    assert first.network == experiment.network
    (driver,) = arguments(experiment, "CTScheduleCallback")
    assert driver["schedule"].offset_images == first.batch_size * first.steps
    assert (method.transition, method.boundary_share, method.boundary_weight) == (1.0, 0.25, 0.1)


@pytest.mark.parametrize("name", ["scd_cifar10", "scd_in64"])
def test_a_distilled_model_starts_from_its_teacher(name):
    experiment = EXPERIMENTS[name]
    method: Any = experiment.method
    source = method.teacher.source
    assert source.weights == experiment.init_from
    assert source.network.model == experiment.network.model
    assert (method.teacher.guidance, method.limit, method.average) == (1.0, "rms", "mean/d")


@pytest.mark.parametrize("name", ["sct_cifar10", "scd_cifar10", "scd_in64", "scm_xl"])
def test_tangents(name):
    method: Any = EXPERIMENTS[name].method
    assert (method.warmup.steps, method.c, method.sigma_data) == (10_000, 0.1, 0.5)
    assert EXPERIMENTS[name].network.kwargs["time"] == "log_sigma"  # as its initial weights


@pytest.mark.parametrize(
    ("name", "law", "ends", "equal", "power", "c", "guidance"),
    [
        ("mf_cifar10", (-0.6, 1.6), (-4.0, 1.6), 0.25, 0.75, 1e-3, None),
        ("mf_b", (-0.4, 1.0), None, 0.75, 1.0, 1.0, (1.0, 0.5, 0.0, 1.0, 0.1)),
        ("mf_xl", (-0.4, 1.0), None, 0.75, 1.0, 1.0, (0.2, 0.92, 0.0, 0.75, 0.1)),
    ],
)
def test_mean_flow(name, law, ends, equal, power, c, guidance):
    method: Any = EXPERIMENTS[name].method
    times = method.times
    assert (times.times.mean, times.times.std, times.times.t_max) == (*law, 0.999)
    assert (None if times.ends is None else (times.ends.mean, times.ends.std)) == ends
    assert (times.equal, times.order, method.warmup.steps) == (equal, "sort", 0)
    assert (method.regression.power, method.regression.c) == (power, c)
    given = method.guidance
    found = given and (given.omega, given.kappa, given.t_min, given.t_max, given.label_dropout)
    assert found == guidance


def test_grids_double_eight_times_over_the_run():
    for name in ("ict_cifar10", "ict_s"):
        experiment = EXPERIMENTS[name]
        method: Any = experiment.method
        (driver,) = arguments(experiment, "CTScheduleCallback")
        assert (driver["schedule"].s0, driver["schedule"].s1) == (10, 1280)
        assert (method.huber, method.sigma_min) == (0.00054, 0.002)
        assert (method.index.mean, method.index.std) == (-1.1, 2.0)
    assert EXPERIMENTS["ict_cifar10"].network.kwargs["model"].kwargs["fourier_scale"] == 0.02


@each
def test_what_is_expected_is_published(name):
    experiment = EXPERIMENTS[name]
    assert [(row.steps, row.value) for row in experiment.expected] == EXPECTED[name]
    assert all(row.source and row.metric == "fid" for row in experiment.expected)
    assert {row.steps for row in experiment.expected} <= set(experiment.evaluation.steps)
    assert experiment.published


AUGMENTED = {"edm_cifar10": (9, False), "fm_cifar10": (9, False), "mf_cifar10": (6, True)}


@each
def test_augmentation_and_mirroring(name):
    experiment = EXPERIMENTS[name]
    labels, flip = AUGMENTED.get(name, (0, name == "ict_cifar10"))
    assert (experiment.augment.dim if experiment.augment else 0) == labels
    assert dict(experiment.data.kwargs).get("flip", False) == flip


@each
def test_the_docstring_says_command_cost_and_expectation(name):
    text = PATHS[name].read_text().split('"""')[1]
    experiment = EXPERIMENTS[name]
    words = " ".join(text.split())
    assert f"--config {PATHS[name].relative_to(ROOT)}" in words
    million = experiment.batch_size * experiment.steps / 1e6
    (cost,) = re.findall(r"Cost: .*?([\d,.]+) million images", words) or [
        re.findall(r"([\d,]+) million images", words)[-1]
    ]
    assert float(cost.replace(",", "")) == pytest.approx(million, rel=5e-3)
    for _, value in EXPECTED[name]:
        assert f"{value:.2f}" in words


@each
def test_weights_are_official_files_or_runs_that_are_trained_first(name):
    experiment = EXPERIMENTS[name]
    needed = {stage.run_dir for stage in experiment.prerequisites}
    source = experiment.init_from
    assert (
        source is None
        or source in needed
        or re.fullmatch(r"https://nvlabs-fi-cdn\.nvidia\.com/edm2?/[\w/.-]+\.pkl", source)
    )
    assert (
        source is None or "init_from" in experiment.published or "weights" in experiment.published
    )


@each
def test_it_is_measured_as_published_figures_are(name):
    """Three blocks of 50,000 seeds, classes at random; the times of two steps are published."""
    evaluation, method = EXPERIMENTS[name].evaluation, type(EXPERIMENTS[name].method).__name__
    assert (evaluation.samples, evaluation.blocks, evaluation.labels) == (50_000, 3, "random")
    assert evaluation.quantisation == "truncate"
    if method not in ("EDM", "FlowMatching"):
        assert evaluation.steps == (1, 2, 4, 8)
        assert 2 in evaluation.times
    if method == "MeanFlow":
        assert evaluation.times[4] == (0.75, 0.5, 0.25)
        assert evaluation.times[8][-1] == 0.125


README = (ROOT / "methods" / "README.md").read_text()


def test_the_readme_has_each_expected_value():
    for name, rows in EXPECTED.items():
        (line,) = (line for line in README.splitlines() if f"/config_{name}.py`" in line)
        for steps, value in rows:
            assert f"{value:.2f}" in line, (name, steps, value)


@pytest.mark.parametrize(
    ("row", "one", "two"),
    [
        ("CD with LPIPS (none) | CIFAR-10", "3.55", "2.93"),
        ("CT with LPIPS (none) | CIFAR-10", "8.70", "5.83"),
        ("CD with LPIPS (none) | ImageNet-64", "6.20", "4.70"),
        ("CT with LPIPS (none) | ImageNet-64", "13.0", "11.1"),
    ],
)
def test_the_readme_has_rows_without_a_configuration(row, one, two):
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {row}"))
    assert [cell.strip() for cell in line.split("|")][3:5] == [f"{one} P", f"{two} P"]


def test_the_readme_tells_of_every_method():
    """Each class of a method has a row and a section, each section all six paragraphs."""
    first = README.index("## The methods one by one")
    last = README.index("## CM: one class, several papers")
    sections = README[first:last].split("\n### ")[1:]
    for section in sections:
        for word in ("Idea", "Parameters", "Curriculum", "When", "Curves", "Traps"):
            assert section.count(f"**{word}.** ") == 1, (section.splitlines()[0], word)
    headings = " ".join(section.splitlines()[0].lower() for section in sections)
    for path in sorted((ROOT / "methods").glob("[!_]*.py")):
        assert README.count(f"| `methods/{path.name}` |") == 1
        assert path.stem.replace("mean_flow", "meanflow").replace("_", " ") in headings
