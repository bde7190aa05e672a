"""The command line: fastflow train | sample | evaluate | compare | convert | networks | doctor.

Exit status: 0 done; 2 a mistake in what was given (one line on stderr, nothing written);
3 training diverged; 130 or 143 stopped by SIGINT or SIGTERM, in training after the step was
finished and saved; 141 nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastflow import __version__
from fastflow.errors import ConfigError, DivergenceError, FastflowError

if TYPE_CHECKING:
    from torch import Tensor

    from fastflow.distributed import World
    from fastflow.experiment import Experiment
    from fastflow.trainer import Trainer

RUNS = Path("runs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    try:
        # argparse takes options and positional words in one order only; overrides go anywhere.
        arguments.overrides = _overrides(arguments, rest)
        status: int = arguments.run(arguments)
        sys.stdout.flush()  # or a broken pipe would show when the interpreter has ended
    except DivergenceError as error:
        return _fail(str(error), 3)
    except FastflowError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:
        # Whoever read our output has seen enough (`| head`); the rest goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk, a missing permission
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("aborted; what was saved before is complete", 128 + signal.SIGINT)
    return status


def _overrides(arguments: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    for word in rest:
        if word.startswith("-") or "=" not in word or not arguments.takes_overrides:
            accepted = "KEY=VALUE and the options" if arguments.takes_overrides else "the options"
            raise ConfigError(
                f"{word!r} given, accepted here: {accepted} of "
                f"'fastflow {arguments.command} --help'"
            )
    return list(rest)


def _fail(text: str, status: int) -> int:
    print(f"fastflow: {' '.join(text.split())}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors and without guesses at shortened options."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastflow: {message}; see '{self.prog} --help'\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastflow", description="Flow-map generative models: train, sample, evaluate, compare."
    )
    parser.add_argument("--version", action="version", version=f"fastflow {__version__}")
    parser.set_defaults(takes_overrides=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train an experiment; run again to resume")
    _config(train, required=True)
    train.add_argument("--run-dir", type=Path, help="default: runs/NAME")
    _device(train)
    train.add_argument(
        "--dry-run", action="store_true", help="check everything, print the resolved experiment"
    )
    train.add_argument(
        "--no-prerequisites",
        action="store_true",
        help="where a run is needed first and not finished, say how to train it and stop",
    )
    train.set_defaults(run=_train)

    sample = commands.add_parser("sample", help="write a picture (or .npz) of samples")
    _model(sample)
    sample.add_argument("--steps", type=int, default=1, help="network calls (default 1)")
    sample.add_argument("--times", type=_floats, help="intermediate times, e.g. 0.821")
    sample.add_argument("--seeds", type=_seeds, default=range(64), help="e.g. 0-63 (default)")
    sample.add_argument("--label", type=int, help="class; default: all in turn when conditional")
    sample.add_argument(
        "--out", type=_picture, help="a .png or .npz file; default: a .png beside the model"
    )
    sample.set_defaults(run=_sample)

    evaluate = commands.add_parser("evaluate", help="measure a trained model, e.g. its FID")
    _model(evaluate)
    evaluate.epilog = "evaluation.KEY=VALUE overrides how it is measured"
    evaluate.set_defaults(run=_evaluate, takes_overrides=True)

    compare = commands.add_parser("compare", help="measured results beside the published ones")
    compare.add_argument("folder", type=Path, nargs="?", default=RUNS, help="default: runs")
    compare.add_argument("--format", choices=("text", "markdown", "csv", "json"), default="text")
    compare.set_defaults(run=_compare)

    convert = commands.add_parser("convert", help="published weights into a file of ours")
    convert.add_argument("source", help="an official .pkl or .pt file, or its https:// address")
    convert.add_argument("--to", type=_safetensors, required=True, help="a .safetensors file")
    convert.add_argument("--as", dest="kind", help="what a file does not say: dit or sit")
    convert.add_argument("--heads", type=int, help="attention heads, where a file does not say")
    convert.add_argument("--force", action="store_true", help="replace a file that is there")
    convert.set_defaults(run=_convert)

    networks = commands.add_parser("networks", help="networks of the literature and their sizes")
    networks.add_argument(
        "names", nargs="*", metavar="NAME", help="a name, or a word of names such as cifar10"
    )
    networks.add_argument("--format", choices=("text", "markdown", "csv", "json"), default="text")
    networks.set_defaults(run=_networks)

    doctor = commands.add_parser("doctor", help="check installation, data and a configuration")
    _config(doctor, required=False)
    _device(doctor)
    doctor.set_defaults(run=_doctor)
    return parser


def _config(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--config", type=Path, required=required, help="a configuration .py or a saved .yaml"
    )
    _allow(parser)
    parser.epilog = "KEY=VALUE anywhere overrides the configuration, e.g. batch_size=256"
    parser.set_defaults(takes_overrides=True)


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a run directory or a folder of weights")
    parser.add_argument("--weights", help="student or an EMA's name; default: the first EMA")
    _allow(parser)
    _device(parser)


def _allow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="a package of your own that a saved run may name classes of; may be repeated",
    )


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N")


def _floats(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} given, accepted: e.g. 5.3,0.821") from None


def _seeds(text: str) -> range:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if last < first:
        raise argparse.ArgumentTypeError(f"{text!r} given, accepted: e.g. 7 or 0-63")
    return range(first, last + 1)


def _picture(text: str) -> Path:
    if not text.endswith((".png", ".npz")):
        raise argparse.ArgumentTypeError(f"{text!r} given, accepted: a .png or .npz file")
    return Path(text)


def _safetensors(text: str) -> Path:
    if not text.endswith(".safetensors"):
        raise argparse.ArgumentTypeError(f"{text!r} given, accepted: a .safetensors file")
    return Path(text)


def _train(arguments: argparse.Namespace) -> int:
    import gc

    from fastflow import summary
    from fastflow.build import Parts
    from fastflow.config import load_experiment, override, to_yaml
    from fastflow.distributed import world
    from fastflow.experiment import Experiment
    from fastflow.prerequisites import check_all, refusal, unfinished

    allow = tuple(arguments.allow)
    written = load_experiment(arguments.config, kind=Experiment, allow=allow)
    experiment = override(written, arguments.overrides, allow)
    with world(arguments.device) as here:
        run_dir = arguments.run_dir or RUNS / experiment.name
        first = unfinished(experiment, run_dir, here, allow)
        if first and arguments.no_prerequisites:
            raise ConfigError(refusal(first, arguments.device, allow))
        if first:
            check_all(first, experiment, here)
        if arguments.dry_run:
            if not first:
                Parts.of(experiment, here)
            print("".join(f"# first {stage}\n" for stage in first) + to_yaml(experiment), end="")
            return 0
        for stage in first:
            if here.is_main:
                print(f"first {stage}", flush=True)
            trainer = _fitted(stage.experiment, stage.run_dir, here)
            if trainer.state.stop is not None:
                if here.is_main:
                    print(summary.stopped(trainer))
                return _signalled(trainer.state.stop)
            del trainer
            gc.collect()  # it is part of a cycle, and would keep its networks on the device
        trainer = _fitted(experiment, run_dir, here)
        if here.is_main:
            print(summary.end(trainer))
    return _signalled(trainer.state.stop) if trainer.state.step < experiment.steps else 0


def _fitted(experiment: Experiment, run_dir: Path, here: World) -> Trainer:
    from fastflow import summary
    from fastflow.trainer import Trainer

    trainer = Trainer(experiment, run_dir, here)
    if here.is_main:
        print(summary.start(trainer), flush=True)
    trainer.fit()
    return trainer


def _signalled(stop: str | None) -> int:
    return 128 + signal.Signals[stop] if stop in ("SIGINT", "SIGTERM") else 0


def _sample(arguments: argparse.Namespace) -> int:
    import numpy
    import torch

    from fastflow.distributed import world
    from fastflow.model import Model
    from fastflow.pictures import class_columns, save_samples

    seeds, steps = arguments.seeds, arguments.steps
    with world(arguments.device) as here:
        allow = tuple(arguments.allow)
        model = Model.load(arguments.model, arguments.weights, here.device, allow)
        times = model.times(steps, arguments.times)
        cond = _class_rows(seeds, model.cond_dim, arguments.label)
        size = model.experiment.evaluation.batch_size
        parts = []
        for rows in (slice(start, start + size) for start in range(0, len(seeds), size)):
            some = None if cond is None else cond[rows]
            parts.append(model.sample(seeds[rows], steps, times[1:], some).cpu())
    samples = torch.cat(parts)
    name = f"{model.weights_name}_step{model.step:08d}_{steps}step.png"
    out = arguments.out or arguments.model / "samples" / name
    if out.suffix == ".npz":
        out.parent.mkdir(parents=True, exist_ok=True)
        numpy.savez(out, samples=samples.numpy(), seeds=list(seeds), times=times)
    else:
        save_samples(samples, out, class_columns(model.cond_dim))
    grid = ", ".join(f"{t:g}" for t in times)
    print(f"{len(seeds)} samples, NFE {model.nfe(steps)}, t = {grid}: {out}")
    return 0


def _class_rows(seeds: range, classes: int, label: int | None) -> Tensor | None:
    """One-hot rows [n, classes] of one class, or of all in turn by seed; None without classes."""
    import torch

    if label is not None and not 0 <= label < classes:
        accepted = f"0 to {classes - 1}" if classes else "none (the model is unconditional)"
        raise ConfigError(f"--label: {label} given, accepted: {accepted}")
    if classes == 0:
        return None
    labels = [seed % classes if label is None else label for seed in seeds]
    return torch.eye(classes)[labels]


def _evaluate(arguments: argparse.Namespace) -> int:
    from fastflow.config import build, override
    from fastflow.distributed import world
    from fastflow.evaluation.compare import table
    from fastflow.evaluation.evaluate import evaluate
    from fastflow.evaluation.results import record
    from fastflow.model import Model

    for text in arguments.overrides:
        if not text.startswith("evaluation."):
            raise ConfigError(f"{text!r} given, accepted: evaluation.KEY=VALUE")
    with world(arguments.device) as here:
        allow = tuple(arguments.allow)
        model = Model.load(arguments.model, arguments.weights, here.device, allow)
        experiment = override(model.experiment, arguments.overrides, allow)
        model = dataclasses.replace(model, experiment=experiment)
        dataset = build(experiment.data, at="data")
        report = _progress if here.is_main else None
        results = evaluate(model, experiment.evaluation, dataset, here, progress=report)
        if here.is_main:
            print(table(results))
            print(f"recorded in {record(arguments.model, results)}")
    return 0


def _progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty() or done == total:
        end = "\n" if done == total else ""
        print(f"\r{what}: {done:,} of {total:,} samples", end=end, file=sys.stderr, flush=True)


def _compare(arguments: argparse.Namespace) -> int:
    from fastflow.evaluation.compare import compare

    folder = arguments.folder
    if folder != RUNS and not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; accepted: a folder that holds runs")
    print(compare(folder, arguments.format))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from fastflow.pretrained import Asked, convert, fetched, save

    source, target = arguments.source, arguments.to
    if target.exists() and not arguments.force:
        raise ConfigError(
            f"--to: {target} is there already; name another file, or replace it with --force"
        )
    origin = fetched(source)
    converted = convert(origin, Asked(arguments.kind, arguments.heads))
    count = save(converted, target, source, origin)
    print(
        f"{converted.kind}: {count:,} parameters, {len(converted.weights)} tensors, written to "
        f"{target}"
    )
    return 0


def _networks(arguments: argparse.Namespace) -> int:
    from fastflow.presets import chosen, presets, table

    print(table(chosen(presets(), arguments.names), arguments.format))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from fastflow.doctor import examine

    allow = tuple(arguments.allow)
    report = examine(arguments.config, arguments.overrides, arguments.device, allow)
    print(report.text)
    return 0 if report.healthy else 2
