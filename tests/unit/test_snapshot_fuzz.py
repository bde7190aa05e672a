"""Changed snapshots and files of weights: read or refused, never anything else.

Each run is a process of its own whose memory is bounded, with an alarm for every file, so that a
crash, a hang or a bomb shows.
"""

import io
import os
import pickletools
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from fastflow.errors import CheckpointError
from fastflow.snapshot import read_snapshot, read_state_dict
from snapshot_files import dumps, edm2_entries, edm2_network, edm_entries, edm_network

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
SECONDS = 20


class Hang(BaseException):
    """A file took longer than `SECONDS`; no `except Exception` catches it."""


def originals():
    """Valid files with their readers."""
    for protocol in (2, 3, 4):
        yield read_snapshot, dumps(edm_entries(edm_network()), protocol)
        yield read_snapshot, dumps(edm2_entries(edm2_network()), protocol)
    for zipped in (True, False):
        file = io.BytesIO()
        state = edm_network().state_dict()
        torch.save({"ema": state}, file, _use_new_zipfile_serialization=zipped)
        yield read_state_dict, file.getvalue()


OPERATIONS = [ord(operation.code) for operation in pickletools.opcodes]


def flip(data, draw):
    """Other bits in some bytes."""
    for _ in range(draw.choice((1, 1, 2, 8))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def other_bytes(data, draw):
    for _ in range(draw.choice((1, 2, 5))):
        data[draw.randrange(len(data))] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))


def other_operation(data, draw):
    """An operation of pickle in the place of something."""
    for _ in range(draw.choice((1, 1, 3))):
        data[draw.randrange(len(data))] = draw.choice(OPERATIONS)


def other_length(data, draw):
    """A large or negative number where a length may be."""
    value = draw.choice((0, 1, 255, 1 << 16, 1 << 24, 1 << 30, (1 << 31) - 1, (1 << 32) - 1))
    place = draw.randrange(len(data))
    data[place : place + 4] = struct.pack("<I", value)


def insert(data, draw):
    place = draw.randrange(len(data))
    data[place:place] = bytes(draw.choice(OPERATIONS) for _ in range(draw.randrange(1, 6)))


def repeat(data, draw):
    """A part many times over."""
    start = draw.randrange(len(data))
    part = data[start : start + draw.choice((1, 2, 5, 50))]
    data[start:start] = part * draw.choice((1, 10, 2000))


def splice(data, draw):
    """A part moved over another."""
    size = draw.randrange(1, 300)
    start, end = draw.randrange(len(data)), draw.randrange(len(data))
    data[end : end + size] = data[start : start + size]


def remove(data, draw):
    start = draw.randrange(len(data))
    del data[start : start + draw.choice((1, 1, 4, 100))]


def cut(data, draw):
    del data[draw.randrange(len(data)) :]


CHANGES = (
    *(flip, other_bytes, other_operation, other_length),
    *(insert, repeat, splice, remove, cut),
)


def fuzz(seed, cases, seconds):
    """Read `cases` changed files, or as many as `seconds` allow; gives how many were read."""
    files = list(originals())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        for read, data in files:
            path.write_bytes(data)
            read(path)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + GIB, size + GIB))
        signal.signal(signal.SIGALRM, _hang)
        end, outcomes = time.monotonic() + seconds, {"read": 0, "refused": 0}
        for case in range(cases):
            draw = random.Random(f"{seed} {case}")
            read, data = files[case % len(files)]
            data = bytearray(data)
            for _ in range(draw.choice((1, 1, 1, 2, 4))):
                draw.choice(CHANGES)(data, draw)
                data = data or bytearray(1)
            path.write_bytes(data)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                outcomes[attempt(read, path)] += 1
            except BaseException as error:
                raise AssertionError(f"seed {seed} case {case}: {error!r}") from error
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if time.monotonic() > end:
                break
    print(outcomes["read"], outcomes["refused"])


def attempt(read, path):
    try:
        entries = read(path)
    except CheckpointError as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert message.isprintable(), message
        assert str(path) in message
        return "refused"
    # What is read can be used.
    weights = entries if read is read_state_dict else entries["ema"].state_dict()
    assert all(type(key) is str for key in weights)
    assert sum(tensor.clone().nbytes for tensor in weights.values()) < 1 << 20
    return "read"


def _hang(*_):
    raise Hang


def run(seed, cases, seconds):
    """Fuzz in another process: numbers of files read and refused."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, __file__, str(seed), str(cases), str(seconds)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return tuple(map(int, done.stdout.split()))


linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded as Linux does it")


@linux
def test_changed_files_are_read_or_refused():
    read, refused = run(seed=0, cases=500, seconds=200)
    assert read > 5
    assert refused > 50


@linux
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 3))
def test_many_changed_files_are_read_or_refused(seed):
    read, refused = run(seed=seed, cases=10**9, seconds=30)
    assert read > 0
    assert refused > 0


def test_every_change_changes():
    for change in CHANGES:
        before = bytes(range(256)) * 4
        changed = [bytearray(before) for _ in range(5)]
        for i, data in enumerate(changed):
            change(data, random.Random(i))
        assert any(data != before for data in changed)


if __name__ == "__main__":
    fuzz(*map(int, sys.argv[1:]))
