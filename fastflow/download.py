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
from urllib.parse import quote, unquote, urlsplit

from fastflow.errors import DataError

_CHUNK = 1 << 20
_TIMEOUT = 30.0  # seconds without a byte
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Remote:
    """A published file.

    Attributes:
        url: where it is.
        size: in bytes; None where the publisher gives none.
        md5, sha256: its checksums as the publisher gives them, hexadecimal, or None.
    """

    url: str
    size: int | None = None
    md5: str | None = None
    sha256: str | None = None

    @classmethod
    def parse(cls, text: str) -> Remote:
        """The file at an https:// address; `#sha256=HEX` at its end says what it must hold.

        Raises:
            DataError: another kind of address, or no such checksum.
        """
        url, _, fragment = text.partition("#")
        if not _is_trusted(url) or urlsplit(url).path[-1:] in ("", "/"):
            raise DataError(f"{text}: accepted: an https:// address of a file")
        if not fragment:
            return cls(url)
        kind, _, digest = fragment.partition("=")
        if kind != "sha256" or len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef"):
            raise DataError(
                f"{text}: {fragment!r} given, accepted after '#': sha256= and 64 hexadecimal digits"
            )
        return cls(url, sha256=digest.lower())

    @property
    def name(self) -> str:
        """The name of the file."""
        return _plain(urlsplit(self.url).path.rsplit("/", 1)[-1])

    @property
    def folder(self) -> Path:
        """Host, path and query as a relative path: a place of its own for every address."""
        parts = urlsplit(self.url)
        words = [parts.netloc, *parts.path.split("/")[:-1], parts.query]
        return Path(*(_plain(word) for word in words if word))


def _plain(word: str) -> str:
    """A part of an address as the name of a file or folder, whatever it holds."""
    name = quote(unquote(word), safe="")
    return name.replace(".", "%2E") if set(name) == {"."} else name


def is_address(text: str) -> bool:
    """Whether a text names something on the web rather than a path."""
    return "://" in text


def _is_trusted(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)


def cache_folder() -> Path:
    """Where downloads go: $FASTFLOW_DATA (its folder if it names a file), or ~/.cache/fastflow."""
    given = os.environ.get("FASTFLOW_DATA")
    if not given:
        return Path.home() / ".cache" / "fastflow"
    path = Path(given).expanduser()
    return path.parent if path.is_file() else path


def download(remote: Remote, folder: Path) -> Path:
    """The path of the file in `folder`, fetched unless it is there already.

    Processes that ask at the same time fetch once. The file has its name only when complete and
    correct; an interrupted download leaves a `.part` file that the next one overwrites. A file
    that is there already is compared with `sha256`, where that is known.

    Raises:
        DataError: no connection, nowhere to write, or other contents than published.
    """
    path = folder / remote.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_name(f"{path.name}.lock")):
            if not path.exists():
                _fetch(remote, path.with_name(f"{path.name}.part"), path)
            elif remote.sha256 is not None:
                _require_same(path, remote.sha256)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{remote.url}: download to {folder} failed: {error}") from error
    return path


def _require_same(path: Path, sha256: str) -> None:
    found = sha256_of(path)
    if found != sha256:
        raise DataError(
            f"{path} has the sha256 {found}, expected is {sha256}; remove the file so that it is "
            f"downloaded again, or correct the checksum"
        )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(remote: Remote, part: Path, path: Path) -> None:
    from tqdm import tqdm

    published = {"md5": remote.md5, "sha256": remote.sha256}
    wanted = {name: digest for name, digest in published.items() if digest is not None}
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in wanted}
    received = 0
    with urllib.request.urlopen(remote.url, timeout=_TIMEOUT) as response:
        if not _is_trusted(response.url):
            raise OSError(f"redirected to {response.url}, which is not https")
        announced = response.headers.get("Content-Length", "")
        size = int(announced) if remote.size is None and announced.isdecimal() else remote.size
        with (
            part.open("wb") as file,
            tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as progress,
        ):
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                for each in digests.values():
                    each.update(chunk)
                received += len(chunk)
                progress.update(len(chunk))
    found = {name: each.hexdigest() for name, each in digests.items()}
    size = received if size is None else size
    if (received, found) != (size, wanted):
        part.unlink()
        raise DataError(
            f"{remote.url}: {_described(received, found)} received, {_described(size, wanted)} "
            f"expected; try again"
        )
    part.replace(path)


def _described(size: int, digests: dict[str, str]) -> str:
    return f"{size} bytes" + "".join(f" with {name} {value}" for name, value in digests.items())


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system frees it when the process ends."""
    import fcntl

    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
