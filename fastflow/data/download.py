"""Downloads a published file once: progress, checksum, and a name only when complete."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastflow.errors import DataError

_CHUNK = 1 << 20
_TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class Remote:
    """A published file.

    Attributes:
        url: where it is.
        size: in bytes.
        md5: its checksum as the publisher gives it, hexadecimal.
    """

    url: str
    size: int
    md5: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def cache_folder() -> Path:
    """Where downloads go: $FASTFLOW_DATA if set, else ~/.cache/fastflow."""
    given = os.environ.get("FASTFLOW_DATA")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "fastflow"


def download(remote: Remote, folder: Path) -> Path:
    """The path of the file in `folder`, fetched unless it is there already.

    Processes that ask at the same time fetch once. The file has its name only when complete and
    correct; an interrupted download leaves a `.part` file that the next one overwrites.

    Raises:
        DataError: no connection, nowhere to write, or other contents than published.
    """
    path = folder / remote.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_name(f"{path.name}.lock")):
            if not path.exists():
                _fetch(remote, path.with_name(f"{path.name}.part"), path)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{remote.url}: download to {folder} failed: {error}") from error
    return path


def _fetch(remote: Remote, part: Path, path: Path) -> None:
    from tqdm import tqdm

    digest, received = hashlib.md5(usedforsecurity=False), 0
    with (
        urllib.request.urlopen(remote.url, timeout=_TIMEOUT) as response,
        part.open("wb") as file,
        tqdm(total=remote.size, unit="B", unit_scale=True, desc=remote.name) as progress,
    ):
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            received += len(chunk)
            progress.update(len(chunk))
    if (received, digest.hexdigest()) != (remote.size, remote.md5):
        part.unlink()
        raise DataError(
            f"{remote.url}: {received} bytes with md5 {digest.hexdigest()} received, "
            f"{remote.size} bytes with md5 {remote.md5} expected; try again, or get the file "
            f"elsewhere and put it at {path}"
        )
    part.replace(path)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system frees it when the process ends."""
    import fcntl

    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
