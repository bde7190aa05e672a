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

FILE = "results.json"
_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One metric at one number of steps.

    Attributes:
        experiment, method, dataset: what was trained, by which method, on what.
        metric: what was measured; lower is better.
        value: mean over the seed blocks.
        std: standard deviation over the blocks (n - 1), 0 for one block.
        min: smallest of the blocks.
        values: the value of each block.
        baseline, baseline_name: the same distance where no model is involved, if there is one.
        steps: sampler steps.
        times: start time of each step, in the method's own time.
        nfe: network evaluations per sample.
        samples: generated samples that each block's value rests on.
        first_seed, blocks: block k has the seeds from first_seed + k generated on.
        generated: generated samples per block, of which `samples` were used.
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
    baseline: float | None
    baseline_name: str
    steps: int
    times: tuple[float, ...]
    nfe: int
    samples: int
    first_seed: int
    blocks: int
    generated: int
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
    def ratio(self) -> float | None:
        """Measured over baseline, or None."""
        return self.value / self.baseline if self.baseline else None

    @property
    def key(self) -> tuple[Any, ...]:
        """Measuring again with an equal key replaces the row."""
        return (
            *(self.experiment, self.metric, self.steps, self.times, self.samples, self.generated),
            *(self.first_seed, self.blocks, self.extractor_hash, self.reference_hash),
            *(self.quantisation, self.weights, self.step),
        )


def label(metric: str, samples: int) -> str:
    """A metric, and for a FID the number of samples it rests on: FID-50k, FID half-898."""
    name = metric.replace("_", " ")
    if not metric.startswith("fid"):
        return name
    return f"{name.replace('fid', 'FID', 1)}-{count(samples)}"


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
