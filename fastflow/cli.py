"""The command line: fastflow train | sample | evaluate | bench-sampling | compare | export |
convert | networks | doctor.

Exit status: see `_STATUS`; 141 when nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastflow import __version__, commands
from fastflow.errors import ConfigError, DivergenceError, FastflowError, LostProcessError
from fastflow.evaluation.choose import FILTERS, ORDERS

_STATUS = """\
exit status:
  0    trained to the end
  2    a mistake in what was given, or files that cannot be read or written; the last line says what
  3    the loss or a gradient became non-finite
  4    another process of the run died, or did not answer in time (--timeout)
  130  stopped by SIGINT  (Ctrl-C) \\ the step was finished and saved;
  143  stopped by SIGTERM           / the same command goes on from there
"""


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
    except LostProcessError as error:
        return _fail(str(error), 4)
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

    train = verbs.add_parser(
        "train",
        help="train an experiment; run again to resume",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _config(train, required=True)
    train.epilog = f"{train.epilog}\n\n{_STATUS}"
    train.add_argument("--run-dir", type=Path, help="default: runs/NAME")
    _device(train)
    train.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="how long processes wait for each other before they give up (default: half an hour)",
    )
    train.add_argument(
        "--dry-run", action="store_true", help="check everything, print the resolved experiment"
    )
    train.add_argument(
        "--no-prerequisites",
        action="store_true",
        help="where a run is needed first and not finished, say how to train it and stop",
    )
    train.set_defaults(run=commands.train)

    sample = verbs.add_parser("sample", help="write samples: a picture, or .npz or .zip files")
    _model(sample)
    sample.add_argument("--steps", type=int, default=1, help="network calls (default 1)")
    sample.add_argument("--times", type=_floats, help="intermediate times, e.g. 0.821")
    sample.add_argument("--seeds", type=_seeds, default=range(64), help="e.g. 0-63 (default)")
    classes = sample.add_mutually_exclusive_group()
    classes.add_argument("--label", type=int, help="the class of all samples")
    classes.add_argument(
        "--labels",
        choices=("random", "balanced"),
        help="classes drawn by seed, or in turn by seed; default: in turn for pictures, as in the "
        "experiment's evaluation otherwise",
    )
    classes.add_argument(
        "--per-class", type=_count, metavar="N", help="N samples of every class, in turn"
    )
    sample.add_argument("--batch", type=_count, metavar="N", help="samples computed at once")
    sample.add_argument(
        "--quantisation",
        choices=("truncate", "floor"),
        default="truncate",
        help="how images become bytes in .npz and .zip: 127.5 x + 128 (EDM, the default) or "
        "127.5 x + 127.5 (ADM), rounded down",
    )
    sample.add_argument(
        "--out",
        type=Path,
        help="a .png picture; .npz as ADM, .zip or folder as EDM evaluate; or .safetensors as "
        "sampled (default: a .png beside the model)",
    )
    sample.epilog = "the same command goes on with what was interrupted"
    sample.set_defaults(run=commands.sample)

    evaluate = verbs.add_parser("evaluate", help="measure a trained model, e.g. its FID")
    _model(evaluate)
    evaluate.add_argument(
        "--keep-samples",
        action="store_true",
        help="leave the samples in MODEL/samples, for measuring them again with other metrics",
    )
    evaluate.add_argument(
        "--reference",
        type=_statistics,
        metavar="FILE",
        help="measure nothing, but write reference statistics of the dataset (of all images as "
        "stored): .safetensors with provenance, or EDM's .npz; MODEL may be a configuration",
    )
    evaluate.add_argument(
        "--extractor",
        metavar="NAME",
        help="with --reference: which extractor of the metrics, e.g. DINOv2 (default: the first)",
    )
    evaluate.epilog = (
        "evaluation.KEY=VALUE overrides how it is measured; the same command goes on with what "
        "was interrupted; --weights all measures every set of weights"
    )
    evaluate.set_defaults(run=commands.evaluate, takes_overrides=True)

    bench = verbs.add_parser(
        "bench-sampling", help="time of samples: few steps beside diffusion samplers"
    )
    bench.add_argument("model", type=Path, nargs="?", help="a run directory or folder of weights")
    _config(bench, required=False)
    _device(bench)
    bench.add_argument("--batch", type=_count, help="samples at once (default: 8 on a CPU)")
    bench.add_argument("--repeats", type=_count, default=7, help="turns (default 7)")
    bench.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    bench.add_argument("--compile", action="store_true", help="compile the network's blocks")
    bench.add_argument(
        "--ancestral",
        type=_ancestral,
        default=35,
        metavar="STEPS",
        help="steps of the ancestral sampler that are timed, of 1,000 (default 35)",
    )
    bench.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the process's own time, for a machine that others use too",
    )
    bench.add_argument("--format", choices=("text", "markdown", "csv", "json"), default="text")
    bench.set_defaults(run=commands.bench_sampling)

    compare = verbs.add_parser("compare", help="measured results beside the published ones")
    compare.add_argument(
        "folders",
        type=Path,
        nargs="*",
        metavar="FOLDER",
        help="runs, exported weights, or folders that hold such; default: runs",
    )
    for name in FILTERS:
        compare.add_argument(
            f"--{name}", type=_words, default=(), metavar="A,B", help=f"only this {name}"
        )
    compare.add_argument(
        "--overview",
        action="store_true",
        help="one line for each run, a column for each step count",
    )
    compare.add_argument("--measured", action="store_true", help="only what was measured")
    compare.add_argument("--sort", choices=tuple(ORDERS), metavar="KEY", help=", ".join(ORDERS))
    compare.add_argument("--reverse", action="store_true", help="the largest first")
    compare.add_argument("--format", choices=tuple(commands.FORMATS.values()))
    compare.add_argument(
        "--out", type=_report, metavar="FILE", help="a .html, .md, .csv, .json or .txt file"
    )
    compare.epilog = "names may be patterns, such as 'cm_*'"
    compare.set_defaults(run=commands.compare)

    export = verbs.add_parser("export", help="weights out of a training checkpoint; needs no GPU")
    export.add_argument("source", type=Path, help="a run directory, or checkpoints/step_... of one")
    export.add_argument("--output", type=Path, help="a new folder; default: RUN/exported/step_...")
    _allow(export)
    export.set_defaults(run=commands.export)

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

    doctor = verbs.add_parser(
        "doctor", help="check installation, data and a configuration; tell the memory it needs"
    )
    _config(doctor, required=False)
    _device(doctor)
    doctor.add_argument(
        "--gpus",
        type=_count,
        metavar="N",
        help="instead of checks, the memory that training on so many GPUs needs on each, and what "
        "other choices of parallel.* need; wants neither GPUs nor data nor weights",
    )
    doctor.add_argument(
        "--gpu-memory", type=_gib, metavar="GIB", help="memory of one, in GiB (default: 80)"
    )
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


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} given, accepted: seconds, above 0")
    return value


def _gib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} given, accepted: GiB, above 0, e.g. 80")
    return value


def _seeds(text: str) -> range:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if last < first:
        raise argparse.ArgumentTypeError(f"{text!r} given, accepted: e.g. 7 or 0-63")
    return range(first, last + 1)


def _ancestral(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text) or int(text) > 1000:
        raise argparse.ArgumentTypeError(f"{text!r} given, accepted: 1 to 1000")
    return int(text)


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} given, accepted: a whole number from 1 up")
    return int(text)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _report(text: str) -> Path:
    if Path(text).suffix not in commands.FORMATS:
        accepted = ", ".join(commands.FORMATS)
        raise argparse.ArgumentTypeError(f"{text!r} given, accepted: a name in {accepted}")
    return Path(text)


def _statistics(text: str) -> Path:
    if not text.endswith((".safetensors", ".npz")):
        raise argparse.ArgumentTypeError(f"{text!r} given, accepted: a .safetensors or .npz file")
    return Path(text)


def _safetensors(text: str) -> Path:
    if not text.endswith(".safetensors"):
        raise argparse.ArgumentTypeError(f"{text!r} given, accepted: a .safetensors file")
    return Path(text)
