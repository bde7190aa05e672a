"""Samples per second and latency of few-step sampling, beside diffusion samplers of the network.

`fastflow bench-sampling` measures the same of any configuration or model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.common import chosen, machine, network_parser, parsed, print_table, stopwatch
from fastflow.sampling_speed import HEAD, cells, network_of, speeds


def main(argv: Sequence[str] | None = None) -> None:
    options = parsed(network_parser(__doc__ or ""), argv)
    rows = [("network", "batch", *HEAD)]
    for subject in chosen(options):
        device = torch.device(options.device)
        network = network_of(subject.experiment, device, precision=options.precision)
        method = subject.experiment.method
        for speed in speeds(method, network, subject.batch, stopwatch(options)):
            rows.append((subject.name, str(subject.batch), *cells(speed)))
    print_table(f"sampling, {options.precision}, {machine(options)}", rows)


if __name__ == "__main__":
    main()
