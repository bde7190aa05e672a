"""A mistake ends in one line that names it, with exit status 2, and nothing is written or lost.

Most mistakes are generated from the configurations that come with fastflow: every key misspelt,
every value of a wrong type, every argument of a configuration file misspelt or of a wrong type.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fastflow import cli
from fastflow.annotations import describe
from fastflow.config import load_experiment
from fastflow.experiment import Experiment
from fastflow.parts import Lazy, Part, parameters
from fastflow.trainer import Trainer

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "configs" / "experiments"
DIGITS = EXPERIMENTS / "Digits" / "config_cm_digits.py"
TOY = EXPERIMENTS / "Toy" / "config_cm_gaussian_mixture.py"
CIFAR10 = EXPERIMENTS / "EDM" / "config_cm_cifar10.py"


@dataclasses.dataclass(frozen=True)
class Mistake:
    """Words after `fastflow train --config CONFIG`, and what the one line must contain."""

    config: Path
    words: tuple[str, ...]
    says: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.config.stem.removeprefix('config_cm_')}: {' '.join(self.words)}"


# Every key of a configuration misspelt, every value of a wrong type


@dataclasses.dataclass(frozen=True)
class Key:
    """A dotted key that an override can set: what it holds and who owns its last segment."""

    path: tuple[str, ...]
    owner: type
    value: Any

    @property
    def text(self) -> str:
        return ".".join(self.path)

    @property
    def annotation(self) -> Any:
        return parameters(self.owner)[self.path[-1]].annotation

    @property
    def is_leaf(self) -> bool:
        return not any(True for _ in keys(self.value))


def keys(node: Any, path: tuple[str, ...] = ()) -> Iterator[Key]:
    """All named keys below a node, from the outside in."""
    if isinstance(node, Part | Lazy):
        cls = node.target if isinstance(node, Lazy) else type(node)
        for name in parameters(cls):
            if not isinstance(node, Lazy) or name in node.kwargs:
                value = getattr(node, name)
                yield Key((*path, name), cls, value)
                yield from keys(value, (*path, name))
    if isinstance(node, tuple):
        for number, value in enumerate(node):
            yield from keys(value, (*path, str(number)))


def misspelt(name: str, accepted: Mapping[str, Any]) -> str:
    """A name as a hasty person writes it, which is none of the accepted ones."""
    wrong = name[:-2] + name[-1] + name[-2] if len(name) > 1 and name[-1] != name[-2] else name * 2
    return wrong if wrong not in accepted else f"{name}_"


def misspelt_keys(
    config: Path, key: Key, by_path: Mapping[tuple[str, ...], Key]
) -> Iterator[Mistake]:
    """A key with its last segment misspelt, and with the segment before it."""
    *above, name = key.path
    wrong = ".".join([*above, misspelt(name, parameters(key.owner))])
    yield Mistake(config, (f"{wrong}=1",), (f"{wrong}: ", "accepted: ", name))
    parent = by_path.get(tuple(above))
    if parent is not None and key.is_leaf:
        *above, middle = above
        wrong = ".".join([*above, misspelt(middle, parameters(parent.owner)), name])
        yield Mistake(config, (f"{wrong}=1",), (f"{wrong}: ", "accepted: ", middle))


# A value as YAML, and the types that take it.
VALUES = {"true": {"bool"}, "'word'": {"str", "Path"}, "1.5": {"float"}, "[[]]": {"tuple", "list"}}


def wrong_types(config: Path, key: Key) -> Iterator[Mistake]:
    """A key with values that its type does not take."""
    described = describe(key.annotation).partition(" (one of")[0]
    words = set(re.findall(r"\w+", described))
    wrong = [value for value, types in VALUES.items() if not types & words]
    for value in wrong[:2]:
        yield Mistake(config, (f"{key.text}={value}",), (f"{key.text}: ", described, "accepted"))


def generated() -> Iterator[Mistake]:
    """For each class in the three configurations, each of its arguments once in every way."""
    seen: set[tuple[type, str]] = set()
    for config in (DIGITS, TOY, CIFAR10):
        found = list(keys(load_experiment(config)))
        by_path = {key.path: key for key in found}
        for key in found:
            if (key.owner, key.path[-1]) not in seen:
                seen.add((key.owner, key.path[-1]))
                yield from misspelt_keys(config, key, by_path)
                yield from wrong_types(config, key)


GENERATED = list(generated())


# Values of the right type that cannot be

RATIO = "{_target_: fastflow.schedules:RatioStages, q: 2.0, kimg_per_stage: 5.0}"
DRIVER = f"{{_target_: callbacks.ct_schedule:CTScheduleCallback, schedule: {RATIO}}}"
EMA = (
    "{_target_: callbacks.ema:EMACallback, law: {_target_: fastflow.ema:ConstantEMA, beta: 0.998}}"
)
TEACHER = "{_target_: methods.cm:Teacher, source: {_target_: fastflow.method:Frozen, %s}}"


def table(config: Path, text: str) -> list[Mistake]:
    """Lines `override & override ... -> text that is said | text ...`.

    `<Class>` stands for the key of the callback of this class, `~` for the first override's key.
    """
    for number, node in enumerate(load_experiment(config, kind=Experiment).callbacks):
        text = text.replace(f"<{node.target.__name__}>", f"callbacks.{number}")
    rows = [line.strip().partition(" -> ") for line in text.strip().splitlines()]
    return [
        Mistake(config, tuple(w.split(" & ")), tuple(s.replace("~", _key(w)).split(" | ")))
        for w, _, s in rows
    ]


def _key(words: str) -> str:
    return words.partition("=")[0]


IMPOSSIBLE = [
    *table(
        DIGITS,
        """
        steps=-5 -> ~: -5 given | accepted: a whole number from 1 up
        steps=0 -> ~: 0 given | from 1 up
        batch_size=0 -> ~: 0 given | from 1 up
        batch_size=-128 -> ~: -128 given | from 1 up
        seed=-1 -> ~: -1 given | from 0 up
        name=a/b -> ~: 'a/b' given | accepted: letters, digits
        name='' -> ~: '' given | accepted: letters, digits
        name=../escape -> ~: '../escape' given | accepted: letters
        precision=fp64 -> ~: 'fp64' | 'fp32' | 'bf16' | 'fp16' accepted
        precision=fp16 -> ~: 'fp16' given | on a CPU: fp32, bf16
        parallel.shard=3 -> ~: 3 given | accepted: a divisor of 1
        parallel.shard=0 -> ~: 0 given | from 1 up
        parallel.micro_batch=0 -> ~: 0 given | from 1 up
        optimizer.lr=-1 -> ~: -1.0 given | accepted e.g. 0.001
        optimizer.lr=.nan -> ~: nan given | a number accepted
        optimizer.betas=[0.9, 2] -> ~: (0.9, 2.0) given | accepted e.g. (0.9, 0.999)
        optimizer.betas=[0.9] -> ~: 1 values given, 2 accepted
        optimizer.eps=-1 -> ~: -1.0 given | accepted e.g. 1e-08
        optimizer.weight_decay=-1 -> ~: -1.0 given | accepted e.g. 0
        optimizer={_target_: torch.optim:SGD, nesterov: true} -> ~.nesterov: True | momentum
        optimizer=torch.optim:LBFGS -> ~: LBFGS given | accepted
        optimizer=torch.optim:Adm -> ~._target_: | 'Adm' | accepted: | Adam
        lr=fastflow.schedules:InverseSqrtLR -> ~: | ref_batches (float)
        lr={_target_: fastflow.schedules:CosineLR, final: 2} -> ~.final: 2.0 given | final <= 1
        lr={_target_: fastflow.schedules:LinearWarmup, images: -1} -> ~.images: -1 | 0 or more
        network.model.channel_mult=[] -> ~: () given | accepted
        network.model.channel_mult=[1, 0] -> ~: (1, 0) given | positive
        network.model.channel_mult=[1, 1, 1, 1, 1] -> network.model.resolution: 8 | channel_mult
        network.model.attn_resolutions=[3] -> ~: | 3; accepted: 4, 8
        network.model.dropout=1.5 -> ~: 1.5 given | 0 <= dropout < 1 accepted
        network.model.dropout=-0.1 -> ~: -0.1 given | 0 <= dropout < 1 accepted
        network.model.label_dropout=2 -> ~: 2.0 given | < 1 accepted
        network.model.channels=0 -> ~: 0 given | positive whole number accepted
        network.model.channels=33 -> ~: | width 33 | accepted: widths of
        network.model.channel_mult_emb=0 -> ~: 0 given | accepted
        network.model.channel_mult_noise=-1 -> ~: -1 given | accepted
        network.model.num_blocks=0 -> ~: 0 given | accepted
        network.model.resolution=7 -> ~: 7 cannot be halved | channel_mult
        network.model.resolution=16 -> network: | (1, 16, 16) | 'digits' has (1, 8, 8)
        network.model.in_channels=3 -> network.model.out_channels: 1 given, 3 accepted
        network.model.out_channels=3 -> ~: 3 given, 1 accepted
        network.model.cond_dim=7 -> network | cond_dim: 7 given | cond_dim=10 or cond_dim=0
        network.model.cond_dim=-1 -> ~: -1 given | accepted
        network.model.augment_dim=-1 -> ~: -1 given | accepted
        network.model.embedding=sine -> ~: | 'positional' | 'fourier' accepted
        network.model.encoder=unet -> ~: | 'standard' | 'residual' accepted
        network.model.resample_filter=[1, 2, 1] -> ~: | even number
        network.model.attention=flash -> ~: | 'math' | 'explicit' accepted
        network.sigma_data=0 -> ~: 0.0 given | above 0 accepted
        network=networks.song_unet:SongUNet -> ~: SongUNet given | Network | EDMDenoiser
        network=fastflow.wrappers:EDMDenoiser -> ~: EDMDenoiser needs model
        network.model=networks.song_unet:SongUNet -> ~: SongUNet needs resolution (int)
        network.model=networks.mlp:ToyMLP -> network: made for samples (2,) | (1, 8, 8)
        network.model=torch.optim:Adam -> ~: | Adam | RawNetwork accepted
        data=fastflow.data.toy:GaussianMixture2D -> network: | (1, 8, 8) | 'gaussian_mixture2d'
        data=networks.mlp:ToyMLP -> ~: ToyMLP given | accepted: a Dataset
        data=fastflow.data.digits:Digit -> ~._target_: | did you mean 'Digits'? accepted: Digits
        data=fastflow.data.digit:Digits -> ~._target_: | did you mean 'digits'? accepted:
        data=os:system -> ~._target_: 'os:system' is refused | accepted: fastflow, methods
        data=digits -> ~: 'digits' | accepted
        data={split: all} -> ~: | _target_: module:Class
        data.split=third -> ~: 'third' | 'all' | 'first_half' | 'second_half' accepted
        init_from=/nowhere -> ~: | /nowhere | .safetensors file or a run directory
        init_from=/dev/null -> ~: | /dev/null | .safetensors file or a run directory
        method.boundary=-1 -> ~: -1.0 given | accepted: from 0 to below sigma_max
        method.boundary=90 -> ~: 90.0 given | below sigma_max (80.0)
        method.sigma_max=0 -> ~: 0.0 given | accepted: a finite number above 0
        method.sigma_max=.inf -> ~: inf given | accepted: a finite number above 0
        method.sigma_data=-1 -> ~: -1.0 given | accepted: a finite number above 0
        method.pairs.times.std=0 -> ~: 0.0 given | above 0 accepted
        method.pairs.times.mean=.nan -> ~: nan given | a number accepted
        method.pairs.times.mean=.inf -> ~: inf given | finite number accepted
        method.pairs.gap.k=-1 -> method.pairs.gap: k=-1.0 | 0 or more accepted
        method.pairs.gap.r_min=-0.1 -> ~: -0.1 given | 0 or more accepted
        method.pairs.min_gap=-1 -> ~: -1.0 given | accepted: 0 or more
        method.pairs=fastflow.consistency:GridPairing -> callbacks: | 'N' | SqrtDiscretization()
        method.distance.c=-0.1 -> ~: -0.1 given | accepted: 0 or more
        method.distance.c=.nan -> ~: nan given | a number accepted
        method.distance=fastflow.consistency:Distance -> ~: | abstract | :PseudoHuber
        method.distance=fastflow.consistency:Uniform -> ~: Uniform() | Distance (one
        method.distance=fastflow.consistency:PseudoHubber -> ~._target_: | PseudoHuber
        method.target.mu=2 -> ~: method.target is None | method.target=value
        method.target={_target_: fastflow.schedules:FixedDecay, mu: 2} -> ~.mu: 2.0
        method.target=fastflow.schedules:FixedDecay -> ~: FixedDecay needs mu (float)
        method.target=fastflow.schedules:AdaptiveDecay -> callbacks: | 'N' | SqrtDiscretization()
        method=methods.cm:CM -> ~: CM needs pairs (Pairing (one of
        callbacks=[] -> ~: | CM needs the curriculum value 'ratio' | CTScheduleCallback
        <CTScheduleCallback>.schedule.q=1 -> ~: 1.0 given | q > 1 accepted
        <CTScheduleCallback>.schedule.q=0.5 -> ~: 0.5 given | q > 1 accepted
        <CTScheduleCallback>.schedule.kimg_per_stage=0 -> ~: 0.0 | above 0
        <CTScheduleCallback>.schedule.limit=1.5 -> ~: 1.5 given | 0 < limit <= 1
        <CTScheduleCallback>.schedule.offset_images=-1 -> ~: -1 | 0 or more
        <CTScheduleCallback>.schedule=fastflow.schedules:SqrtDiscretization -> callbacks: | 'ratio'
        <NonFiniteGuard>.every=0 -> ~: 0 given | 1 or more accepted
        <NonFiniteGuard>.action=ignore -> ~: 'ignore' | 'stop' | 'skip' accepted
        <EMACallback>.law={_target_: fastflow.ema:ConstantEMA, beta: 2} -> ~.beta: 2 given
        <EMACallback>.law={_target_: fastflow.ema:PowerEMA, std: 2} -> ~.std: 2 given
        <EMACallback>.name=a/b -> ~: 'a/b' given | accepted
        <EMACallback>.name=student -> ~: 'student' given | accepted
        <EMACallback>.start_step=-1 -> ~: -1 given | 0 or more accepted
        <EMACallback>.snapshot_every=0 -> ~: 0 given | 1 or more accepted
        <LossByTime>.edges=[2, 1] -> ~: (2.0, 1.0) given | increasing times accepted
        <ProgressBar>.seconds=0 -> ~: 0 given | > 0 is accepted
        <JsonlLog>.every=0 -> ~: 0 given | 1 or more accepted
        <SampleGrid>.every=0 -> ~: 0 given | 1 or more accepted
        <SampleGrid>.steps=[0] -> ~: (0,) given | 1 or more accepted
        <SampleGrid>.steps=[] -> ~: () given | 1 or more accepted
        <SampleGrid>.count=0 -> ~: 0 given | 1 or more accepted
        <SampleGrid>.weights=ema_9 -> SampleGrid.weights: 'ema_9' given | accepted:
        <CheckpointCallback>.every=-1 -> ~: -1 given | 1 or more accepted
        <Curves>.every=0 -> ~: 0 given | 1 or more accepted
        callbacks.99.every=5 -> ~: | accepted: 0 to
        callbacks.-1.every=5 -> ~: | accepted: 0 to
        callbacks.+=torch.optim:Adam -> Adam given | accepted: a Callback
        callbacks.+=callbacks.ema:EMACallback -> callbacks. | EMACallback needs law
        evaluation.steps=[0] -> ~: (0,) given | accepted: different numbers from 1 up
        evaluation.steps=[1, 1] -> ~: (1, 1) given | accepted: different numbers
        evaluation.steps=[] -> ~: () given | at least one
        evaluation.times={2: [0.1, 0.2]} -> ~.2: (0.1, 0.2) given | 1 decreasing
        evaluation.times={3: [0.1, 0.2]} -> ~.3: (0.1, 0.2) given | 2 decreasing
        evaluation.times={2: [900]} -> ~: (900.0,) given | between 80 and 0
        evaluation.times.2=[-1] -> evaluation.times: (-1.0,) given | between 80 and 0
        evaluation.times.7=[1] -> ~: | accepted: 2, 4
        evaluation.samples=1 -> ~: 1 given | 2 or more accepted
        evaluation.blocks=0 -> ~: 0 given | 1 or more accepted
        evaluation.batch_size=0 -> ~: 0 given | 1 or more accepted
        evaluation.seed=-1 -> ~: -1 given | 0 or more accepted
        evaluation.quantisation=ceil -> ~: | 'truncate' | 'none' accepted
        evaluation.metrics=[3] -> ~.0: 3 | Metric (one of | accepted
        published={a: 5} -> ~.a: 5 | str accepted
        steps -> 'steps' given | accepted here: KEY=VALUE
        =5 -> '=5' has an empty key | key=value is accepted
        method..boundary=1 -> 'method..boundary=1' has an empty key | accepted
        steps=1 & steps=2 -> ~: set 2 times; once is accepted
        steps=[1 -> ~: not valid YAML: line
        steps={a: 1, a: 2} -> ~: not valid YAML: line 1 | duplicate key
        steps=*other -> ~: not valid YAML: line 1
        --stps & 3 -> '--stps' given | accepted here: KEY=VALUE and the options
        --device & tpu -> device: 'tpu' given | accepted
        --device & cuda:77 -> device: 'cuda:77' given | CUDA devices
        """,
    ),
    *table(
        TOY,
        """
        data.modes=0 -> ~: 0 given | a positive number accepted
        data.radius=.nan -> ~: nan given | a number accepted
        data.radius=.inf -> ~: (inf,) given | finite numbers accepted
        data.radial_std=-1 -> ~: -1.0 given | a positive number accepted
        data.weights=[1] -> ~: (1.0,) given | accepted: 8 positive numbers
        data.size=0 -> ~: 0 given | a positive number accepted
        network.model.width=0 -> ~: 0 given | positive whole number accepted
        network.model.depth=-1 -> ~: -1 given | positive whole number accepted
        network.model.cond_dim=-1 -> ~: -1 given | accepted
        network.model.data_dim=3 -> network: made for samples (3,) | has (2,)
        """,
    ),
    *table(
        CIFAR10,
        """
        data.path=/nowhere/cifar.tar.gz -> ~: /nowhere/cifar.tar.gz does not exist
        data={_target_: fastflow.data.edm_zip:ImageZip, path: /no.zip} -> /no.zip
        <GradClipCallback>.max_norm=0 -> ~: 0 given | > 0 is accepted
        <GradClipCallback>.max_norm=.nan -> ~: nan given | a number accepted
        expected.0.steps=0 -> ~: 0 given | 1 or more accepted
        expected.0.samples=1 -> ~: 1 given | 2 or more accepted
        method.pairs.times.t_min=90 -> method.pairs.times: t_min=90.0, t_max=80.0 | accepted
        method.pairs.times.t_min=0 -> ~: 0.0 given | above 0 accepted
        """,
    ),
    Mistake(
        DIGITS, (f"callbacks.+={DRIVER}",), ("callbacks: 2 drivers provide 'ratio', 1 accepted",)
    ),
    Mistake(
        DIGITS, (f"callbacks.+={EMA}",) * 2, ("EMACallback.name: ", "'ema_0.998'", "its own name")
    ),
    Mistake(
        DIGITS,
        (f"method.teacher={TEACHER % 'weights: null'}",),
        ("method.teacher.source: neither weights nor network", ".safetensors file or a run"),
    ),
    Mistake(
        DIGITS,
        (f"method.teacher={TEACHER % 'weights: /nowhere'}",),
        ("teacher weights: ", "/nowhere", ".safetensors file or a run directory"),
    ),
]


# Configuration files: every argument of the digits experiment misspelt or of a wrong type


def edited_files() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """A name, the text of a configuration file with one mistake, and what must be said."""
    source = DIGITS.read_text()
    lines = source.splitlines(keepends=True)

    def replaced(node: ast.expr | ast.keyword, old: str, new: str) -> str:
        line = lines[node.lineno - 1]
        assert line[node.col_offset :].startswith(old)
        changed = line[: node.col_offset] + new + line[node.col_offset + len(old) :]
        return "".join([*lines[: node.lineno - 1], changed, *lines[node.lineno :]])

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg is not None:
            wrong = misspelt(node.arg, {})
            where = f"line {node.lineno} {wrong}"
            yield where, replaced(node, node.arg, wrong), (wrong, "accepted: ", node.arg)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            old = ast.get_source_segment(source, node)
            assert old is not None
            if lines[node.lineno - 1][node.col_offset - 1] == "-":
                continue
            where = f"line {node.lineno} {old}"
            yield where, replaced(node, old, "'many'"), ("'many'", "accepted")


def broken(body: str) -> str:
    return f"from fastflow.parts import Part\ndef experiment():\n    {body}\n"


FILES = [
    *((f"x.py {name}", "x.py", text, ("x.py:", *says)) for name, text, says in edited_files()),
    ("syntax", "x.py", "def experiment(:\n", ("x.py:1: SyntaxError",)),
    ("indentation", "x.py", "def experiment():\nreturn 1\n", ("x.py:2: SyntaxError",)),
    ("exception", "x.py", broken("return 1 / 0"), ("x.py:3: ZeroDivisionError",)),
    ("import", "x.py", "import fastflow.nothing\n", ("x.py:1: ModuleNotFoundError", "nothing")),
    ("name", "x.py", "from methods.cm import MC\n", ("x.py:1: ImportError", "MC")),
    ("top level", "x.py", "x = {}['key']\n", ("x.py:1: KeyError", "'key'")),
    ("exit", "x.py", "raise SystemExit(0)\n", ("x.py:1: SystemExit",)),
    (
        "no function",
        "x.py",
        "def experimnet(): pass\n",
        ("experiment()", "did you mean 'experimnet'"),
    ),
    ("no call", "x.py", "experiment = 3\n", ("x.py: has no function experiment()", "accepted")),
    ("argument", "x.py", "def experiment(a): pass\n", ("x.py", "TypeError", "argument: 'a'")),
    ("none", "x.py", broken("pass"), ("x.py: describes None", "Experiment accepted")),
    ("number", "x.py", broken("return 5"), ("x.py: describes 5 (int)", "Experiment accepted")),
    ("part", "x.py", broken("return Part()"), ("x.py: describes Part()", "Experiment accepted")),
    ("bytes", "x.py", "\0", ("x.py", "null bytes")),
    ("suffix", "x.txt", "", ("x.txt: .txt given, .py or .yaml accepted",)),
    ("empty", "x.yaml", "", ("x.yaml: describes None", "Experiment accepted")),
    ("list", "x.yaml", "- 1\n", ("x.yaml: describes [1]", "Experiment accepted")),
    ("broken", "x.yaml", "steps: [1\n", ("x.yaml: not valid YAML: line 2",)),
    ("tab", "x.yaml", "a:\n\t- 1\n", ("x.yaml: not valid YAML: line 2",)),
    ("tag", "x.yaml", "a: !!python/name:os.system\n", ("x.yaml: not valid YAML: line 1",)),
    (
        "repeated",
        "x.yaml",
        "a: 1\na: 2\n",
        (
            "x.yaml: not valid YAML: line 2",
            "duplicate key",
        ),
    ),
    ("target", "x.yaml", "_target_: os:system\n", ("x.yaml: _target_: 'os:system' is refused",)),
    (
        "missing",
        "x.yaml",
        "_target_: fastflow.experiment:Experiment\nname: a\n",
        ("x.yaml: Experiment needs method", "batch_size (int)"),
    ),
    (
        "unknown",
        "x.yaml",
        "_target_: fastflow.experiment:Experiment\nstps: 1\n",
        ("x.yaml: stps: Experiment takes no 'stps'; did you mean 'steps'? accepted: augment,",),
    ),
]


PATHS = [
    ("/nowhere/x.py", ("/nowhere/x.py: no such file", "no folder /nowhere")),
    (
        str(DIGITS.with_name("config_cm_digit.py")),
        ("did you mean 'config_cm_digits.py'? accepted:",),
    ),
    (str(DIGITS.parent), ("is a folder, a file accepted", "accepted: config_cm_digits.py")),
]

# Commands about a trained run, which must not suffer

COMMANDS = [
    ("sample {run} --weights ema_9", ("no weights 'ema_9'", "accepted: ", "student")),
    ("sample {run} --steps 0", ("steps: 0 given", "from 1 up")),
    ("sample {run} --steps x", ("--steps", "'x'")),
    ("sample {run} --steps 2 --times 0.1,0.2", ("(0.1, 0.2) given for 2 steps", "accepted: 1")),
    ("sample {run} --steps 2 --times 100", ("(100.0,) given for 2 steps", "between 80 and 0")),
    ("sample {run} --times x", ("--times", "'x'", "accepted")),
    ("sample {run} --seeds x", ("--seeds", "'x'", "accepted")),
    ("sample {run} --seeds 5-2", ("--seeds", "'5-2'", "accepted")),
    ("sample {run} --label 3", ("label: 3 given", "accepted: none (the model is unconditional)")),
    ("sample {run} --lable 3", ("--lable", "options of 'fastflow sample --help'")),
    ("sample {run} --out {run}/x.mp3", ("x.mp3", "accepted", ".png")),
    ("sample {run} steps=3", ("'steps=3' given", "accepted here: the options")),
    ("sample {run}/nothing", ("nothing holds no trained model", "run directory")),
    ("evaluate {run} steps=3", ("'steps=3' given, accepted: evaluation.KEY=VALUE",)),
    ("evaluate {run} evaluation.sampels=3", ("evaluation.sampels: ", "did you mean 'samples'?")),
    ("evaluate {run} evaluation.samples=1", ("evaluation.samples: 1 given", "2 or more accepted")),
    ("evaluate {run} evaluation.steps=[0]", ("evaluation.steps: (0,) given", "accepted")),
    (
        "evaluate {run} evaluation.times.2=[99]",
        ("evaluation.times: (99.0,)", "between 80 and 0"),
    ),
    ("evaluate {run} --weights nothing", ("no weights 'nothing'", "accepted: ")),
    ("evaluate {run} --device abacus", ("device: 'abacus' given, accepted: auto, cpu",)),
    ("evaluate {run}/nothing", ("nothing holds no trained model",)),
    ("train --config {run}/experiment.yaml --run-dir {run} seed=7", ("seed: 0 -> 7", "--run-dir")),
    (
        "train --config {run}/experiment.yaml --run-dir {run} optimizer.lr=1",
        ("optimizer.lr: ", "--run-dir"),
    ),
    ("train --config {run}/experiment.yaml --run-dir {run} stps=7", ("stps: ", "'steps'")),
    (
        "train --config {run}/experiment.yaml --run-dir {run} steps=x",
        ("steps: 'x'", "int accepted"),
    ),
    ("train --config {digits} --run-dir {run}", ("another configuration", "--run-dir")),
    (
        "train --config {digits} --run-dir {run}/weights",
        ("not empty and holds no run", "--run-dir"),
    ),
    ("train --config {digits} --run-dir {run}/experiment.yaml", ("experiment.yaml", "--run-dir")),
    ("train --config {digits} --run-dir {run}/log.jsonl/run", ("log.jsonl", "--run-dir")),
    ("train --run-dir {run}", ("required: --config",)),
    ("trian --config {digits}", ("'trian'", "'train'", "'evaluate'")),
    ("compare {run}/nothing", ("nothing", "folder")),
    ("compare --format pdf", ("--format", "'pdf'", "'markdown'")),
]
BROKEN_RUNS = [
    ("experiment.yaml", "steps: [1", ("experiment.yaml: not valid YAML",)),
    ("experiment.yaml", "5", ("experiment.yaml describes no experiment",)),
    (
        "experiment.yaml",
        "_target_: os:system",
        ("experiment.yaml: _target_: 'os:system' is refused",),
    ),
]


# The checks


def files(*folders: Path) -> dict[Path, str]:
    """Every file and folder below, with the digest of its contents."""
    found = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in found}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory, and a trainer that must not be reached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTFLOW_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("training began"))
    return tmp_path


@pytest.fixture
def refused(here, capsys):
    """Run a command line that must fail as promised."""

    def check(argv: list[str], says: tuple[str, ...], *untouched: Path) -> None:
        before = files(here, *untouched)
        try:
            status = cli.main(argv)
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        one_line(err, says)
        assert status == 2
        assert out == ""
        assert files(here, *untouched) == before

    return check


def one_line(err: str, says: tuple[str, ...]) -> None:
    assert err.startswith("fastflow: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert [text for text in says if text not in err] == [], err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of one step."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = ["steps=1", "batch_size=4", "network.model.channels=16", "network.model.cond_dim=0"]
    words += [f"callbacks=[{DRIVER}, {EMA}]", "callbacks.+=callbacks.jsonl_log:JsonlLog"]
    argv = ["train", "--config", str(DIGITS), "--run-dir", str(folder), "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", FIT)
        assert cli.main([*argv, *words]) == 0
    return folder


FIT = Trainer.fit


def test_there_are_at_least_200_mistakes():
    lines = {(m.config, m.words) for m in [*GENERATED, *IMPOSSIBLE]}
    texts = {text for _, _, text, _ in FILES}
    assert len(lines) + len(texts) + len(PATHS) + len(COMMANDS) + len(BROKEN_RUNS) >= 200
    assert len({m.words for m in GENERATED}) >= 200
    assert len(IMPOSSIBLE) + len(FILES) + len(PATHS) + len(COMMANDS) >= 200


MISTAKES = [*GENERATED, *IMPOSSIBLE]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[m.name for m in MISTAKES])
def test_overrides(refused, mistake):
    device = [] if "--device" in mistake.words else ["--device", "cpu"]
    argv = ["train", "--config", str(mistake.config), *device, *mistake.words]
    refused(argv, mistake.says)


@pytest.mark.parametrize(
    ("name", "text", "says"), [f[1:] for f in FILES], ids=[f[0] for f in FILES]
)
def test_configuration_files(refused, here, name, text, says):
    (here / name).write_text(text)
    refused(["train", "--config", name], says)


@pytest.mark.parametrize(("path", "says"), PATHS)
def test_paths(refused, path, says):
    refused(["train", "--config", path], says)


@pytest.mark.parametrize(("line", "says"), COMMANDS, ids=[line for line, _ in COMMANDS])
def test_a_finished_run_is_left_as_it_is(refused, run, line, says):
    refused([word.format(run=run, digits=DIGITS) for word in line.split()], says, run)


@pytest.mark.parametrize(("name", "text", "says"), BROKEN_RUNS)
def test_a_broken_run_is_left_as_it_is(refused, here, name, text, says):
    folder = here / "run"
    folder.mkdir()
    (folder / name).write_text(text)
    refused(["train", "--config", str(DIGITS), "--run-dir", str(folder)], says)


@pytest.mark.parametrize("name", ["meta.json", "*.distcp", ".metadata"])
def test_a_damaged_checkpoint_is_no_fresh_start(refused, here, run, name):
    folder = here / "run"
    shutil.copytree(run, folder, symlinks=True)
    [path] = [p for p in folder.rglob(name) if not p.parent.is_symlink()]
    path.write_bytes(path.read_bytes()[:20])
    argv = ["train", "--config", str(folder / "experiment.yaml"), "--run-dir", str(folder)]
    refused([*argv, "--device", "cpu"], ("checkpoint", "step_00000001"))


@pytest.mark.parametrize(
    ("start", "line", "says"),
    [
        (["-m", "fastflow"], "train --config {digits} optimizer.rl=1", ("optimizer.rl: ", "lr")),
        (["{root}/train.py"], "--config {digits} steps=-1", ("steps: -1 given", "from 1 up")),
    ],
)
def test_as_a_process(here, start, line, says):
    words = [word.format(root=ROOT, digits=DIGITS) for word in [*start, *line.split()]]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=here, env=environment, capture_output=True, text=True
    )
    one_line(done.stderr, says)
    assert done.returncode == 2
    assert done.stdout == ""
    assert files(here) == {}


def test_the_value_of_every_key_is_checked_by_the_list_above():
    """The generator reaches nested components, lists and torch's own arguments."""
    reached = {key.text for key in keys(load_experiment(DIGITS))}
    wanted = {"steps", "method.pairs.times.mean", "network.model.dropout", "optimizer.betas"}
    assert wanted | {"callbacks.0.schedule.q", "data.split"} <= reached
    assert torch.optim.RAdam in {key.owner for key in keys(load_experiment(DIGITS))}
