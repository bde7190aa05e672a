"""Every method on points in the plane, small, and all numbers of a run of it, however divided.

Functions of a module, so that other processes can call them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from callbacks.ema import EMACallback
from callbacks.grad_clip import GradClipCallback
from callbacks.nonfinite import NonFiniteGuard
from fastflow.build import Parts, build_network
from fastflow.callback import Driver
from fastflow.config import Lazy, lazy
from fastflow.consistency import GridPairing
from fastflow.data.digits import Digits
from fastflow.data.toy import GaussianMixture2D
from fastflow.distributed import World, full_tensor
from fastflow.ema import ConstantEMA
from fastflow.errors import CheckpointError
from fastflow.evaluation.evaluate import evaluate
from fastflow.evaluation.spec import Evaluation
from fastflow.evaluation.toy_metrics import EnergyDistance
from fastflow.experiment import Experiment, Parallel
from fastflow.generate import generate, step_times
from fastflow.guidance import MixedGuidance
from fastflow.method import FlowMapMethod, Frozen
from fastflow.model import Model
from fastflow.rows import FirstRows
from fastflow.schedules import FixedDecay, LinearRamp
from fastflow.state import TrainState
from fastflow.tangent import DualNumbers, FunctionalJVP
from fastflow.teacher import Teacher
from fastflow.times import LogitNormal, PairLaw
from fastflow.trainer import Trainer
from fastflow.weights import gathered, write_weights
from fastflow.wrappers import EDMDenoiser, TrigFlowNetwork, VelocityNetwork
from methods.cm import CM
from methods.ect import ECT
from methods.edm import EDM
from methods.flow_matching import FlowMatching
from methods.ict import ICT
from methods.mean_flow import MeanFlow, MeanFlowEDM
from methods.scm import SCM
from methods.tcm import TCM
from networks.edm2 import LogVariance
from networks.mlp import ToyMLP
from networks.song_unet import SongUNet
from processes import Collectives, Memory
from tiny import GRID_CURRICULUM, RATIO, RATIO_CURRICULUM, everything

CLASSES = 4
HEAD = lazy(LogVariance, channels=8)


def mlp(**options: Any) -> Lazy:
    return lazy(ToyMLP, **{"data_dim": 2, "width": 16, "depth": 2, "cond_dim": CLASSES, **options})


DENOISER = lazy(EDMDenoiser, model=mlp())
WITH_HEAD = lazy(EDMDenoiser, model=mlp(), logvar_head=HEAD)
TRIG = lazy(TrigFlowNetwork, model=mlp(), logvar_head=HEAD)
VELOCITY = lazy(VelocityNetwork, model=mlp())
AVERAGE = lazy(VelocityNetwork, model=mlp(two_times=True))
AVERAGE_EDM = lazy(EDMDenoiser, model=mlp(two_times=True))
UNET = lazy(
    EDMDenoiser,
    model=lazy(
        SongUNet,
        resolution=8,
        in_channels=1,
        out_channels=1,
        cond_dim=10,
        channels=8,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(4,),
        dropout=0.0,
    ),
)
WEIGHTS = {"denoiser": DENOISER, "velocity": VELOCITY}

RAMP = LinearRamp(steps=2)
V0 = PairLaw(times=LogitNormal(mean=-2.0, std=2.0), equal=0.25)
V1 = PairLaw(
    times=LogitNormal(mean=-0.6, std=1.6),
    ends=LogitNormal(mean=-4.0, std=1.6),
    equal=0.25,
    order="clip",
)
GUIDED = MixedGuidance(omega=0.8, kappa=0.3, dropped=FirstRows(count="binomial"))


def methods(folder: Path) -> dict[str, tuple[FlowMapMethod, Lazy]]:
    """Every method with its network, by name; the weights of teachers are in `folder`."""
    denoiser = Frozen(weights=str(folder / "denoiser.safetensors"), network=DENOISER)
    velocity = Frozen(weights=str(folder / "velocity.safetensors"), network=VELOCITY)
    teacher, target = Teacher(source=denoiser, guidance=1.5), FixedDecay(mu=0.9)
    dual, func = DualNumbers(), FunctionalJVP()
    return {
        "cm": (CM(pairs=RATIO, boundary=0.0), DENOISER),
        "ct": (CM(pairs=GridPairing(), target=target), DENOISER),
        "cd": (CM(pairs=GridPairing(), target=target, teacher=teacher), DENOISER),
        "ict": (ICT(), DENOISER),
        "ect": (ECT(), DENOISER),
        "ecd": (ECT(teacher=teacher), DENOISER),
        "tcm": (TCM(stage1=denoiser), DENOISER),
        "sct": (SCM(warmup=RAMP), TRIG),
        "sct, dual numbers": (SCM(warmup=RAMP, engine=dual), TRIG),
        "sct, func.jvp": (SCM(warmup=RAMP, engine=func), TRIG),
        "scd": (SCM(warmup=RAMP, teacher=teacher), TRIG),
        "meanflow v0": (MeanFlow(times=V0), AVERAGE),
        "meanflow v0, dual numbers": (MeanFlow(times=V0, engine=dual), AVERAGE),
        "meanflow v0, func.jvp": (MeanFlow(times=V0, engine=func), AVERAGE),
        "meanflow v1": (MeanFlow(times=V1), AVERAGE),
        "meanflow in EDM's units": (MeanFlowEDM(least_gap=0.002), AVERAGE_EDM),
        "meanflow, guided": (MeanFlow(times=V0, guidance=GUIDED), AVERAGE),
        "meanflow, teacher": (MeanFlow(times=V0, teacher=Teacher(source=velocity)), AVERAGE),
        "edm": (EDM(), WITH_HEAD),
        "flow matching": (FlowMatching(), VELOCITY),
    }


NAMES = tuple(methods(Path()))


def write_teachers(folder: Path) -> None:
    """Weights of the networks that others start from or learn from."""
    for name, node in WEIGHTS.items():
        network = build_network(_experiment(EDM(), DENOISER), name, node)
        write_weights(folder / f"{name}.safetensors", gathered(network.state_dict(), True), {})


def experiment(name: str, folder: Path, **changes: Any) -> Experiment:
    """A method of `NAMES`; TCM starts from its first stage."""
    method, network = methods(folder)[name]
    start = method.stage1.weights if isinstance(method, TCM) else None
    return dataclasses.replace(_experiment(method, network), init_from=start, **changes)


def _experiment(method: FlowMapMethod, network: Lazy) -> Experiment:
    curricula = {"ratio": RATIO_CURRICULUM, "N": GRID_CURRICULUM}
    return Experiment(
        name="sharded",
        method=method,
        network=network,
        data=lazy(GaussianMixture2D, modes=CLASSES, size=200),
        # Linear in the gradient: what differs by rounding still does so after a step.
        optimizer=lazy(torch.optim.SGD, lr=0.02, momentum=0.9),
        batch_size=16,
        steps=4,
        callbacks=(
            *(curricula[name] for name in sorted(method.needs)),
            lazy(NonFiniteGuard, every=2),
            lazy(GradClipCallback, max_norm=1.0),
            lazy(EMACallback, law=ConstantEMA(beta=0.9)),
        ),
        evaluation=Evaluation(metrics=(), samples=16, steps=(1, 2), quantisation="none"),
    )


class Watch(Driver):
    """Notes the loss, all gradients before they are clipped, and their norm."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def before_update(self, state: TrainState) -> None:
        step, student = state.step, state.networks.student
        self.seen[f"loss {step}"] = state.metrics["loss"].clone()
        for name, parameter in student.named_parameters():
            if parameter.grad is not None:
                self.seen[f"gradient {step} {name}"] = full_tensor(parameter.grad).clone()

    def after_update(self, state: TrainState) -> None:
        self.seen[f"norm {state.step}"] = state.metrics["grad_norm"]


def record(world: World, experiment: Experiment, run_dir: Path) -> dict[str, Tensor]:
    """Train; losses, gradients, weights, averages, optimizer state and samples, whole."""
    trainer = Trainer(experiment, run_dir, world)
    watch = Watch()
    trainer.drivers.insert(0, watch)
    state = trainer.fit()
    found = {
        name: full_tensor(value) for name, value in {**watch.seen, **everything(state)}.items()
    }
    for weights in ("student", *state.emas):
        found[f"samples of {weights}"] = _samples(state, weights)
    return found


def farthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of two tensors of one name, over the size of the second; its name."""
    assert ours.keys() == theirs.keys()
    return max((error(ours[name], value), name) for name, value in theirs.items())


def error(ours: Tensor, theirs: Tensor) -> float:
    """The difference over the size, which counts as 1e-3 at least."""
    ours, theirs = (full_tensor(value).detach().double() for value in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-3))


def _samples(state: TrainState, weights: str) -> Tensor:
    student, method = state.networks.student, state.method
    network = method.for_sampling(state.networks)
    rows = one_hot(torch.arange(8) % student.cond_dim, student.cond_dim).float()
    times = step_times(method, 2)
    if weights == "student":
        return generate(method, network, range(8), student.sample_shape, times, rows)
    with state.emas[weights].swapped_into(student):
        return generate(method, network, range(8), student.sample_shape, times, rows)


def record_named(world: World, name: str, folder: Path, run: str, **changes: Any) -> Any:
    """`record` of a method by its name in `folder / run`; what the main process found."""
    found = record(world, experiment(name, folder, **changes), folder / run)
    return found if world.is_main else None


def record_narrow(world: World, run_dir: Path, parallel: Parallel) -> Any:
    """`record` of a U-Net on the digits in bfloat16; what the main process found."""
    made = dataclasses.replace(
        _experiment(ECT(), UNET),
        data=lazy(Digits),
        precision="bf16",
        batch_size=8,
        steps=3,
        parallel=parallel,
    )
    found = record(world, made, run_dir)
    return found if world.is_main else None


class Held(NamedTuple):
    """Bytes that a process made, and held at most; those of all weights, and of the largest."""

    made: int
    peak: int
    whole: int
    largest: int


def build_parts(world: World, folder: Path) -> tuple[dict[str, Tensor], Held]:
    """All weights that a distillation with a target starts from, and what building them took."""
    wide = lazy(EDMDenoiser, model=mlp(width=256, depth=4), logvar_head=HEAD)
    teacher = Teacher(source=Frozen(weights=str(folder / "wide.safetensors")))
    method = CM(pairs=GridPairing(), target=FixedDecay(mu=0.9), teacher=teacher)
    source = str(folder / "wide.safetensors")
    made = dataclasses.replace(
        _experiment(method, wide), init_from=source, parallel=Parallel(shard=world.size)
    )
    if not Path(source).exists():  # as one process
        network = build_network(made, "teacher", wide)
        write_weights(Path(source), gathered(network.state_dict(), True), {})
    with Memory() as memory:
        networks = Parts.of(made, world).networks
    named = {"student": networks.student, **networks.companions}
    weights = {
        f"{name} {key}": tensor
        for name, network in named.items()
        for key, tensor in gathered(network.state_dict(), True).items()
    }
    sizes = [tensor.nbytes for tensor in weights.values()]
    return weights, Held(memory.made, memory.peak, sum(sizes), max(sizes))


def mistake(world: World, folder: Path) -> str:
    """What a process says of initial weights that are not there."""
    made = experiment("tcm", folder, parallel=Parallel(shard=world.size))
    try:
        Parts.of(dataclasses.replace(made, init_from=str(folder / "none.safetensors")), world)
    except CheckpointError as error:
        return str(error)
    raise AssertionError("nothing was said")


class Averaging(Driver):
    """Notes what is communicated from the gradient to the end of the step; the last driver."""

    def __init__(self) -> None:
        self.collectives = Collectives()

    def before_update(self, state: TrainState) -> None:
        self.collectives.__enter__()

    def after_update(self, state: TrainState) -> None:
        self.collectives.__exit__(None, None, None)


def communication(world: World, folder: Path, parallel: Parallel) -> tuple[int, list[Any]]:
    """How often one step of a method with all companions sums gradients; collectives after it."""
    trainer = Trainer(experiment("cd", folder, parallel=parallel), folder / "none", world)
    averaging = Averaging()
    trainer.drivers.append(averaging)
    # As older versions of torch leave it after a forward pass, in the root at least.
    trainer.state.networks["target"].set_reshard_after_forward(False)
    with Collectives() as collectives:
        trainer._step(next(trainer.loader.batches(0)))
    assert trainer.state.emas
    return len(collectives.named("reduce_scatter")), averaging.collectives.seen


def evaluated(world: World, run_dir: Path) -> list[Any]:
    """Results of a trained model without what names the machine, each process with its share."""
    evaluation = Evaluation(
        metrics=(EnergyDistance(),), samples=80, batch_size=16, steps=(1, 2), quantisation="none"
    )
    model = Model.load(run_dir)
    rows = evaluate(model, evaluation, GaussianMixture2D(modes=CLASSES, size=200), world)
    return [(row.steps, row.value, row.samples) for row in rows]
