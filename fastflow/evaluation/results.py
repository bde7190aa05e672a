"""Result rows with everything that produced them, and the `results.json` of a run."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastflow.errors import DataError
from fastflow.evaluation.interface import Better

FILE = "results.json"
_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One metric at one number of steps.

    Attributes:
        experiment, method, dataset: what was trained, by which method, on what.
        metric: what was measured.
        value: mean over the seed blocks.
        std: standard deviation over the blocks (n - 1), 0 for one block.
        min: smallest of the blocks.
        values: the value of each block.
        better: whether lower or higher values are better.
        spread: standard deviation that the metric itself gives within a block (subsets of a KID,
            splits of an Inception Score), mean over the blocks; None where it gives none.
        baseline, baseline_name: the same distance where no model is involved, if there is one.
        steps: sampler steps.
        times: start time of each step, in the method's own time.
        nfe: network evaluations per sample.
        samples: generated samples that each block's value rests on.
        first_seed, blocks: block k has the seeds from first_seed + k generated on.
        generated: generated samples per block, of which `samples` were used.
        labels: classes of the samples, see `Evaluation`; "none" without classes.
        extractor, extractor_hash: feature extractor and SHA-256 of its weights.
        reference, reference_hash: what it was compared with; SHA-256 of the statistics file, or
            the dataset's fingerprint.
        quantisation: how images were made discrete.
        weights: which weights: an EMA's name or "student".
        step, images: optimizer steps and training images behind them.
        batch_size: samples per optimizer step over all processes.
        commit: of fastflow's repository, "+" when it had changes; "" outside a repository.
        train_seconds, trained_on: wall time of training, and the processes and devices that did it.
        hardware: processes and devices that measured.
        torch: version.
        seconds: time to generate and measure all blocks, all metrics together.
    """

    experiment: str
    method: str
    dataset: str
    metric: str
    value: float
    std: float
    min: float
    values: tuple[float, ...]
    better: Better = "lower"
    spread: float | None = None
    baseline: float | None
    baseline_name: str
    steps: int
    times: tuple[float, ...]
    nfe: int
    samples: int
    first_seed: int
    blocks: int
    generated: int
    labels: str = "random"
    extractor: str
    extractor_hash: str
    reference: str
    reference_hash: str
    quantisation: str
    weights: str
    step: int
    images: int
    batch_size: int
    train_seconds: float
    trained_on: str
    commit: str
    hardware: str
    torch: str
    seconds: float

    @property
    def label(self) -> str:
        """The metric's name for people."""
        return label(self.metric, self.samples)

    @property
    def best(self) -> float:
        """The best of the blocks."""
        return max(self.values) if self.better == "higher" else self.min

    @property
    def ratio(self) -> float | None:
        """Measured over baseline, or None."""
        return self.value / self.baseline if self.baseline else None

    @property
    def key(self) -> tuple[Any, ...]:
        """Measuring again with an equal key replaces the row."""
        return (
            *(self.experiment, self.metric, self.steps, self.times, self.samples, self.generated),
            *(self.first_seed, self.blocks, self.labels, self.extractor_hash),
            *(self.reference_hash, self.quantisation, self.weights, self.step),
        )


_LABELS = {
    "fid": "FID",
    "fid_half": "FID half",
    "fd_dinov2": "FD-DINOv2",
    "fd_dinov2_half": "FD-DINOv2 half",
    "fd_vgg16": "FD-VGG16",
    "fd_vgg16_half": "FD-VGG16 half",
    "kid": "KID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
}


def label(metric: str, samples: int) -> str:
    """A metric's name for people: FID-50k, FID half-898, energy distance.

    What is measured on features of images always names the number of samples it rests on, for it
    changes with it; nothing is called FID-50k that does not rest on 50,000 samples.
    """
    if not counted(metric):
        return metric.replace("_", " ")
    return f"{_LABELS.get(metric, metric.replace('_', ' '))}-{count(samples)}"


def counted(metric: str) -> bool:
    """Whether values of a metric are comparable only where they rest on as many samples."""
    return metric in _LABELS or metric.startswith("fd_")


def improves(value: float, other: float, better: Better) -> bool:
    """Whether a value is better than another of the same metric."""
    return value > other if better == "higher" else value < other


def count(number: int) -> str:
    """A number of samples for people: 50000 -> 50k, 898 -> 898."""
    return f"{number // 1000}k" if number % 1000 == 0 else str(number)


def record(run_dir: Path, results: Iterable[Result]) -> Path:
    """Add rows to the results.json of a run directory, atomically; equal keys are replaced.

    Raises:
        DataError: the file that is there cannot be read; it is left as it is.
    """
    path = run_dir / FILE
    rows = {row.key: row for row in (read(path) if path.exists() else [])}
    rows.update({row.key: row for row in results})
    ordered = sorted(rows.values(), key=lambda r: (r.step, r.weights, r.metric, r.steps))
    text = json.dumps(
        {"version": _VERSION, "results": [dataclasses.asdict(row) for row in ordered]}, indent=1
    )
    scratch = path.with_name(f".{FILE}.{os.getpid()}.tmp")
    run_dir.mkdir(parents=True, exist_ok=True)
    scratch.write_text(text + "\n")
    scratch.replace(path)
    return path


def read(path: Path) -> list[Result]:
    """The rows of a results.json.

    Raises:
        DataError: missing, unreadable, or written by another version.
    """
    try:
        content = json.loads(path.read_text())
        version = content["version"]
        if version != _VERSION:
            raise DataError(f"{path}: version {version!r} given, {_VERSION} accepted")
        return [_result(row) for row in content["results"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no results file: {error}") from None


def _result(row: dict[str, Any]) -> Result:
    lists = {name: tuple(row[name]) for name in ("values", "times")}
    return Result(**{**row, **lists})


@functools.cache
def commit() -> str:
    """The commit of the repository that holds this package, "+" appended when it has changes."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        # An installed copy inside somebody else's repository is not tracked there.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
