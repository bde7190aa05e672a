"""The command line: fastflow train | sample | evaluate | compare | convert | networks | doctor.

Exit status: 0 done; 2 a mistake in what was given (one line on stderr, nothing written);
3 training diverged; 130 or 143 stopped by SIGINT or SIGTERM, in training after the step was
finished and saved; 141 nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastflow import __version__, commands
from fastflow.commands import RUNS
from fastflow.errors import ConfigError, DivergenceError, FastflowError


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
    verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = verbs.add_parser("train", help="train an experiment; run again to resume")
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
    train.set_defaults(run=commands.train)

    sample = verbs.add_parser("sample", help="write a picture (or .npz) of samples")
    _model(sample)
    sample.add_argument("--steps", type=int, default=1, help="network calls (default 1)")
    sample.add_argument("--times", type=_floats, help="intermediate times, e.g. 0.821")
    sample.add_argument("--seeds", type=_seeds, default=range(64), help="e.g. 0-63 (default)")
    sample.add_argument("--label", type=int, help="class; default: all in turn when conditional")
    sample.add_argument(
        "--out", type=_picture, help="a .png or .npz file; default: a .png beside the model"
    )
    sample.set_defaults(run=commands.sample)

    evaluate = verbs.add_parser("evaluate", help="measure a trained model, e.g. its FID")
    _model(evaluate)
    evaluate.epilog = "evaluation.KEY=VALUE overrides how it is measured"
    evaluate.set_defaults(run=commands.evaluate, takes_overrides=True)

    compare = verbs.add_parser("compare", help="measured results beside the published ones")
    compare.add_argument("folder", type=Path, nargs="?", default=RUNS, help="default: runs")
    compare.add_argument("--format", choices=("text", "markdown", "csv", "json"), default="text")
    compare.set_defaults(run=commands.compare)

    convert = verbs.add_parser("convert", help="published weights into a file of ours")
    convert.add_argument("source", help="an official .pkl or .pt file, or its https:// address")
    convert.add_argument("--to", type=_safetensors, required=True, help="a .safetensors file")
    convert.add_argument("--as", dest="kind", help="what a file does not say: dit or sit")
    convert.add_argument("--heads", type=int, help="attention heads, where a file does not say")
    convert.add_argument("--force", action="store_true", help="replace a file that is there")
    convert.set_defaults(run=commands.convert)

    networks = verbs.add_parser("networks", help="networks of the literature and their sizes")
    networks.add_argument(
        "names", nargs="*", metavar="NAME", help="a name, or a word of names such as cifar10"
    )
    networks.add_argument("--format", choices=("text", "markdown", "csv", "json"), default="text")
    networks.set_defaults(run=commands.networks)

    doctor = verbs.add_parser("doctor", help="check installation, data and a configuration")
    _config(doctor, required=False)
    _device(doctor)
    doctor.set_defaults(run=commands.doctor)
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
