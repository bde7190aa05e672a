"""Results on disk: every `results.json` below some folders, and the runs that they are of."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from fastflow.config import read_yaml
from fastflow.errors import ConfigError
from fastflow.evaluation.results import FILE, Result, read
from fastflow.run_dir import EXPERIMENT, MODEL, WEIGHTS

Key: TypeAlias = tuple[str, str, str]
"""What tells runs apart: name, experiment and weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What was measured of one set of weights, at the latest step that anything was measured at.

    Attributes:
        name: its folder, as people know it.
        folder: a run directory or a folder of exported weights.
        rows: the results, of one experiment, one set of weights and one step.
        described: the stored experiment as plain data, nothing it names imported; None where
            there is none beside the results.
        preferred: the weights that are measured unless others are asked for; "" if not known.
    """

    name: str
    folder: Path
    rows: tuple[Result, ...]
    described: Mapping[str, Any] | None = None
    preferred: str = ""

    @property
    def key(self) -> Key:
        """What tells it apart from other runs."""
        return self.name, self.experiment, self.weights

    @property
    def experiment(self) -> str:
        """The name of what was trained."""
        return self.rows[0].experiment

    @property
    def weights(self) -> str:
        """Which weights."""
        return self.rows[0].weights

    @property
    def network(self) -> str:
        """The class of the raw network; "" if not known."""
        return network_name(self.described["network"]) if self.described else ""


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs with results in some folders, by folder and path; one found twice counts once.

    A run is named by its path within the folder; where two would have one name, by the whole path.

    Raises:
        DataError: a results file cannot be read.
        ConfigError: the description beside one cannot be read.
    """
    names: dict[Path, str] = {}
    places: dict[Path, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob(FILE)):
            place = path.parent.resolve()
            if place not in places:
                inside = path.parent != folder
                names[place] = str(path.parent.relative_to(folder)) if inside else place.name
                places[place] = path.parent
    taken = Counter(names.values())
    return [
        run
        for place, folder in places.items()
        for run in runs_in(folder, names[place] if taken[names[place]] == 1 else str(folder))
    ]


def runs_in(folder: Path, name: str) -> list[Run]:
    """The runs whose results lie in a folder, one for each experiment and set of weights.

    Raises:
        DataError, ConfigError: as `find_runs`.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for row in read(folder / FILE):
        groups.setdefault((row.experiment, row.weights), []).append(row)
    described, preferred = _description(folder)
    return [
        Run(
            name=name,
            folder=folder,
            rows=tuple(row for row in rows if row.step == max(r.step for r in rows)),
            described=described,
            preferred=preferred,
        )
        for rows in groups.values()
    ]


def network_name(network: Mapping[str, Any]) -> str:
    """The class of a network in plain data, within its wrapper."""
    inner = network.get("model")
    target = inner["_target_"] if isinstance(inner, Mapping) else network["_target_"]
    return str(target).rpartition(":")[2]


def _description(folder: Path) -> tuple[Mapping[str, Any] | None, str]:
    """The stored experiment and the preferred weights, each where there is such a thing."""
    paths = (folder / MODEL, folder / WEIGHTS / MODEL, folder / EXPERIMENT)
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None, ""
    plain = read_yaml(path)
    try:
        exported = path.name == MODEL
        described = plain["experiment"] if exported else plain
        network_name(described["network"])
        return described, str(plain["weights"][0]) if exported else ""
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ConfigError(
            f"{path} describes no trained model; it is as training wrote it that is accepted"
        ) from None
