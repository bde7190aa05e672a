"""Pictures, and the observers that draw them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from callback_state import Tiny, begin, finish, make_state, run
from callbacks.curves import Curves
from callbacks.ema import EMACallback
from callbacks.sample_grid import SampleGrid
from fastflow.config import lazy
from fastflow.data.toy import Gaussian2D
from fastflow.ema import ConstantEMA
from fastflow.errors import ConfigError
from fastflow.generate import generate, step_times
from fastflow.pictures import grid, save_panels, save_rows, save_samples, to_bytes


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def test_bytes_are_rounded_and_clamped() -> None:
    values = torch.tensor([-1.0, 1.0, 0.0, -3.0, 3.0, math.nan, math.inf, -1 + 1.1 / 127.5])
    assert to_bytes(values).tolist() == [0, 255, 128, 0, 255, 0, 255, 1]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_each_image_enlarged_in_reading_order(channels: int) -> None:
    images = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, channels, 8, 8).clone()
    images[:, 0, 0, 0] = 1.0
    array = np.asarray(grid(images))
    gap, side = 4, 68  # factor 8, a gap of 4
    assert array.shape == (2 * side + gap, 3 * side + gap, 3)
    for number in range(5):
        top, left = number // 3 * side + gap, number % 3 * side + gap
        tile = array[top : top + 64, left : left + 64]
        assert (tile[8:, 8:] == round(127.5 * (number / 2))).all() or number in (1, 3)
        assert (tile[:8, :8, 0] == 255).all()
    assert (array[side + gap :, 2 * side + gap :] == 255).all(), "the sixth place is empty"


def test_columns_can_be_given() -> None:
    assert np.asarray(grid(torch.zeros(6, 1, 8, 8), columns=2)).shape == (3 * 68 + 4, 2 * 68 + 4, 3)


def test_large_images_keep_their_size() -> None:
    assert np.asarray(grid(torch.zeros(4, 3, 100, 80))).shape == (203, 163, 3)


def test_panels_stand_side_by_side_under_their_titles(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.png"
    panels = {"1 step": torch.zeros(4, 1, 8, 8), "2 steps": torch.ones(4, 1, 8, 8)}
    save_panels(panels, path)
    array = pixels(path)
    width = 2 * 68 + 4
    assert array.shape == (width + 24 + 16, 2 * width + 3 * 8, 3)
    assert (array[:24, :60] < 100).any(), "a title"
    assert (array[60, 30] == 128).all()
    assert [p.name for p in path.parent.iterdir()] == ["a.png"], "no partial file is left"


def test_rows_stand_under_each_other_beside_their_names(tmp_path: Path) -> None:
    panel = {"1 step": torch.zeros(4, 1, 8, 8), "2 steps": torch.ones(4, 1, 8, 8)}
    save_rows({"short": panel, "much longer": panel}, tmp_path / "a.png", columns=4)
    array = pixels(tmp_path / "a.png")
    across, down = 4 * 34 + 2, 34 + 2  # factor 4, a gap of 2
    left = array.shape[1] - 2 * (across + 8)
    assert left > 70
    assert array.shape[0] == 8 + 24 + 2 * (down + 8)
    for row in range(2):
        middle = 8 + 24 + row * (down + 8) + 10
        assert (array[middle, left + 10] == 128).all()
        assert (array[middle, left + across + 8 + 10] == 255).all()
        assert (array[middle : middle + 16, : left - 8] < 100).any(), "a name"
    assert (array[:32, left : left + 60] < 100).any(), "a title"


def test_points_are_drawn_as_clouds(tmp_path: Path) -> None:
    save_samples(torch.randn(100, 2), tmp_path / "points.png")
    array = pixels(tmp_path / "points.png")
    assert len(np.unique(array.reshape(-1, 3), axis=0)) > 10


@pytest.mark.parametrize("shape", [(4, 4, 8, 8), (4, 3), (4,)])
def test_other_shapes_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pictures: samples of shape"):
        save_samples(torch.zeros(shape), tmp_path / "x.png")


def test_curves_show_every_value_of_the_log(tmp_path: Path) -> None:
    state = make_state(tmp_path)
    records = [{"step": s, "loss": 1 / s, "grad_norm": float(s)} for s in range(1, 9)]
    records[3]["loss"] = math.nan
    records[5]["rare"] = -1.0
    text = "".join(json.dumps(r) + "\n" for r in records)
    (tmp_path / "log.jsonl").write_text(text)
    run(state, [Curves()], 1)
    assert pixels(tmp_path / "curves.png").shape[1] > 1000  # three plots in a row


def test_no_log_no_curves(tmp_path: Path) -> None:
    run(make_state(tmp_path), [Curves()], 1)
    assert not (tmp_path / "curves.png").exists()


def test_grids_of_the_averaged_weights_at_fixed_seeds(tmp_path: Path) -> None:
    state = make_state(tmp_path, shape=(1, 8, 8))
    callbacks = [
        EMACallback(law=ConstantEMA(beta=0.9)),
        SampleGrid(every=2, steps=(1, 2), count=9),
    ]
    run(state, callbacks, 5)
    names = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert names == ["step_00000002.png", "step_00000004.png", "step_00000005.png"]
    network = Tiny((1, 8, 8))
    network.load_state_dict({**network.state_dict(), **state.emas["ema_0.9"].state_dict()})
    panels = {}
    for steps, title, between in ((1, "1 step", None), (2, "2 steps", (1.0,))):
        times = step_times(state.method, steps, between)
        panels[title] = generate(state.method, network, range(9), (1, 8, 8), times)
    save_panels(panels, tmp_path / "expected.png")
    drawn = pixels(tmp_path / "samples" / "step_00000005.png")
    assert np.array_equal(drawn, pixels(tmp_path / "expected.png"))


def test_classes_take_turns_in_a_grid(tmp_path: Path, monkeypatch) -> None:
    state = make_state(tmp_path, shape=(1, 8, 8), cond_dim=3)
    seen = []
    forward = Tiny.forward

    def watch(self, x, t, s=None, cond=None, augment=None):
        seen.append(cond)
        return forward(self, x, t)

    monkeypatch.setattr(Tiny, "forward", watch)
    grid_callback = SampleGrid(every=1, steps=(1,), count=5)
    begin(state, [grid_callback])
    finish(state, [grid_callback])
    assert seen[0].argmax(1).tolist() == [0, 1, 2, 0, 1]
    assert seen[0].sum(1).tolist() == [1.0] * 5
    drawn = pixels(tmp_path / "samples" / "step_00000000.png")
    assert drawn.shape[1] == 3 * 68 + 4 + 2 * 8, "a column for each class"


def test_points_are_drawn_beside_the_data(tmp_path: Path) -> None:
    state = make_state(tmp_path, shape=(2,), data=lazy(Gaussian2D, size=64))
    run(state, [SampleGrid(every=5, steps=(1, 2))], 1)
    array = pixels(tmp_path / "samples" / "step_00000001.png")
    assert array.shape[1] == 1200, "data and two numbers of steps"


def test_a_grid_that_cannot_be_drawn_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"samples have shape \(3,\)"):
        begin(make_state(tmp_path), [SampleGrid(every=1)])
    with pytest.raises(ConfigError, match=r"weights: 'ema_1' given.*no EMACallback"):
        begin(make_state(tmp_path, shape=(1, 8, 8)), [SampleGrid(every=1, weights="ema_1")])
    state = make_state(tmp_path, shape=(1, 8, 8))
    state.experiment.evaluation.times[4] = (1.0,)
    with pytest.raises(ConfigError, match="4 steps"):
        begin(state, [SampleGrid(every=1)])
