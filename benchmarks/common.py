"""Networks to measure, interleaved timing, and tables."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from configs.experiments.Digits import config_cm_digits
from configs.experiments.EDM import config_cm_cifar10
from fastflow.config import build, lazy
from fastflow.experiment import Experiment
from fastflow.network import Network
from fastflow.timing import Stopwatch
from fastflow.wrappers import EDMDenoiser
from networks.song_unet import SongUNet

CIFAR10 = "DDPM++ CIFAR-10"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network with its experiment, and a batch that a step of it takes."""

    name: str
    experiment: Experiment
    batch: int

    def network(self, device: torch.device) -> Network:
        """The network with fresh weights, in training mode."""
        torch.manual_seed(0)
        network: Network = build(self.experiment.network)
        return network.to(device).train()


def subjects(full: bool) -> list[Subject]:
    """The digits network, a middling DDPM++ and, when asked, CIFAR-10's with 55.7 M parameters."""
    middling = lazy(
        EDMDenoiser,
        model=lazy(
            SongUNet,
            resolution=16,
            channels=64,
            channel_mult=(1, 2),
            num_blocks=2,
            attn_resolutions=(8,),
            dropout=0.2,
        ),
    )
    cifar10 = dataclasses.replace(config_cm_cifar10.experiment(), init_from=None)
    found = [
        Subject("digits", config_cm_digits.experiment(), 128),
        Subject("DDPM++ 16x16", dataclasses.replace(cifar10, network=middling), 16),
    ]
    return [*found, Subject(CIFAR10, cifar10, 4)] if full else found


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--repeats", type=int, default=7, help="of each measurement (default 7)")
    options.add_argument("--batch", type=int, help="samples at once (default: by benchmark)")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the process's own time, for a machine that others use too (with --threads 1)",
    )
    return options


def parsed(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options given, the number of threads set."""
    arguments = options.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    return arguments


def network_parser(description: str) -> argparse.ArgumentParser:
    """The options of the benchmarks that run networks."""
    options = parser(description)
    options.add_argument("--full", action="store_true", help="also CIFAR-10's 55.7 M parameters")
    options.add_argument("--only", help="only the networks whose name contains this")
    options.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    return options


def chosen(options: argparse.Namespace) -> list[Subject]:
    """The subjects that the options ask for, with their batch."""
    found = [s for s in subjects(options.full) if options.only is None or options.only in s.name]
    if options.batch is None:
        return found
    return [dataclasses.replace(s, batch=options.batch) for s in found]


def autocast(options: argparse.Namespace) -> torch.autocast:
    device = torch.device(options.device).type
    return torch.autocast(device, torch.bfloat16, enabled=options.precision == "bf16")


def stopwatch(options: argparse.Namespace) -> Stopwatch:
    """How the options ask for time to be taken."""
    return Stopwatch(torch.device(options.device), options.clock, options.repeats)


def interleaved(
    actions: Mapping[str, Callable[[], object]], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each action, taken in turns after one warm-up each."""
    return stopwatch(options).interleaved(actions)


COSTS = ("seconds", "ratio", "peak MiB", "ratio")


def costs(
    actions: Mapping[str, Callable[[], object]], options: argparse.Namespace
) -> dict[str, tuple[str, ...]]:
    """The cells `COSTS` of each action, its ratios being those to the first."""
    base, device = next(iter(actions)), torch.device(options.device)
    actions[base]()  # what this leaves, as an optimizer's state, is there in all the others
    # Before the turns, as their warm-up: the process keeps memory that later ones free.
    memory = {name: peak_memory(action, device) for name, action in actions.items()}
    seconds = stopwatch(options).in_turns(actions)
    return {
        name: (
            f"{statistics.median(seconds[name]):.4f}",
            f"{median_ratio(seconds[name], seconds[base]):.2f}",
            f"{memory[name]:.0f}",
            f"{memory[name] / memory[base]:.2f}",
        )
        for name in actions
    }


def a_batch(network: Network, size: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Images [B, C, H, W] in [-1, 1] and class rows [B, cond_dim], None without classes."""
    x = torch.rand(size, *network.sample_shape, device=device) * 2 - 1
    if not network.cond_dim:
        return x, None
    rows = torch.arange(size) % network.cond_dim
    return x, torch.eye(network.cond_dim, device=device)[rows]


def peak_memory(action: Callable[[], object], device: torch.device) -> float:
    """Most MiB in use while the action runs: of the device, or of this process on Linux.

    NaN where neither can be told.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        action()
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    [kib] = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(kib) / 2**10


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """The median over the turns of one action's time over another's in the same turn."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print rows, of which the first is the header, in aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"\n{title}")
    for row in rows:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(["", first, *rest]).rstrip())


def machine(options: argparse.Namespace) -> str:
    """The hardware, the versions and how busy the machine was, on one line."""
    return stopwatch(options).machine()
