"""`python -m benchmarks`: every benchmark in a small version, in about three minutes on a CPU."""

from __future__ import annotations

import torch

from benchmarks import data, overhead, sampling, scaling, step_time, tangent

# One thread and its own time, so that the figures survive a machine that others use too.
ON_CPU = ["--threads", "1", "--clock", "cpu"]

for benchmark in (step_time, tangent, sampling, overhead, scaling, data):
    benchmark.main(["--repeats", "3", *([] if torch.cuda.is_available() else ON_CPU)])
