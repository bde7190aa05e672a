"""One training at a time in a run directory."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from fastflow.errors import ConfigError, warn

LOCK = ".lock"
# A network file system takes a lock from a machine that went down after a minute and a half.
_LEASE = 120.0
_MOMENT = 0.5


class RunLock:
    """A lock on a run directory, held until it is released or the process ends, however it does.

    A record lock of POSIX: forked data workers do not inherit it, so none of them keeps it when
    their parent was killed. File systems that have no locks are left unlocked.

    Args:
        run_dir: the directory, which need not exist yet.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK
        self._file: TextIO | None = None

    def acquire(self, lease: float = _LEASE) -> None:
        """Take the lock.

        Args:
            lease: seconds to wait for it when another machine has it, which may be down.

        Raises:
            ConfigError: another process holds it.
            OSError: the directory cannot be used.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a+")
        try:
            if not _locked(file):
                self._wait(file, lease)
        except OSError:  # there are no locks here
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file

    def release(self) -> None:
        """Give the lock back; more than once does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _wait(self, file: TextIO, lease: float) -> None:
        """Wait for another machine; ConfigError where that is of no use."""
        file.seek(0)
        holder = file.read(200)
        taken = f"{self._path.parent} is in use by another training ({holder})"
        otherwise = "wait for it, stop it, or choose another directory with --run-dir"
        if holder.endswith(f" on {socket.gethostname()}"):
            raise ConfigError(f"{taken}; {otherwise}")
        warn(f"{taken}; waiting {lease:g} s for it, as that machine may be down")
        until = time.monotonic() + lease
        while not _locked(file):
            if time.monotonic() > until:
                raise ConfigError(
                    f"{taken}; {otherwise}; if that machine is gone, remove {self._path}"
                )
            time.sleep(_MOMENT)


def _locked(file: TextIO) -> bool:
    """Try to lock a file; whether that was possible."""
    import fcntl  # not everywhere, but neither is training

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True
