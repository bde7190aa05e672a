"""`fastflow doctor`: is the installation sound, is the data there, what does a configuration do?"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastflow.build import Parts
from fastflow.config import build, diff, load_experiment, override
from fastflow.distributed import World, world
from fastflow.errors import FastflowError
from fastflow.evaluation.compare import experiment_files
from fastflow.experiment import Experiment
from fastflow.prerequisites import Stage, check_all, unfinished
from fastflow.summary import expectations

OPTIONAL = {
    "torch-fidelity": "Inception features for FID",
    "torchvision": "wanted by torch-fidelity",
    "scikit-learn": "the digits dataset",
    "matplotlib": "pictures of curves and toy samples",
    "wandb": "logging to Weights & Biases",
    "tensorboard": "logging to TensorBoard",
    "fvcore": "the parameter table",
    "lpips": "the LPIPS distance",
}


@dataclasses.dataclass
class Report:
    """Lines for a person, and whether everything that was asked for works."""

    lines: list[str] = dataclasses.field(default_factory=list)
    healthy: bool = True

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def add(self, mark: str, what: str, finding: str) -> None:
        self.lines.append(f"{mark:<4} {what:<14} {finding}")

    def attempt(self, what: str, check: Callable[[], str]) -> None:
        """Run a check; what it raises becomes a line."""
        try:
            self.add("ok", what, check())
        except FastflowError as error:
            self.healthy = False
            self.add("FAIL", what, " ".join(str(error).split()))


def examine(
    config: Path | None, overrides: Sequence[str], device: str, allow: tuple[str, ...] = ()
) -> Report:
    """Look at the installation and, where one is given, at a configuration.

    Args:
        config: a configuration file, or None.
        overrides: `key=value` texts for it.
        device: as for training.
        allow: packages of your own that a saved configuration may name classes of.

    Raises:
        ConfigError: the configuration cannot be read or an override does not fit.
    """
    report = Report()
    report.add("ok", "python", f"{platform.python_version()} on {platform.platform()}")
    report.add("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    with world(device) as here:
        report.add("ok", "device", _device(here))
        for package, purpose in OPTIONAL.items():
            _package(report, package, purpose)
        if config is not None:
            _configuration(report, config, overrides, here, allow)
    return report


def _device(here: World) -> str:
    if here.device.type != "cuda":
        return f"{here.device}, {platform.machine()}; {torch.cuda.device_count()} CUDA devices"
    memory = torch.cuda.get_device_properties(here.device).total_memory
    return f"{torch.cuda.get_device_name(here.device)}, {memory / 2**30:.0f} GiB"


def _package(report: Report, package: str, purpose: str) -> None:
    try:
        report.add("ok", package, f"{importlib.metadata.version(package)} ({purpose})")
    except importlib.metadata.PackageNotFoundError:
        report.add("-", package, f"not installed ({purpose})")


def _configuration(
    report: Report, config: Path, overrides: Sequence[str], here: World, allow: tuple[str, ...]
) -> None:
    written = load_experiment(config, kind=Experiment, allow=allow)
    experiment = override(written, overrides, allow)
    report.add("ok", "configuration", f"{config}: {experiment.name}")
    report.attempt("data", lambda: build(experiment.data, at="data").summary())
    first = _prerequisites(report, experiment, here, allow)
    if report.healthy:
        report.attempt("experiment", lambda: _fits(experiment, first, here))
    else:
        report.add("-", "experiment", "not checked: it needs the data")
    report.add("ok", "expected", expectations(experiment))
    for change in diff(_published(written, config), experiment):
        report.add("!", "differs", f"{change} (the configuration we ship -> yours)")
    for key, value in experiment.departures.items():
        report.add("!", "differs", f"{key}: the published recipe has {value}")


def _prerequisites(
    report: Report, experiment: Experiment, here: World, allow: tuple[str, ...]
) -> tuple[Stage, ...]:
    """What would be trained first; nothing where that cannot be told."""
    try:
        first = unfinished(experiment, None, here, allow)
    except FastflowError as error:
        report.healthy = False
        report.add("FAIL", "prerequisites", str(error))
        return ()
    for stage in first:
        report.add("!", "first", f"{stage}: 'fastflow train' trains it before")
    return first


def _fits(experiment: Experiment, first: tuple[Stage, ...], here: World) -> str:
    if first:
        check_all(first, experiment, here)
        return "method, network, data and callbacks fit; weights are yet to be trained"
    parts = Parts.of(experiment, here)
    count = sum(p.numel() for p in parts.networks.student.parameters())
    return f"method, network, data and callbacks fit; {count / 1e6:.2f} M parameters"


def _published(written: Experiment, config: Path) -> Experiment:
    """The configuration of the same name that comes with fastflow; a user's own is its own."""
    for path in experiment_files():
        if path.stem == f"config_{written.name}" and path != config.resolve():
            return load_experiment(path, kind=Experiment)
    return written
