"""Augmentation: each transformation against another way to write it, its labels and its draws."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from fastflow.build import Parts, check_augment
from fastflow.config import from_plain, override, to_plain
from fastflow.data.augment import (
    EDM_CIFAR10,
    LABELS,
    MEANFLOW_CIFAR10,
    SYM6,
    EDMAugment,
    affine,
)
from fastflow.data.digits import Digits
from fastflow.data.toy import Gaussian2D
from fastflow.distributed import World
from fastflow.errors import ConfigError
from fastflow.network import Network
from fastflow.progress import Progress
from fastflow.rng import Draws
from fastflow.schedules import FixedDecay
from methods.cm import CM
from methods.edm import EDM
from tests.tiny import RATIO, assert_same, digits, train

EVERYTHING = EDMAugment(p=1.0, **dict.fromkeys(LABELS, 1.0))
# Where the filter's weight lies off its middle: by so much the map's centre is off the image's.
OFF = (5.5 - sum(k * h for k, h in enumerate(SYM6)) / sum(SYM6)) / 2


def images(count=6, channels=3, height=16, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, height, width, generator=generator) * 2 - 1


def draws(count, step=0):
    return Draws(7, step, tuple(range(count)))


def given(count=1, **values):
    """The same parameters for each of some images."""
    return {
        name: torch.tensor(value, dtype=torch.float64).reshape(1, -1).expand(count, -1)
        for name, value in values.items()
    }


def transformed(x, pipe=EVERYTHING, **values):
    return pipe.transform(x, given(len(x), **values))


# Whole pixels


@pytest.mark.parametrize("shape", [(16, 16), (12, 20)])
def test_flips_are_those_of_torch(shape):
    x = images(height=shape[0], width=shape[1])
    assert torch.equal(transformed(x, xflip=1), torch.flip(x, (3,)))
    assert torch.equal(transformed(x, yflip=1), torch.flip(x, (2,)))
    assert torch.equal(transformed(x, xflip=1, yflip=1), torch.flip(x, (2, 3)))


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_quarter_turns_are_counterclockwise(turns):
    x = images()
    expected = np.rot90(x.numpy(), turns, axes=(2, 3))
    np.testing.assert_array_equal(transformed(x, rotate_int=turns).numpy(), expected)


@pytest.mark.parametrize("move", [(2, 0), (0, 1), (-3, 2), (1, -2)])
@pytest.mark.parametrize("shape", [(16, 16), (12, 20)])
def test_whole_shifts_go_right_and_up_and_mirror_the_edge(move, shape):
    height, width = shape
    pipe = dataclasses.replace(EVERYTHING, translate_int_max=0.25)
    x = images(height=height, width=width)
    moved = transformed(x, pipe, translate_int=(move[0] / (width / 4), move[1] / (height / 4)))
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    top, left = 4 + move[1], 4 - move[0]
    expected = padded[:, :, top : top + height, left : left + width]
    np.testing.assert_array_equal(moved.numpy(), expected)


def test_pixel_moves_come_in_order_and_before_the_rest():
    x = images()
    moved = transformed(x, xflip=1, rotate_int=1, translate_int=(1, 0.5), lumaflip=1, scale=1.0)
    steps = torch.rot90(x.flip(3), 1, (2, 3))
    steps = transformed(steps, translate_int=(1, 0.5))
    steps = transformed(transformed(steps, scale=1.0), lumaflip=1)
    assert torch.equal(moved, steps)


# One affine map


def test_the_filter_is_the_orthogonal_wavelet_of_six_vanishing_moments():
    taps = np.array(SYM6)
    for lag in range(6):
        assert taps[2 * lag :] @ taps[: 12 - 2 * lag] == pytest.approx(float(lag == 0), abs=1e-9)
    assert taps.sum() == pytest.approx(math.sqrt(2), abs=1e-9)
    for power in range(6):
        moment = ((-1.0) ** np.arange(12) * (np.arange(12) / 12) ** power).dot(taps)
        assert moment == pytest.approx(0, abs=1e-7)
    assert pytest.approx(0.2, abs=0.01) == OFF


@pytest.mark.parametrize("shape", [(16, 16), (9, 14), (1, 5), (2, 2)])
def test_the_machinery_gives_the_identity_back(shape):
    x = images(height=shape[0], width=shape[1])
    same = affine(x, torch.eye(2).expand(6, 2, 2), torch.zeros(6, 2))
    torch.testing.assert_close(same, x, atol=5e-5, rtol=0)


def waves(right, down, height, width):
    """Slow waves that go on mirrored beyond the edges, at places from the centre."""
    u = math.pi * (right + (width - 1) / 2) / (width - 1)
    v = math.pi * (down + (height - 1) / 2) / (height - 1)
    return 0.5 * np.cos(2 * u) * np.cos(v) + 0.3 * np.cos(v * 3) + 0.2 * np.cos(u)


def places(height, width):
    right, down = np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2
    return np.meshgrid(right, down)


def turn(angle):
    """Counterclockwise in coordinates whose y goes down."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])


def forward(height, width, scale=0.0, rotate_frac=0.0, aniso=(0.0, 0.0), translate_frac=(0, 0)):
    """The matrix that takes a place of the image to its place afterwards, step by step."""
    stretch = 2 ** (0.2 * aniso[0])
    out = np.diag([2 ** (0.2 * scale), 2 ** (0.2 * scale), 1])
    out = turn(rotate_frac) @ out
    out = turn(aniso[1]) @ np.diag([stretch, 1 / stretch, 1]) @ turn(-aniso[1]) @ out
    move = np.eye(3)
    move[:2, 2] = translate_frac[0] * 0.125 * width, translate_frac[1] * 0.125 * height
    return move @ out


@pytest.mark.parametrize(
    "values",
    [
        {"scale": 1.5},
        {"scale": -2.0},
        {"rotate_frac": 0.4},
        {"rotate_frac": -2.5},
        {"rotate_frac": math.pi},
        {"aniso": (2.0, 0.0)},
        {"aniso": (1.5, 0.7)},
        {"aniso": (-1.5, 2.2)},
        {"translate_frac": (1.0, 0.0)},
        {"translate_frac": (-0.7, 1.3)},
        {"scale": 0.8, "rotate_frac": 0.9, "aniso": (1.2, -0.6), "translate_frac": (0.4, -0.8)},
        {"scale": -1.0, "rotate_frac": -2.0, "aniso": (-1.0, 2.6), "translate_frac": (-0.5, 0.3)},
    ],
)
@pytest.mark.parametrize("shape", [(32, 32), (24, 36)])
def test_smooth_images_move_as_the_matrices_say(values, shape):
    height, width = shape
    right, down = places(height, width)
    x = torch.tensor(waves(right, down, height, width), dtype=torch.float32)[None, None]
    moved = transformed(x, **values)[0, 0].numpy()
    at = np.stack([right - OFF, down - OFF, np.ones(shape)])
    source = np.einsum("ij,jhw->ihw", np.linalg.inv(forward(height, width, **values)), at)
    expected = waves(source[0] + OFF, source[1] + OFF, height, width)
    assert np.abs(moved - expected).max() < 0.02
    assert np.abs(moved - x[0, 0].numpy()).max() > 0.2


@pytest.mark.parametrize(
    ("there", "back"),
    [
        ({"scale": 1.5}, {"scale": -1.5}),
        ({"rotate_frac": 0.3}, {"rotate_frac": -0.3}),
        ({"aniso": (1.0, 0.5)}, {"aniso": (-1.0, 0.5)}),
        ({"translate_frac": (0.5, -0.4)}, {"translate_frac": (-0.5, 0.4)}),
    ],
)
def test_there_and_back_is_where_it_was(there, back):
    x = torch.tensor(waves(*places(32, 32), 32, 32), dtype=torch.float32)[None, None]
    middle = (..., slice(10, 22), slice(10, 22))
    moved = transformed(x, **there)
    assert (moved - x)[middle].abs().max() > 0.05
    torch.testing.assert_close(transformed(moved, **back)[middle], x[middle], atol=0.01, rtol=0)


def test_fine_detail_fades_rather_than_turn_into_something_else():
    stripes = (torch.arange(32) % 2 * 2.0 - 1).expand(1, 1, 32, 32)
    shrunk = transformed(stripes, scale=-5.0)  # half the size: too fine for the pixels
    assert shrunk[..., 8:24].abs().max() < 0.1
    assert transformed(stripes, scale=5.0).abs().max() > 0.5


def test_far_beyond_the_mirrored_edges_lies_grey():
    out = transformed(torch.ones(1, 1, 32, 32), scale=-10.0)[0, 0]  # a quarter of the size
    assert out[12:20, 12:20].tolist() == [[pytest.approx(1, abs=1e-3)] * 8] * 8
    assert out[:2].abs().max() < 0.01
    assert out[:, -2:].abs().max() < 0.01


# Colour


def colour_matrix(brightness=0.0, contrast=0.0, lumaflip=0.0, hue=0.0, saturation=0.0):
    """Steps on (r, g, b, 1), one matrix each."""
    axis = np.array([1, 1, 1, 0])[:, None] / math.sqrt(3)
    onto, one = axis @ axis.T, np.diag([1.0, 1, 1, 0])
    affine_part = np.diag([0.0, 0, 0, 1])
    cross = np.zeros((4, 4))
    cross[:3, :3] = np.cross(np.eye(3), axis[:3, 0])
    shift = np.eye(4)
    shift[:3, 3] = 0.2 * brightness
    steps = [
        shift,
        one * 2 ** (0.5 * contrast) + affine_part,
        np.eye(4) - 2 * onto * lumaflip,
        np.eye(4) + math.sin(hue) * cross + (1 - math.cos(hue)) * (onto - one),
        onto + (one - onto) * 2**saturation + affine_part,
    ]
    out = np.eye(4)
    for step in steps:
        out = step @ out
    return out


COLOURS = [
    {"brightness": 1.5},
    {"contrast": -1.0},
    {"lumaflip": 1.0},
    {"hue": 2.0},
    {"hue": -0.5},
    {"saturation": 1.3},
    {"brightness": -1.0, "contrast": 0.7, "lumaflip": 1.0, "hue": 1.1, "saturation": -0.8},
]


@pytest.mark.parametrize("values", COLOURS)
def test_colours_change_as_the_matrices_say(values):
    x = images()
    matrix = colour_matrix(**values)
    expected = np.einsum("ij,bjhw->bihw", matrix[:3, :3], x.numpy()) + matrix[:3, 3, None, None]
    np.testing.assert_allclose(transformed(x, **values).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("values", COLOURS)
def test_grey_images_take_the_mean_of_the_rows(values):
    x = images(channels=1)
    rows = colour_matrix(**values)[:3].mean(0)
    expected = x.numpy() * rows[:3].sum() + rows[3]
    np.testing.assert_allclose(transformed(x, **values).numpy(), expected, atol=2e-6)


def test_a_third_of_a_turn_of_hue_exchanges_the_colours():
    x = images()
    turned = transformed(x, hue=2 * math.pi / 3)
    torch.testing.assert_close(turned, x[:, [2, 0, 1]], atol=1e-6, rtol=0)


def test_what_colour_changes_keep():
    x, close = images(), lambda a, b: torch.testing.assert_close(a, b, atol=3e-6, rtol=0)
    grey = x.mean(1, keepdim=True).expand_as(x)
    close(transformed(grey, hue=1.7, saturation=2.0), grey)
    close(transformed(x, hue=1.7, saturation=2.0).mean(1, keepdim=True), grey[:, :1])
    close(transformed(x, saturation=-40.0), grey)
    flipped = transformed(x, lumaflip=1)
    close(flipped.mean(1), -x.mean(1))
    close(flipped - flipped.mean(1, keepdim=True), x - grey)
    assert transformed(x, contrast=2.0).abs().max() > 1.5  # not clamped


# Draws and labels


def test_published_settings_have_as_many_labels_as_their_networks():
    assert (EDM_CIFAR10.dim, MEANFLOW_CIFAR10.dim, EVERYTHING.dim) == (9, 6, 19)
    assert EDM_CIFAR10.p == MEANFLOW_CIFAR10.p == 0.12
    assert EDM_CIFAR10.enabled == (
        "xflip", "yflip", "scale", "rotate_frac", "aniso", "translate_frac",
    )  # fmt: skip


def test_labels_stand_in_the_published_order_and_form():
    values = given(
        2, xflip=1, yflip=0, rotate_int=3, translate_int=(0.25, -0.5), scale=1.5, rotate_frac=0.6,
        aniso=(-2, 0.3), translate_frac=(0.7, -0.1), brightness=0.4, contrast=-0.2, lumaflip=1,
        hue=-2, saturation=0.9,
    )  # fmt: skip
    expected = [
        *(1, 0, 0, 1, 0.25, -0.5, 1.5, math.cos(0.6) - 1, math.sin(0.6)),
        *(-2 * math.cos(0.3), -2 * math.sin(0.3), 0.7, -0.1, 0.4, -0.2, 1),
        *(math.cos(-2) - 1, math.sin(-2), 0.9),
    ]
    labels = EVERYTHING.labels(values)
    assert labels.dtype == torch.float32
    np.testing.assert_allclose(labels.numpy(), [expected] * 2, rtol=1e-6)
    turns = {"rotate_int": torch.tensor([[0.0], [1], [2], [3]], dtype=torch.float64)}
    codes = EDMAugment(p=1.0, rotate_int=1.0).labels(turns)
    assert codes.tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]


COUNT = 3000


@pytest.fixture(scope="module")
def half():
    """Parameters of many images, each transformation drawn by 0.4 of them."""
    pipe = dataclasses.replace(EVERYTHING, p=0.2, **dict.fromkeys(LABELS, 2.0))
    return pipe.draw(draws(COUNT), (32, 32))


def near(value, spread=1.0):
    return pytest.approx(value, abs=4 * spread / math.sqrt(0.4 * COUNT))


def test_each_transformation_is_drawn_as_often_as_asked(half):
    coins = {"xflip": 0.5, "yflip": 0.5, "rotate_int": 0.75, "lumaflip": 0.5}
    for name in LABELS:
        drawn = half[name].any(1).double()
        share = 0.4 * coins.get(name, 1.0)
        # A shift of less than half of its pixels is none: (1/8)^2 of them.
        share *= 1 - 1 / 64 if name == "translate_int" else 1
        assert drawn.mean() == near(share, 0.5), name
    both = half["scale"].any(1) & half["hue"].any(1)
    assert both.double().mean() == near(0.16, 0.4)


def test_parameters_have_the_published_laws(half):
    for name in ("scale", "translate_frac", "brightness", "contrast", "saturation"):
        drawn = half[name][half[name].any(1)]
        assert drawn.mean() == near(0)
        assert drawn.std() == near(1), name
    for name in ("rotate_frac", "hue"):
        drawn = half[name][half[name].any(1)] / math.pi
        assert drawn.abs().max() <= 1
        assert drawn.mean() == near(0, 0.6)
        assert drawn.square().mean() == near(1 / 3, 0.3)
    across, right = half["aniso"][half["aniso"].any(1)].T
    assert across.std() == near(1)
    turned = right[right != 0] / math.pi
    assert len(turned) / len(right) == near(0.5, 0.5)
    assert turned.square().mean() == near(1 / 3, 0.5)
    turns = half["rotate_int"].flatten().long().bincount() / COUNT
    assert turns.tolist() == [near(0.7), near(0.1), near(0.1), near(0.1)]
    pixels = half["translate_int"] * 4
    assert torch.equal(pixels, pixels.round())
    assert pixels.unique().tolist() == list(range(-4, 5))


def test_the_strengths_scale_what_is_drawn():
    pipe = dataclasses.replace(EVERYTHING, rotate_frac_max=0.25, hue_max=0.5, aniso_rotate_prob=0.0)
    drawn = pipe.draw(draws(200), (32, 32))
    assert math.pi / 4 * 0.95 < drawn["rotate_frac"].abs().max() <= math.pi / 4
    assert math.pi / 2 * 0.95 < drawn["hue"].abs().max() <= math.pi / 2
    assert not drawn["aniso"][:, 1].any()
    x = images()
    for name in ("scale", "aniso", "translate_frac", "brightness", "contrast", "saturation"):
        stronger = dataclasses.replace(EVERYTHING, **{f"{name}_std": 0.4})
        value = (1.0, 0.0) if name in ("aniso", "translate_frac") else 1.0
        more = np.multiply(value, 0.4 / getattr(EVERYTHING, f"{name}_std"))
        torch.testing.assert_close(
            transformed(x, stronger, **{name: value}), transformed(x, **{name: more}),
            atol=1e-5, rtol=0,
        )  # fmt: skip


def test_a_large_number_gives_every_image_a_fair_flip():
    x = images(1, 1, 4, 4).expand(2000, 1, 4, 4)
    y, labels = EDMAugment(p=0.12, xflip=1e8)(x, draws(2000))
    flipped = labels[:, 0] == 1
    assert flipped.double().mean() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(y[flipped], x[flipped].flip(3))
    assert torch.equal(y[~flipped], x[~flipped])


def test_zero_labels_and_untouched_images_are_the_same_rows():
    x = images(300, height=8, width=8)
    before = x.clone()
    y, labels = dataclasses.replace(EVERYTHING, p=0.05)(x, draws(300))
    untouched = (y == x).flatten(1).all(1)
    assert torch.equal(untouched, ~labels.any(1))
    assert 50 < untouched.sum() < 280
    assert torch.equal(x, before)
    none, zeros = dataclasses.replace(EVERYTHING, p=0.0)(x, draws(300))
    assert torch.equal(none, x)
    assert not zeros.any()


def test_labels_tell_all_there_is_to_know():
    pipe = dataclasses.replace(EVERYTHING, p=0.5, aniso_rotate_prob=0.0)
    x = images(40)
    y, labels = pipe(x, draws(40))
    columns = dict(zip(LABELS, labels.double().split(list(LABELS.values()), 1), strict=True))
    for name in ("rotate_frac", "hue"):
        cos, sin = columns[name].T
        columns[name] = torch.atan2(sin, cos + 1)[:, None]
    first, second = columns["rotate_int"].T
    columns["rotate_int"] = torch.where(second == 1, 3 - first, first)[:, None]
    torch.testing.assert_close(pipe.transform(x, columns), y, atol=1e-3, rtol=0)


@pytest.mark.parametrize("pipe", [EDM_CIFAR10, dataclasses.replace(EVERYTHING, p=0.4)])
def test_an_image_does_not_depend_on_the_others(pipe):
    x, all_draws = images(31), draws(31, step=5)
    y, labels = pipe(x, all_draws)
    for size in (1, 3, 16):
        parts = [slice(start, start + size) for start in range(0, 31, size)]
        pairs = [pipe(x[rows], all_draws.select(rows)) for rows in parts]
        assert torch.equal(torch.cat([image for image, _ in pairs]), y)
        assert torch.equal(torch.cat([label for _, label in pairs]), labels)
    other, others = pipe(x, draws(31, step=6))
    assert not torch.equal(others, labels)
    assert not torch.equal(other, y)


def test_a_transformation_does_not_depend_on_those_beside_it():
    alone = EDMAugment(p=0.5, scale=1.0).draw(draws(50), (8, 8))["scale"]
    among = dataclasses.replace(EVERYTHING, p=0.5).draw(draws(50), (8, 8))["scale"]
    assert torch.equal(among, alone)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": -0.1, "xflip": 1.0}, r"EDMAugment\.p: -0\.1 given, accepted: 0 to 1"),
        ({"p": 1.2, "xflip": 1.0}, r"\.p: 1\.2 given"),
        ({"p": 0.1, "scale": -1.0}, r"\.scale: -1\.0 given, accepted: a finite number, 0 or more"),
        ({"p": 0.1, "xflip": math.inf}, r"\.xflip: inf given"),
        ({"p": 0.1, "hue": 1.0, "hue_max": 1.5}, r"\.hue_max: 1\.5 given, accepted: above 0, to 1"),
        ({"p": 0.1, "translate_int": 1.0, "translate_int_max": 0.0}, r"_max: 0\.0 given"),
        ({"p": 0.1, "aniso": 1.0, "aniso_rotate_prob": 2.0}, r"prob: 2\.0 given"),
        ({"p": 0.1, "scale": 1.0, "scale_std": -0.1}, r"\.scale_std: -0\.1 given"),
        ({"p": 0.1, "scale": 1.0, "scale_std": 1e3}, r"\.scale_std: 1000\.0 given, .* 0 to 10"),
        ({"p": 0.1}, r"no transformation given, accepted: one or more of xflip, .*xflip=1\.0"),
        ({"p": 0.1, "flip": 1.0}, r"flip"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        EDMAugment(**arguments)


class Plain(Network):
    def __init__(self, augment_dim):
        super().__init__()
        self.augment_dim = augment_dim


@pytest.mark.parametrize(
    ("augment", "labels", "message"),
    [
        (EDM_CIFAR10, 0, r"network: augment_dim 0 given, accepted: 9.*augment_dim=9, or leave"),
        (EDM_CIFAR10, 6, r"augment_dim 6 given, accepted: 9"),
        (MEANFLOW_CIFAR10, 9, r"augment_dim 9 given, accepted: 6"),
        (EDMAugment(p=0.1, hue=1.0), 2, r"augment\.hue: .*\(1, 8, 8\), accepted: 3 channels"),
    ],
)
def test_a_network_that_is_not_told_is_refused(augment, labels, message):
    with pytest.raises(ConfigError, match=message):
        check_augment(augment, Plain(labels), Digits())


def test_what_fits_is_accepted():
    check_augment(EDM_CIFAR10, Plain(9), Digits())
    check_augment(None, Plain(9), Digits())  # e.g. to go on from EDM's weights
    check_augment(None, Plain(0), Gaussian2D(size=4))


@pytest.mark.parametrize(
    ("pipe", "shape", "message"),
    [
        (EDM_CIFAR10, (2,), r"augment: EDMAugment given .*\(2,\), accepted: images \(C, H, W\)"),
        (EDMAugment(p=0.1, rotate_int=1.0), (3, 8, 9), r"rotate_int: .*accepted: square images"),
        (EDMAugment(p=0.1, contrast=1.0), (4, 8, 8), r"contrast: .*accepted: 1 or 3 channels"),
        (EDMAugment(p=0.1, saturation=1.0), (1, 8, 8), r"saturation: .*accepted: 3 channels"),
    ],
)
def test_samples_that_cannot_be_augmented_are_refused(pipe, shape, message):
    with pytest.raises(ConfigError, match=message):
        pipe.check(shape)


# In an experiment

THREE = EDMAugment(p=0.5, xflip=1.0, translate_frac=1.0)  # as many labels as tiny.digits takes


def test_an_experiment_keeps_its_augmentation():
    experiment = digits(augment=EDM_CIFAR10)
    assert from_plain(to_plain(experiment)) == experiment
    changed = override(experiment, ["augment.p=0.15", "augment.yflip=0"])
    assert changed.augment == dataclasses.replace(EDM_CIFAR10, p=0.15, yflip=0.0)
    assert override(experiment, ["augment=null"]).augment is None
    assert digits().augment is None


@pytest.mark.parametrize(
    "method",
    [EDM(), CM(pairs=RATIO, boundary=0.0), CM(pairs=RATIO, target=FixedDecay(mu=0.9))],
    ids=["EDM", "CM", "CM with a target"],
)
def test_methods_hand_the_labels_to_every_network_they_train(method):
    parts = Parts.of(digits(augment=THREE, method=method), World())
    batch = next(parts.loader.batches())
    assert batch.augment.shape == (8, 3)
    assert batch.augment.any()
    seen = []
    for network in (parts.networks.student, *parts.networks.companions.values()):
        network.model.register_forward_pre_hook(lambda _, given: seen.append(given[3]))
    now = Progress(step=0, images=0, total_steps=6, batch_size=8, curriculum={"ratio": 0.5})
    method.loss(parts.networks, batch, now)
    assert len(seen) == (1 if isinstance(method, EDM) else 2)
    assert all(labels is batch.augment for labels in seen)


def test_a_run_resumes_with_augmentation(tmp_path):
    experiment = digits(augment=THREE, dropout=0.0, steps=2)
    straight = train(experiment, tmp_path / "straight")
    train(experiment, tmp_path / "stopped", stop_at=1)
    assert_same(train(experiment, tmp_path / "stopped"), straight)
