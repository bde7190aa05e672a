"""A frozen diffusion or flow model that a method distils, with its guidance."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastflow.errors import ConfigError
from fastflow.method import Companion, Frozen, Networks
from fastflow.network import Network
from fastflow.parts import Part
from fastflow.path import VE, Linear, Path, TrigFlow, expand
from fastflow.sampling import Denoiser

TEACHER, GUIDE = "teacher", "guide"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher(Part):
    """What a method distils: D_w = D_g + w (D - D_g), w = 1 for no guidance.

    D_g is the same model without its class (classifier-free guidance, arXiv 2207.12598; the
    unconditional row is all zeros), or a weaker model with the class (autoguidance, arXiv
    2406.02507). Augmented samples keep their labels for models that know of them (`augment_dim`).

    Attributes:
        source: the model: a denoiser, a velocity or a TrigFlow network of one time.
        guidance: w.
        guide: the weaker model; None for classifier-free guidance.
        interval: times of the method's path between which guidance acts (arXiv 2404.07724); None
            for all.
    """

    source: Frozen
    guidance: float = 1.0
    guide: Frozen | None = None
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guide is not None and self.guidance == 1:
            raise ConfigError(
                "Teacher.guide: given with guidance 1, which never asks it; leave it out, or set "
                "guidance, e.g. 2.0"
            )
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ConfigError(
                f"Teacher.interval: {self.interval} given, accepted: two times, 0 or more, the "
                f"smaller one first"
            )

    def companions(self) -> dict[str, Companion]:
        """The networks that the trainer must build, by name."""
        extra: dict[str, Companion] = {TEACHER: self.source}
        if self.guide is not None:
            extra[GUIDE] = self.guide
        return extra

    def check(self, nets: Networks) -> None:
        """Raise ConfigError where the teacher does not fit the student."""
        student = nets.student
        for name in self.companions():
            network = nets[name]
            native_path(network, name)
            if network.two_times:
                raise ConfigError(f"{name}: a network of two times given, accepted: of one time")
            if student.cond_dim not in (0, network.cond_dim):
                raise ConfigError(
                    f"{name}: cond_dim {network.cond_dim} given, accepted: {student.cond_dim}, "
                    f"that of the student"
                )
            if student.augment_dim and network.augment_dim not in (0, student.augment_dim):
                raise ConfigError(
                    f"{name}: augment_dim {network.augment_dim} given, accepted: 0 or "
                    f"{student.augment_dim}, that of the student"
                )
        if student.cond_dim == 0 and self.guide is None and self.guidance != 1:
            raise ConfigError(
                f"method.teacher.guidance: {self.guidance} given without classes, accepted: 1; or "
                f"train a network of classes (cond_dim), or name a weaker model (guide)"
            )

    def denoiser(
        self, nets: Networks, path: Path, cond: Tensor | None, augment: Tensor | None = None
    ) -> Denoiser:
        """D(x, t) [B, ...] for states and times of `path`, guided, without a graph.

        Args:
            nets: with the companions of this teacher.
            path: the interpolant of x and t; the teacher's own may be another.
            cond: class rows [B, cond_dim], or None.
            augment: augmentation labels [B, augment_dim], or None.
        """
        source = denoised_by(nets[TEACHER], path, cond, augment)
        if self.guidance == 1:
            return torch.no_grad()(source)
        if self.guide is not None:
            guide = denoised_by(nets[GUIDE], path, cond, augment)
        else:
            rows = None if cond is None else torch.zeros_like(cond)
            guide = denoised_by(nets[TEACHER], path, rows, augment)

        @torch.no_grad()
        def denoise(x: Tensor, t: Tensor) -> Tensor:
            weak, strong = guide(x, t), source(x, t)
            out = weak + self.guidance * (strong - weak)
            if self.interval is None:
                return out
            acts = (t >= self.interval[0]) & (t <= self.interval[1])
            return torch.where(expand(acts, x), out, strong)

        return denoise


def native_path(network: Network, name: str = "network") -> Path:
    """The interpolant that a network's prediction refers to.

    Raises:
        ConfigError: the network predicts something else.
    """
    if network.predicts == "denoiser":
        return VE()
    if network.predicts == "velocity":
        return Linear()
    if network.predicts == "trigflow":
        return TrigFlow(sigma_data=network.sigma_data)
    raise ConfigError(
        f"{name}: predicts {network.predicts!r}, accepted: 'denoiser', 'velocity', 'trigflow'"
    )


def denoised_by(
    network: Network, path: Path, cond: Tensor | None = None, augment: Tensor | None = None
) -> Denoiser:
    """D(x, t) of any network, for states and times of any path.

    Paths agree at equal noise-to-signal ratio, where D is the same (arXiv 2206.00364, section 2).
    A network of two times is asked at s = t, where its average velocity is that of the moment.

    Args:
        network: predicts a denoiser, a velocity or TrigFlow's F.
        path: the interpolant of x and t.
        cond: class rows [B, cond_dim], or None.
        augment: augmentation labels [B, augment_dim], or None; not for networks without.
    """
    native = native_path(network)
    same = type(native) is type(path)
    if isinstance(native, TrigFlow) and isinstance(path, TrigFlow):
        same = native.sigma_data == path.sigma_data
    labels = augment if network.augment_dim else None

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if not same:
            x, t = path.convert(x, t, native)
        end = {"s": t} if network.two_times else {}
        out: Tensor = network(x, t, cond=cond, augment=labels, **end)
        if network.predicts == "denoiser":
            return out
        velocity = out if network.predicts == "velocity" else network.sigma_data * out
        return native.denoised_from_velocity(x, velocity, t)

    return denoise
