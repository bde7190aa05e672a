"""Pictures of a model's samples beside its results: each number of steps from the same noise."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from torch.nn.functional import one_hot

from fastflow.evaluation.interface import Sampler
from fastflow.evaluation.sampling import class_labels
from fastflow.pictures import class_columns, save_samples

FOLDER = "samples"
_NAME = re.compile(r"same_noise_(.+)_step(\d+)_(\d+)step\.png")
_IMAGES, _POINTS = 40, 1024


def same_noise(model: Sampler, steps: int, count: int) -> Tensor:
    """Samples [count, *shape] of the seeds from 0 on; classes take turns.

    They start from the same noise whatever the number of steps, and with other models of the same
    shape whatever the method.
    """
    seeds = range(count)
    labels = class_labels(seeds, model.cond_dim, "balanced")
    cond = None if labels is None else one_hot(labels, model.cond_dim).float().to(model.device)
    return model.sample(seeds, steps, cond=cond).cpu()


def draw(model: Sampler, folder: Path, steps: Iterable[int]) -> list[Path]:
    """One PNG for each number of steps in `samples/` below a folder, where they can be drawn.

    That is images of 1 or 3 channels, and with matplotlib points in the plane.
    """
    images = len(model.shape) == 3 and model.shape[0] in (1, 3)
    points = model.shape == (2,) and importlib.util.find_spec("matplotlib") is not None
    if not images and not points:
        return []
    paths = []
    for number in steps:
        name = f"same_noise_{model.weights_name}_step{model.step:08d}_{number}step.png"
        samples = same_noise(model, number, _IMAGES if images else _POINTS)
        paths.append(folder / FOLDER / name)
        save_samples(samples, paths[-1], class_columns(model.cond_dim) or 8)
    return paths


def drawn(folder: Path, weights: str, step: int) -> dict[int, Path]:
    """The pictures that `draw` left in a folder of some weights at a step, by number of steps."""
    found: dict[int, Path] = {}
    for path in folder.joinpath(FOLDER).glob("same_noise_*.png"):
        match = _NAME.fullmatch(path.name)
        if match and (match[1], int(match[2])) == (weights, step):
            found[int(match[3])] = path
    return dict(sorted(found.items()))
