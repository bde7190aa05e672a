"""Augmentation of training images, with labels that tell the network what was done.

A network that is given the labels learns the augmented images without mixing them into what it
generates: at sampling time the labels are zero, which stands for a clean image. Source: EDM
(Karras et al. 2022, arXiv 2206.00364, appendix F.2); the resampling is that of StyleGAN2-ADA
(arXiv 2006.06676, appendix B).

Image i depends on its own draws alone: parameters are made on the CPU one number at a time, and
pixels by sums in a fixed order, so that no bit changes with the other images of the batch.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastflow.errors import ConfigError
from fastflow.parts import Part
from fastflow.rng import Draws, to_device

Drawn = Mapping[str, Tensor]
"""Parameters [B, n] of the transformations by name, float64 on the CPU; zeros do nothing."""


LABELS = {
    "xflip": 1,
    "yflip": 1,
    "rotate_int": 2,
    "translate_int": 2,
    "scale": 1,
    "rotate_frac": 2,
    "aniso": 2,
    "translate_frac": 2,
    "brightness": 1,
    "contrast": 1,
    "lumaflip": 1,
    "hue": 2,
    "saturation": 1,
}
"""Number of labels of each transformation, in order."""

PIXELS = ("xflip", "yflip", "rotate_int", "translate_int")
GEOMETRY = ("scale", "rotate_frac", "aniso", "translate_frac")
COLOUR = ("brightness", "contrast", "lumaflip", "hue", "saturation")

SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
"""Low-pass of the least asymmetric orthogonal wavelet of 6 vanishing moments (Daubechies 1992)."""

# One side of the filter in pixels, and how far it reads beyond the doubled image's edge.
_SIDE = len(SYM6) // 4
_REACH = len(SYM6) // 2 - 1


class Augment(Part, abc.ABC):
    """Random changes of training images, each told to the network by a row of labels."""

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """Number of labels of an image: the network's `augment_dim`."""

    @abc.abstractmethod
    def __call__(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Changed images [B, C, H, W] and their labels [B, dim], float32, on the device of `x`.

        Args:
            x: images [B, C, H, W], float32 in [-1, 1]; they are left as they are.
            draws: random numbers of the images, on the same device. An image that draws nothing
                is returned to the bit, with a row of zeros.
        """

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ConfigError unless samples of this shape can be augmented."""
        if len(shape) != 3:
            raise ConfigError(
                f"augment: {type(self).__name__} given for samples of shape {shape}, accepted: "
                f"images (C, H, W); leave augment out"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMAugment(Augment):
    """EDM's augmentation (arXiv 2206.00364, appendix F.2, table 6, and the official settings).

    An image gets each transformation with probability min(1, p m), m being the number given here
    under its name; 0 leaves the transformation and its labels out. Labels stand in the order of
    the names below, w being a standard normal number and z a uniform one in [-1, 1]:

        xflip, yflip                 1 each: 1 where the image is flipped, which half of them are
        rotate_int                   2: 0 to 3 quarter turns as (0, 0), (1, 0), (1, 1), (0, 1)
        translate_int                2: right and up, z rounded to whole pixels
        scale                        1: w, larger by 2^(scale_std w)
        rotate_frac                  2: cos a - 1 and sin a, a = pi rotate_frac_max z
        aniso                        2: w cos r and w sin r, longer by 2^(aniso_std w) along r,
                                     shorter by as much across
        translate_frac               2: w to the right and w downwards
        brightness, contrast         1 each: w; colours + brightness_std w, times 2^(contrast_std w)
        lumaflip                     1: 1 where light and dark are exchanged, half of them
        hue                          2: cos a - 1 and sin a, a = pi hue_max z
        saturation                   1: w, colours 2^(saturation_std w) times as far from grey

    Angles turn counterclockwise as one sees it. Flips and the *_int transformations move whole
    pixels. Those from scale to translate_frac are applied in this order as one affine map about
    the image's centre: the image goes on mirrored for its own size beyond each edge (farther out
    is 0, mid-grey), is doubled and reduced again by a wavelet low-pass and its mirror image, and
    read between the two bilinearly. As that filter is not quite symmetric, the map's centre lies
    a fifth of a pixel off the image's. Colours leave [-1, 1]; they are not clamped. Grey images
    take the mean of the three colours' change.

    Attributes:
        p: probability of a transformation whose number is 1.
        translate_int_max: largest translate_int, of the width and height.
        scale_std: standard deviation of log2 of the scale.
        rotate_frac_max: largest angle, of half a turn.
        aniso_std: standard deviation of log2 of the stretch.
        aniso_rotate_prob: share of stretches in a direction r uniform in [-pi, pi]; the others
            are along the rows, r = 0.
        translate_frac_std: standard deviation of the shift, of the width and height.
        brightness_std: standard deviation of the shift of colours.
        contrast_std: standard deviation of log2 of the factor on colours.
        hue_max: largest angle about the grey axis, of half a turn.
        saturation_std: standard deviation of log2 of the factor on the distance from grey.
    """

    p: float
    xflip: float = 0.0
    yflip: float = 0.0
    rotate_int: float = 0.0
    translate_int: float = 0.0
    scale: float = 0.0
    rotate_frac: float = 0.0
    aniso: float = 0.0
    translate_frac: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    lumaflip: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0
    translate_int_max: float = 0.125
    scale_std: float = 0.2
    rotate_frac_max: float = 1.0
    aniso_std: float = 0.2
    aniso_rotate_prob: float = 0.5
    translate_frac_std: float = 0.125
    brightness_std: float = 0.2
    contrast_std: float = 0.5
    hue_max: float = 1.0
    saturation_std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_max"):
                fits, accepted = 0 < value <= 1, "above 0, to 1"
            elif field.name.endswith("_std"):
                fits, accepted = 0 <= value <= 10, "0 to 10"
            elif field.name in ("p", "aniso_rotate_prob"):
                fits, accepted = 0 <= value <= 1, "0 to 1"
            else:
                fits, accepted = 0 <= value < math.inf, "a finite number, 0 or more"
            if not fits:
                raise ConfigError(f"EDMAugment.{field.name}: {value} given, accepted: {accepted}")
        if not self.enabled:
            raise ConfigError(
                f"EDMAugment: no transformation given, accepted: one or more of "
                f"{', '.join(LABELS)}, e.g. xflip=1.0; or leave augment out"
            )

    @property
    def enabled(self) -> tuple[str, ...]:
        """Names of the transformations that may be drawn, in the order of their labels."""
        return tuple(name for name in LABELS if getattr(self, name) > 0)

    @property
    def dim(self) -> int:
        return sum(LABELS[name] for name in self.enabled)

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        channels, height, width = shape
        enabled = set(self.enabled)
        for names, fits, accepted in (
            (("rotate_int",), height == width, "square images"),
            (("brightness", "contrast", "lumaflip"), channels in (1, 3), "1 or 3 channels"),
            (("hue", "saturation"), channels == 3, "3 channels"),
        ):
            for name in names:
                if name in enabled and not fits:
                    raise ConfigError(
                        f"augment.{name}: given for samples of shape {shape}, accepted: "
                        f"{accepted}; leave it out"
                    )

    def __call__(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        drawn = self.draw(draws.on_cpu(), (x.shape[-1], x.shape[-2]))
        return self.transform(x, drawn), draws.move(self.labels(drawn))

    def draw(self, draws: Draws, size: tuple[int, int]) -> dict[str, Tensor]:
        """Parameters of the enabled transformations for images of this width and height."""
        largest = torch.tensor(size) * self.translate_int_max

        def aniso(u: Tensor) -> Tensor:
            turned = u[:, 2:] < self.aniso_rotate_prob
            direction = torch.where(turned, math.pi * _symmetric(u[:, 1:2]), 0.0)
            return torch.cat([_normal(u[:, :1]), direction], 1)

        # How many uniform numbers, and what is made of them.
        laws: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
            "xflip": (1, _coin),
            "yflip": (1, _coin),
            "rotate_int": (1, lambda u: (4 * u).floor()),
            "translate_int": (2, lambda u: (_symmetric(u) * largest).round() / largest),
            "scale": (1, _normal),
            "rotate_frac": (1, lambda u: math.pi * self.rotate_frac_max * _symmetric(u)),
            "aniso": (3, aniso),
            "translate_frac": (2, _normal),
            "brightness": (1, _normal),
            "contrast": (1, _normal),
            "lumaflip": (1, _coin),
            "hue": (1, lambda u: math.pi * self.hue_max * _symmetric(u)),
            "saturation": (1, _normal),
        }
        drawn = {}
        for name in self.enabled:
            count, law = laws[name]
            u = draws.uniform(f"augment {name}", (1 + count,))
            chosen = u[:, :1] < self.p * getattr(self, name)
            drawn[name] = torch.where(chosen, law(u[:, 1:]), 0.0)
        return drawn

    def labels(self, drawn: Drawn) -> Tensor:
        """What the network is told of drawn parameters [B, dim], float32."""
        codes: dict[str, Callable[[Tensor], Tensor]] = {
            "rotate_int": lambda v: torch.cat([(v == 1) | (v == 2), v >= 2], 1),
            "rotate_frac": _circle,
            "aniso": lambda v: v[:, :1] * torch.cat(_direction(v[:, 1:]), 1),
            "hue": _circle,
        }
        rows = [codes[n](drawn[n]) if n in codes else drawn[n] for n in self.enabled]
        return torch.cat([row.to(torch.float32) for row in rows], 1)

    def transform(self, x: Tensor, drawn: Drawn) -> Tensor:
        """The images [B, C, H, W] changed by these parameters; without those that are missing."""
        none = torch.zeros(len(x), 2, dtype=torch.float64)
        drawn = {name: drawn.get(name, none) for name in LABELS}
        for names, change in (
            (PIXELS, self._move_pixels),
            (GEOMETRY, self._resample),
            (COLOUR, self._recolour),
        ):
            rows = torch.cat([drawn[name] for name in names], 1).any(1).nonzero().flatten()
            if len(rows):
                changed = {name: drawn[name][rows] for name in names}
                index = to_device(rows, x.device)
                x = x.index_copy(0, index, change(x.index_select(0, index), changed))
        return x

    def _move_pixels(self, x: Tensor, drawn: Drawn) -> Tensor:
        height, width = x.shape[-2:]

        def where(chosen: Tensor, moved: Tensor) -> Tensor:
            return torch.where(to_device(chosen, x.device)[:, None, None, None], moved, x)

        x = where(drawn["xflip"][:, 0] == 1, x.flip(-1))
        x = where(drawn["yflip"][:, 0] == 1, x.flip(-2))
        for turns in (1, 2, 3) if height == width else ():
            x = where(drawn["rotate_int"][:, 0] == turns, x.rot90(turns, (-2, -1)))
        right = (drawn["translate_int"][:, 0] * self.translate_int_max * width).round()
        up = (drawn["translate_int"][:, 1] * self.translate_int_max * height).round()
        columns = to_device(_mirrored(torch.arange(width) - right[:, None], width), x.device)
        rows = to_device(_mirrored(torch.arange(height) + up[:, None], height), x.device)
        x = x.gather(-1, columns[:, None, None, :].expand_as(x))
        return x.gather(-2, rows[:, None, :, None].expand_as(x))

    def _resample(self, x: Tensor, drawn: Drawn) -> Tensor:
        height, width = x.shape[-2:]
        larger = _power_of_two(self.scale_std * drawn["scale"][:, :1])
        longer = _power_of_two(self.aniso_std * drawn["aniso"][:, :1])
        direction = drawn["aniso"][:, 1:]
        # Where a pixel comes from: the inverse of each transformation, the last one first.
        stretch = torch.diag_embed(torch.cat([1 / longer, longer], 1))
        stretch = _product(_product(_turn(-direction), stretch), _turn(direction))
        source = _product(_turn(drawn["rotate_frac"][:, :1]), stretch) / larger[:, None]
        shift = drawn["translate_frac"] * self.translate_frac_std * torch.tensor([width, height])
        return affine(x, _like(source, x), _like(shift, x))

    def _recolour(self, x: Tensor, drawn: Drawn) -> Tensor:
        contrast = _power_of_two(self.contrast_std * drawn["contrast"][:, :1])
        saturation = _power_of_two(self.saturation_std * drawn["saturation"][:, :1])
        along, across = _direction(drawn["hue"][:, :1])
        # All of them leave the grey axis where it is: each is a number along it, and a number and
        # an angle across it.
        lightness = contrast * (1 - 2 * drawn["lumaflip"][:, :1])
        factors = torch.stack(
            [
                lightness,
                lightness * self.brightness_std * drawn["brightness"][:, :1],
                contrast * saturation * along,
                contrast * saturation * across / math.sqrt(3),
            ]
        )
        gain, offset, cos, sin = _like(factors, x)[..., None, None].unbind()
        grey: Tensor = functools.reduce(torch.add, x.split(1, 1)) / x.shape[1]
        turned = x.roll(1, 1) - x.roll(-1, 1)
        return grey * gain + offset + ((x - grey) * cos + turned * sin)


EDM_CIFAR10 = EDMAugment(
    p=0.12, xflip=1e8, yflip=1.0, scale=1.0, rotate_frac=1.0, aniso=1.0, translate_frac=1.0
)
"""9 labels: EDM on CIFAR-10 (arXiv 2206.00364, table 6 and the official training script).

Every image draws its flip. EDM takes p = 0.15 on FFHQ and AFHQ, and none on ImageNet.
"""

MEANFLOW_CIFAR10 = EDMAugment(p=0.12, xflip=1e8, scale=1.0, aniso=1.0, translate_frac=1.0)
"""6 labels: MeanFlow on CIFAR-10 (arXiv 2505.13447), EDM's without yflip and rotate_frac."""


def affine(x: Tensor, source: Tensor, shift: Tensor) -> Tensor:
    """Images whose pixel at o comes from source @ (o - shift) of x, without aliasing.

    Places are (x, y) in pixels from the image's centre, x to the right and y downwards.

    Args:
        x: images [B, C, H, W].
        source: linear maps [B, 2, 2].
        shift: shifts [B, 2].
    """
    height, width = x.shape[-2:]
    x = _both_axes(_extended, x)
    doubled = _both_axes(_double, x)
    right = _places(width, x) - shift[:, 0, None, None]
    down = _places(height, x)[:, None] - shift[:, 1, None, None]
    (xx, xy), (yx, yy) = (row.unbind(1) for row in source[..., None, None].unbind(1))
    grid = torch.stack(
        [
            (xx * right + xy * down) * (2 / x.shape[-1]),
            (yx * right + yy * down) * (2 / x.shape[-2]),
        ],
        -1,
    )
    read = functional.grid_sample(doubled, grid, padding_mode="zeros", align_corners=False)
    return _both_axes(_halve, read)


def _places(size: int, x: Tensor) -> Tensor:
    """Centres of the doubled pixels that make `size` pixels, from the image's centre."""
    first, last = -_REACH, 2 * size + _REACH
    return (torch.arange(first, last, dtype=x.dtype, device=x.device) + 0.5 - size) / 2


def _both_axes(change: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return change(change(x).mT).mT


def _extended(x: Tensor) -> Tensor:
    """Mirrored beyond both ends of the last dimension, as far as the filter reaches or more."""
    size = x.shape[-1]
    margin = max(size - 1, 2 * _SIDE)
    places = _mirrored(torch.arange(-margin, size + margin, device=x.device), size)
    return x.index_select(-1, places)


def _double(x: Tensor) -> Tensor:
    """Twice as many pixels along the last dimension, zeros taken beyond its ends."""
    count, x = x.shape[-1], functional.pad(x, (_SIDE, _SIDE))
    taps = [math.sqrt(2) * tap for tap in reversed(SYM6)]
    halves = [_weighted(x, taps[first::2], first, 1, count) for first in (0, 1)]
    return torch.stack(halves, -1).flatten(-2)


def _halve(x: Tensor) -> Tensor:
    """Undoes `_double`; the last dimension holds `_REACH` more numbers on each side."""
    taps = [tap / math.sqrt(2) for tap in SYM6]
    return _weighted(x, taps, 0, 2, x.shape[-1] // 2 - _REACH)


def _weighted(x: Tensor, taps: Sequence[float], first: int, step: int, count: int) -> Tensor:
    """sum_k taps[k] x[..., first + step i + k] for i = 0 .. count - 1.

    Not a convolution of the library, whose order of summation may depend on the batch.
    """
    ends = first + step * (count - 1) + 1
    return functools.reduce(
        torch.add, (x[..., first + k : ends + k : step] * tap for k, tap in enumerate(taps))
    )


def _mirrored(places: Tensor, size: int) -> Tensor:
    """Whole places on an axis that goes on mirrored about its first and last pixel, int64."""
    period = max(2 * size - 2, 1)
    return (size - 1 - (size - 1 - places % period).abs()).to(torch.int64)


def _turn(angle: Tensor) -> Tensor:
    """Where pixels come from in a counterclockwise turn by `angle` [B, 1]: matrices [B, 2, 2]."""
    cos, sin = _direction(angle)
    return torch.stack([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)], 1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Products of matrices [B, 2, 2]; two terms have but one order."""
    return (a[..., None] * b[:, None]).sum(2)


def _direction(angle: Tensor) -> tuple[Tensor, Tensor]:
    return _each(math.cos, angle), _each(math.sin, angle)


def _circle(angle: Tensor) -> Tensor:
    cos, sin = _direction(angle)
    return torch.cat([cos - 1, sin], 1)


def _coin(u: Tensor) -> Tensor:
    return (2 * u).floor()


def _symmetric(u: Tensor) -> Tensor:
    return 2 * u - 1


def _normal(u: Tensor) -> Tensor:
    return _each(statistics.NormalDist().inv_cdf, u)


def _power_of_two(values: Tensor) -> Tensor:
    return _each(lambda v: math.pow(2.0, v), values)


def _each(function: Callable[[float], float], values: Tensor) -> Tensor:
    """A function of each number by itself; vectorised ones may round by place in the batch."""
    results = [function(value) for value in values.flatten().tolist()]
    return torch.tensor(results, dtype=values.dtype).reshape(values.shape)


def _like(values: Tensor, x: Tensor) -> Tensor:
    return to_device(values.to(x.dtype), x.device)
