"""Weights from the files that other projects publish, through converters that packages offer.

fastflow knows no architecture. A package that does offers a function `convert(path, asked)` under
the entry point group "fastflow.pretrained" of its pyproject.toml:

    [project.entry-points."fastflow.pretrained"]
    networks = "networks.pretrained:convert"
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastflow.config import Lazy, build, from_plain
from fastflow.download import Remote, cache_folder, download, is_address, sha256_of
from fastflow.entry_points import offered
from fastflow.errors import CheckpointError, ConfigError, DataError
from fastflow.network import Network
from fastflow.plain import to_plain
from fastflow.weights import SOURCES, gathered, read_header, require_fit, write_weights

GROUP = "fastflow.pretrained"
"""The entry point group of converters."""

_NETWORK = "network"  # the entry of a safetensors header that describes the network


@dataclass(frozen=True)
class Asked:
    """What a file itself may not say.

    Attributes:
        kind: which of several families whose files look alike, in lower case, or None.
        heads: number of attention heads, or None.
        target: the network that the weights are for, or None; it says what is left open.
    """

    kind: str | None = None
    heads: int | None = None
    target: Lazy | None = None


@dataclass(frozen=True)
class Converted:
    """The contents of a file of another project.

    Attributes:
        kind: what it is, in words.
        network: the network that it is of.
        weights: by our names, float32.
    """

    kind: str
    network: Lazy
    weights: Mapping[str, Tensor]


class Converter(Protocol):
    """What a package offers; raises CheckpointError for a file that it cannot convert."""

    def __call__(self, path: Path, asked: Asked) -> Converted: ...


def convert(path: Path, asked: Asked) -> Converted:
    """Read a file of another project by the first converter that knows it.

    Raises:
        CheckpointError: it does not exist, or no converter knows it: what each says.
    """
    if not path.exists():
        raise CheckpointError(f"weights {path} do not exist; give {SOURCES}")
    if path.is_dir() or path.suffix == ".safetensors":
        raise CheckpointError(f"{path} needs no conversion; it is loaded as it is")
    if not path.is_file():
        raise CheckpointError(f"{path} is no file of weights; give {SOURCES}")
    refusals = []
    for converter in _converters():
        try:
            return converter(path, asked)
        except CheckpointError as error:
            refusals.append(str(error))
    raise CheckpointError("; ".join(refusals) or f"{path}: {_NO_CONVERTER}")


_NO_CONVERTER = (
    f"no installed package reads weights of other projects (entry points {GROUP!r}); install "
    f"fastflow again: make setup"
)


def _converters() -> list[Converter]:
    try:
        return offered(GROUP)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def fetched(source: str) -> Path:
    """Where the file or directory is that `source` names; an address is downloaded once.

    Downloads go to the folder weights/HOST/PATH of the cache (`cache_folder`).

    Raises:
        CheckpointError: no such address, no connection, or another checksum; the text says where
            to put the file by hand.
    """
    if not is_address(source):
        return Path(source).expanduser()
    try:
        remote = Remote.parse(source)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    folder = cache_folder() / "weights" / remote.folder
    try:
        return download(remote, folder)
    except DataError as error:
        raise CheckpointError(
            f"{error}; a copy from elsewhere belongs at {folder / remote.name}, or is named itself "
            f"in place of the address"
        ) from error


def save(converted: Converted, path: Path, source: str, origin: Path) -> int:
    """Write a safetensors file that says which network it is of, and where it comes from.

    Args:
        converted: what to write.
        path: the file.
        source: how the original was named.
        origin: the original itself.

    Returns:
        The number of parameters of the network.

    Raises:
        CheckpointError: the network cannot be built, the weights do not fit it, or the disk
            refused.
    """
    try:
        with torch.device("meta"):
            network: Network = build(converted.network)
    except ConfigError as error:
        raise CheckpointError(f"{source} holds a network that is none of ours: {error}") from error
    require_fit(converted.weights, network.state_dict(), source)
    header = {
        _NETWORK: json.dumps(to_plain(converted.network)),
        "kind": converted.kind,
        "source": source.partition("#")[0] if is_address(source) else origin.name,
        "sha256": sha256_of(origin),
    }
    write_weights(path, gathered(converted.weights, keep=True), header)
    return sum(parameter.numel() for parameter in network.parameters())


def network_of(path: Path, allow: Iterable[str] = ()) -> Lazy | None:
    """The network that a safetensors file describes in its header; None where it has none.

    Raises:
        CheckpointError: the file cannot be read, or its description is none.
    """
    text = read_header(path).get(_NETWORK)
    if text is None:
        return None
    try:
        network = from_plain(json.loads(text), allow)
    except (ConfigError, ValueError) as error:
        raise CheckpointError(f"{path}: its description of the network: {error}") from error
    if not isinstance(network, Lazy):
        raise CheckpointError(f"{path} describes no network")
    return network


def require_same_reading(given: Lazy, wanted: Lazy, source: object) -> None:
    """Raise CheckpointError where two networks of one class differ in a number.

    Such a number (the scale of noise labels, the standard deviation of the data) has no tensor
    that would not fit, but the weights mean nothing with another.
    """
    if given.target is not wanted.target:
        return
    for name, value in given.kwargs.items():
        other = wanted.kwargs[name]
        if isinstance(value, int | float) and value != other:
            raise CheckpointError(
                f"{source} is of a network with {name}={value!r}, this one has {name}={other!r}; "
                f"set network.{name}={value!r}"
            )
