"""The Slurm script: what it starts, and what it does shortly before its time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm" / "train.sbatch"
ENVIRONMENT = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
}
SCONTROL = """\
case "$1" in
    show) printf 'node1\\nnode2\\n' ;;
    *) echo "$@" > "$NOTES/scontrol" ;;
esac
"""


@pytest.fixture
def start(tmp_path: Path):
    """Start the script where `srun` is what a test says."""

    def run(srun: str) -> subprocess.Popen[str]:
        programs: Mapping[str, str] = {
            "bin/srun": 'echo "$@" > "$NOTES/begun"\nmv "$NOTES/begun" "$NOTES/srun"\n' + srun,
            "bin/scontrol": SCONTROL,
            "venv/bin/activate": "",
        }
        for name, text in programs.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#!/bin/bash\n{text}")
            path.chmod(0o755)
        return subprocess.Popen(
            ["bash", str(SCRIPT), "--config", "a file.py", "parallel.shard=8"],
            env={
                **ENVIRONMENT,
                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                "VENV": str(tmp_path / "venv"),
                "NOTES": str(tmp_path),
            },
            text=True,
        )

    return run


def wait_for(path: Path) -> str:
    until = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} never came"
        time.sleep(0.01)
    return path.read_text()


def test_its_grammar() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    options = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in options
    assert "#SBATCH --signal=B:USR1@600" in options


@pytest.mark.parametrize("status", [0, 3])
def test_one_torchrun_on_each_machine(start, tmp_path: Path, status: int) -> None:
    assert start(f"exit {status}").wait(timeout=20) == status
    words = (tmp_path / "srun").read_text().split()
    assert words[0] == "torchrun"
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=node1:29500"} < set(words)
    assert {"--rdzv-id=77-0", "--max-restarts=3"} < set(words)
    assert " ".join(words).endswith("train.py --config a file.py parallel.shard=8")
    assert not (tmp_path / "scontrol").exists()


def test_before_its_time_is_up_it_stops_training_and_queues_again(start, tmp_path: Path) -> None:
    """Training takes its time to save, and ends with the status of a stopped run."""
    saving = "sleep 0.3; echo saved > $NOTES/saved; exit 143"
    job = start(f"trap '{saving}' TERM\ntouch $NOTES/ready\nwhile :; do sleep 0.05; done")
    wait_for(tmp_path / "ready")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "scontrol").read_text().split() == ["requeue", "77"]
