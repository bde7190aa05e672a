"""How the conditions of a result differ from the published ones, in words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from fastflow.config import from_plain, packages_of
from fastflow.errors import ConfigError
from fastflow.evaluation.results import Result, count, counted, label
from fastflow.evaluation.runs import Run
from fastflow.evaluation.spec import Expected
from fastflow.experiment import Experiment
from fastflow.generate import step_times
from fastflow.run_dir import differences


def of_training(run: Run, shipped: Experiment) -> list[str]:
    """How a run was trained otherwise than the configuration says, and that than the recipe."""
    words = [f"{key}: the published recipe has {text}" for key, text in shipped.departures.items()]
    if run.described is None:
        return [*words, "how it was trained is not known: no experiment.yaml beside the results"]
    try:
        trained = from_plain(run.described, packages_of(shipped))
        changes = differences(shipped, trained)
    except (ConfigError, AttributeError) as error:
        reason = str(error) if isinstance(error, ConfigError) else "no experiment"
        return [*words, f"its experiment cannot be compared with the configuration: {reason}"]
    early = run.rows[0].step < trained.steps
    stopped = [f"after {run.rows[0].step:,} of {trained.steps:,} steps"] if early else []
    return [*words, *map(_in_words, changes), *stopped]


def of_measurement(row: Result, run: Run, shipped: Experiment) -> list[str]:
    """How a result was measured otherwise than the configuration says."""
    plan = shipped.evaluation
    words = []
    if row.blocks < plan.blocks:
        words.append(f"{_blocks(row.blocks)} of seeds instead of {plan.blocks}")
    if row.extractor and row.quantisation.partition(",")[0] != plan.quantisation:
        words.append(f"quantisation {row.quantisation!r} instead of {plan.quantisation!r}")
    if run.preferred and row.weights != run.preferred:
        words.append(f"weights {row.weights} instead of {run.preferred}")
    times = step_times(shipped.method, row.steps, plan.times.get(row.steps))
    if not _close(row.times, times):
        words.append(f"times {_listed(row.times)} instead of {_listed(times)}")
    return words


def of_figure(row: Result, expected: Expected) -> list[str]:
    """What separates a result from a figure: first why the two must not be compared."""
    words = [obstacle(row, expected)]
    if row.samples != expected.samples and not words[0]:
        words.append(f"{count(row.samples)} samples instead of {count(expected.samples)}")
    if expected.note:
        words.append(f"the published figure: {expected.note}")
    return [text for text in words if text]


def obstacle(row: Result, expected: Expected) -> str:
    """Why the two must not be compared; "" if they may."""
    if counted(row.metric) and row.samples != expected.samples:
        given, wanted = (label(row.metric, each.samples) for each in (row, expected))
        return f"not compared: {given} measured, {wanted} expected"
    if row.extractor.startswith("inception-v3 with other weights"):
        return "not compared: measured with other Inception weights"
    return ""


def _blocks(number: int) -> str:
    return "1 block" if number == 1 else f"{number} blocks"


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) == len(b) and all(map(math.isclose, a, b))


def _listed(times: Sequence[float]) -> str:
    shown = [f"{t:.6g}" for t in times]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:3], "...", *shown[-2:]])


def _in_words(change: str) -> str:
    """`batch_size: 512 -> 128` as "batch size 128 instead of 512"."""
    key, _, values = change.partition(": ")
    old, _, new = (_value(text) for text in values.partition(" -> "))
    name = key.replace("_", " ")
    if old == "(absent)":
        return f"{name} {new}, which the configuration does not have"
    if new == "(absent)":
        return f"no {name}, which is {old} in the configuration"
    return f"{name} {new} instead of {old}"


def _value(text: str) -> str:
    """A value as `fastflow.config.diff` writes it, classes without modules, not too long."""
    if re.fullmatch(r"\d+", text):
        return f"{int(text):,}"
    text = re.sub(r"[\w.]+:(\w+\()", r"\1", text.strip("'"))
    return text if len(text) <= 80 else f"{text[:79]}…"
