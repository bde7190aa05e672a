"""Reads the weights that others publish, without running anything that the files carry.

NVlabs EDM and EDM2 (arXiv 2206.00364, 2312.02696) publish pickles of whole Python objects, source
code included, which the original loader executes. Here the objects come back as inert trees of
names, plain values and tensors; the source code stays text and is dropped. A hostile file can at
most give wrong numbers.
"""

from __future__ import annotations

import argparse
import io
import math
import mmap
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fastflow.errors import CheckpointError
from fastflow.safe_pickle import (
    Built,
    Find,
    Limits,
    Maker,
    Name,
    PickledArray,
    RefusedPickle,
    as_bytes,
    as_integer,
    as_text,
    not_called,
    number_makers,
    read_pickle,
    shorten,
)

_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}
_NUMBERS = {name: name for kind in "iu" for name in (f"{kind}{size}" for size in (1, 2, 4, 8))}
_NUMBERS |= {"f2": "f2", "f4": "f4", "f8": "f8", "b1": "b1"}
# Modules within modules, and lists within lists; a module in a module counts twice.
_DEPTH = 50
# Values in all. A module has 10 to 40, a large network about a thousand modules.
_VALUES = 300_000
# The largest product of the other sizes of a tensor without elements.
_EMPTY = 1 << 30
_ZIP = b"PK\x03\x04"
# How torch's older format starts: a pickled magic number, then the pickled version 1001.
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e") + b"\x80\x02M\xe9\x03."

_T = TypeVar("_T")


@dataclass(frozen=True)
class SnapshotModule:
    """An object of a snapshot: a network, one of its parts, or a thing without tensors. Inert.

    Attributes:
        class_name: of the original, without its module, e.g. "EDMPrecond", "SongUNet", "Precond".
        kwargs: keyword arguments it was constructed with: numbers, texts, lists, dicts, None.
        args: its positional ones.
        attributes: other public values such as sigma_data or label_dim; tensors and arrays (as
            tensors) may occur.
        children: the modules in it, in order.
        tensors: its own parameters and persistent buffers, in order; on the CPU, without gradient.
    """

    class_name: str
    kwargs: Mapping[str, object]
    args: tuple[object, ...]
    attributes: Mapping[str, object]
    children: Mapping[str, SnapshotModule]
    tensors: Mapping[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by full name, in the order of the original's `state_dict()`."""
        state = dict(self.tensors)
        for name, child in self.children.items():
            state |= {f"{name}.{key}": tensor for key, tensor in child.state_dict().items()}
        return state


def read_snapshot(path: Path) -> Mapping[str, object]:
    """Read an NVlabs EDM or EDM2 `.pkl` snapshot.

    Returns:
        Its entries: the network "ema", a `SnapshotModule` with its tensors in the type of the file
        (EDM2: float16); others, such as "loss_fn" and "dataset_kwargs", plain or a
        `SnapshotModule`.

    Raises:
        CheckpointError: the file is missing, damaged, no such snapshot, or holds something that
            a snapshot has no need of; one line that names the file and the reason.
    """
    return _guarded(path, "an EDM or EDM2 snapshot", _read_snapshot)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the weights of a `torch.save` file, as DiT, SiT and OpenAI publish them.

    Returns:
        Tensors by name: of the file itself, else of its entry "ema", "model" or "state_dict", the
        first there is. Where the file allows it they are mapped: read when they are used.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something other than tensors and
            plain data; one line that names the file and the reason.
    """
    return _guarded(path, "a file of weights (.pt)", _read_state_dict)


def _guarded(path: Path, what: str, read: Callable[[Path], _T]) -> _T:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is no file; give {what}")
    try:
        return read(path)
    except RefusedPickle as error:
        reason = str(error)
    # Whatever a file provokes in torch, numpy or zipfile is the file's fault, not the user's.
    except Exception as error:
        reason = f"{type(error).__name__}: {shorten(str(error))}"
    raise CheckpointError(f"{path} is not {what} as published: {reason}. Get it again there")


# --- snapshots ----------------------------------------------------------------------------------


def _read_snapshot(path: Path) -> Mapping[str, object]:
    with path.open("rb") as file:
        if file.read(len(_ZIP)) == _ZIP:
            raise RefusedPickle("it is a file of torch.save or another zip")
        # Mapped, so that weights are copied once: from the file to their tensors.
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    limits = Limits(copies=2 * len(data))
    top, end = read_pickle(data, _snapshot_names(limits), limits)
    if end != len(data):
        raise RefusedPickle(f"{len(data) - end} bytes after its end")
    entries = _Conversion(Limits(copies=4 * len(data), operations=_VALUES)).plain(top, 0)
    if not isinstance(entries, dict) or not isinstance(entries.get("ema"), SnapshotModule):
        raise RefusedPickle("no dict with a network 'ema'")
    return entries


class _Object(Built):
    """An object as the file tells it: its class, and what Python calls its `__dict__`."""

    def __init__(self, class_name: str) -> None:
        self.class_name = class_name
        self.state: dict[str, object] | None = None

    def build(self, state: object) -> None:
        if self.state is not None:
            raise RefusedPickle(f"a second state of {shorten(self.class_name)}; refused")
        self.state = _texts(state, f"the state of {shorten(self.class_name)}")


@dataclass(frozen=True)
class _Storage:
    """The memory of tensors: `values` [n], of one type."""

    values: Tensor


def _snapshot_names(limits: Limits) -> Find:
    """What stands for the names in a snapshot; made anew for every file."""
    makers: dict[str, Maker] = {
        "torch_utils.persistence _reconstruct_persistent_obj": _persistent,
        "dnnlib.util EasyDict": _empty_dict,
        "collections OrderedDict": _empty_dict,
        "torch._utils _rebuild_parameter": _parameter,
        "torch._utils _rebuild_tensor_v2": _tensor,
        "torch.storage _load_from_bytes": lambda arguments: _storage(arguments, limits),
        **dict.fromkeys(("builtins set", "__builtin__ set"), lambda given: _set(given, limits)),
        **number_makers(_NUMBERS, "numbers", limits),
    }

    def find(module: str, name: str) -> Maker | None:
        if re.fullmatch(r"torch\.nn\.modules\.[a-z]{1,30}", module) and re.fullmatch(
            r"[A-Z][A-Za-z0-9]{0,50}", name
        ):
            return lambda arguments: _container(name, arguments)
        return makers.get(f"{module} {name}")

    return find


def _persistent(arguments: tuple[object, ...]) -> object:
    """An object of a class that the file brings along; its source code is dropped here."""
    if len(arguments) != 1:
        raise RefusedPickle("damaged pickle (arguments of a persistent object)")
    meta = _texts(arguments[0], "a persistent object")
    as_text(meta.get("module_src"))
    as_integer(meta.get("version"))
    if as_text(meta.get("type")) != "class":
        raise RefusedPickle("a persistent object that is no class; refused")
    made = _Object(as_text(meta.get("class_name")))
    made.build(meta.get("state"))
    return made


def _container(name: str, arguments: tuple[object, ...]) -> object:
    if arguments:
        raise RefusedPickle(f"torch.nn.{name} called with arguments; refused")
    return _Object(name)


def _empty_dict(arguments: tuple[object, ...]) -> object:
    if arguments:
        raise RefusedPickle("a dict made by a call with arguments; refused")
    return {}


def _set(arguments: tuple[object, ...], limits: Limits) -> object:
    members = arguments[0] if len(arguments) == 1 else None
    if not isinstance(members, list):
        raise RefusedPickle("a set made of what is no list; refused")
    limits.copy(len(members))
    return {as_text(member) for member in members}


def _storage(arguments: tuple[object, ...], limits: Limits) -> object:
    """A storage, which is written as a file of its own in the format that torch.save had once.

    Magic number and version, facts of the machine, a reference to the storage, the list of the
    names of storages, number of elements (int64), elements; each part but the last two a pickle.
    """
    if len(arguments) != 1:
        raise RefusedPickle("damaged storage (arguments)")
    data = memoryview(as_bytes(arguments[0]))
    limits.copy(len(data))
    if data[: len(_LEGACY)] != _LEGACY:
        raise RefusedPickle("damaged storage (magic number or version)")
    data = data[len(_LEGACY) :]
    machine, end = read_pickle(data, _no_name, limits)
    data = data[end:]
    reference, end = read_pickle(data, _storage_type, limits, _Reference)
    data = data[end:]
    keys, end = read_pickle(data, _no_name, limits)
    data = data[end:]

    match machine:
        case {
            "protocol_version": 1001,
            "little_endian": True,
            "type_sizes": {"short": 2, "int": 4, "long": 4 | 8},
        }:
            pass
        case _:
            raise RefusedPickle("a storage of an unknown kind of machine")
    match reference.identity if isinstance(reference, _Reference) else None:
        case ("storage", Name() as kind, str() as key, str(), int() as count, None):
            pass
        case _:
            raise RefusedPickle("damaged storage (reference)")
    match keys:
        case [str() as listed] if listed == key:
            pass
        case _:
            raise RefusedPickle("damaged storage (its list of storages)")
    dtype = _DTYPES[kind.text.removeprefix("torch.")]
    if struct.pack("<q", count) != data[:8] or count * dtype.itemsize != len(data) - 8:
        raise RefusedPickle(f"a storage of {count} elements of {dtype} in {len(data)} bytes")
    raw = torch.empty(len(data) - 8, dtype=torch.uint8)
    raw.numpy().data[:] = data[8:]
    return _Storage(raw.view(dtype))


@dataclass(frozen=True)
class _Reference:
    """What a storage's file says of the storage."""

    identity: object


def _no_name(_module: str, _name: str) -> None:
    return None


def _storage_type(module: str, name: str) -> Maker | None:
    return not_called if module == "torch" and name in _DTYPES else None


def _tensor(arguments: tuple[object, ...]) -> object:
    """A view of a storage, inside it and with no more elements than it has."""
    match arguments:
        case (_Storage(values=values), int() as start, tuple() as sizes, tuple() as strides, *rest):
            pass
        case _:
            raise RefusedPickle("damaged tensor")
    # Gradient or not, hooks, and of late a dict for special tensors.
    if len(rest) not in (2, 3) or not isinstance(rest[0], bool) or any(rest[1:]):
        raise RefusedPickle("a tensor with hooks or of a special kind; refused")
    shape, steps = [as_integer(n) for n in sizes], [as_integer(n) for n in strides]
    if len(shape) != len(steps) or len(shape) > 8 or min([start, *shape, *steps]) < 0:
        raise RefusedPickle("a tensor of negative or unequal sizes and strides")
    # A step that is never taken says nothing.
    steps = [step if n > 1 else 1 for n, step in zip(shape, steps, strict=True)]
    last = start + sum((n - 1) * step for n, step in zip(shape, steps, strict=True) if n)
    count = math.prod(shape)
    # An empty tensor, too, has sizes that can be absurd.
    absurd = math.prod(n for n in shape if n) > (len(values) if count else _EMPTY)
    if absurd or (count and last >= len(values)):
        raise RefusedPickle(
            f"a tensor of shape {tuple(shape)} that reaches outside its {len(values)} elements"
        )
    if not count:
        return values.new_empty(shape)
    return values.as_strided(shape, steps, start)


def _parameter(arguments: tuple[object, ...]) -> object:
    match arguments:
        case (Tensor() as tensor, bool(), hooks) if not hooks:
            return tensor
    raise RefusedPickle("a parameter that is no tensor, or has hooks; refused")


def _texts(value: object, what: str) -> dict[str, object]:
    """`value` as a dict whose keys are texts, the same object."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise RefusedPickle(f"{what} is no dict of names")
    return value


class _Conversion:
    """Makes trees of what a pickle left, which may be nested without end or hold itself."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def plain(self, value: object, depth: int) -> object:
        """Numbers, texts, bytes, None, tensors, lists, tuples, sets, dicts, modules."""
        self.limits.step()
        if depth > _DEPTH:
            raise RefusedPickle(f"nested more than {_DEPTH} deep, or in itself; refused")
        match value:
            case None | bool() | int() | float():
                return value
            case str():
                self.limits.copy(len(value))
                return value
            case bytes() | memoryview():
                self.limits.copy(len(value))
                return bytes(value)
            case Tensor():
                self.limits.copy(value.nbytes)
                return value
            case PickledArray(values=array) if array is not None:
                self.limits.copy(array.nbytes)
                # A copy in the byte order of this machine.
                return torch.tensor(array.astype(array.dtype.newbyteorder("=")))
            case list():
                return [self.plain(item, depth + 1) for item in value]
            case tuple():
                return tuple(self.plain(item, depth + 1) for item in value)
            case set():
                return {self.plain(item, depth + 1) for item in value}
            case dict():
                entries = _texts(value, "a dict").items()
                return {key: self.plain(item, depth + 1) for key, item in entries}
            case _Object():
                return self.module(value, depth + 1)
        raise RefusedPickle(f"a {type(value).__name__} where data is expected; refused")

    def module(self, made: _Object, depth: int) -> SnapshotModule:
        name = made.class_name
        if made.state is None or not name.isidentifier():
            raise RefusedPickle(f"an object of class {shorten(name)} without contents or name")
        hooks = [key for key, value in made.state.items() if "hook" in key and value]
        if hooks:
            raise RefusedPickle(f"{name} has functions in {shorten(hooks[0])}; refused")
        state = {k: self.plain(v, depth) for k, v in made.state.items() if "hook" not in k}
        groups = {
            group: _texts(state.get(group) or {}, f"{group} of {name}")
            for group in ("_parameters", "_buffers", "_modules", "_init_kwargs")
        }
        dropped = state.get("_non_persistent_buffers_set", set())
        # None where the original was told to keep no record.
        args = state.get("_init_args") or ()
        if not isinstance(dropped, set) or not isinstance(args, tuple | list):
            raise RefusedPickle(f"damaged state of {name}")
        kept = {key: value for key, value in groups["_buffers"].items() if key not in dropped}
        names = [*groups["_parameters"], *kept, *groups["_modules"]]
        if len(set(names)) < len(names) or any(not key or "." in key for key in names):
            raise RefusedPickle(f"names in {name} that occur twice or have a dot")
        return SnapshotModule(
            class_name=name,
            kwargs=groups["_init_kwargs"],
            args=tuple(args),
            attributes={key: value for key, value in state.items() if not key.startswith("_")},
            children=_only(SnapshotModule, groups["_modules"], name),
            tensors=_only(Tensor, groups["_parameters"] | kept, name),
        )


def _only(kind: type[_T], members: Mapping[str, object], where: str) -> dict[str, _T]:
    """The members of a module but those that are None, each of one kind."""
    found = {}
    for key, value in members.items():
        if isinstance(value, kind):
            found[key] = value
        elif value is not None:
            raise RefusedPickle(f"{shorten(key)} in {where} is no {kind.__name__}")
    return found


# --- weights of torch.save ----------------------------------------------------------------------


# All that files of weights name. The training runs of DiT and SiT add their command line; as a
# namespace it is inert, and not looked at.
_WEIGHTS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "argparse Namespace",
    *(f"torch {name}" for name in (*_DTYPES, "BoolStorage")),
}
# The pickle without its tensors, which takes some hundred bytes for each.
_MAX_PICKLE = 4 << 20


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        zipped = file.read(len(_ZIP)) == _ZIP
    (_check_zip if zipped else _check_legacy)(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    for name in ("ema", "model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
            break
    if not isinstance(loaded, dict) or not loaded:
        raise RefusedPickle("no dict of tensors")
    weights = {}
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise RefusedPickle(
                f"{shorten(str(key)[:100])} is no tensor, and there is no ema, model or state_dict"
            )
        weights[key] = value.detach()
    _check_tensors(weights, path.stat().st_size)
    return weights


def _check_zip(path: Path) -> None:
    """Refuse archives whose members are larger than the file, and names in their pickles."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise RefusedPickle("an archive with more contents than bytes; refused")
        pickles = [member for member in members if member.filename.endswith(".pkl")]
        for member in pickles:
            if member.file_size > _MAX_PICKLE:
                raise RefusedPickle(f"{member.file_size} bytes of names, {_MAX_PICKLE} accepted")
            _check_names(archive.read(member))
    if len(pickles) != 1:
        raise RefusedPickle("not an archive of torch.save")


def _check_legacy(path: Path) -> None:
    """Refuse names in the pickles that the file starts with."""
    with path.open("rb") as file:
        data = file.read(_MAX_PICKLE)
    if not data.startswith(_LEGACY):
        raise RefusedPickle("neither of torch.save's two formats")
    position = len(_LEGACY)
    # Facts of the machine, the object, the names of its storages.
    for _ in range(3):
        position += _check_names(data[position:])


def _check_names(data: bytes) -> int:
    """Refuse a pickle that names what weights have no need of; gives its length."""
    file = io.BytesIO(data)
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL" and argument not in _WEIGHTS:
            shown = shorten(str(argument).replace(" ", "."))
            raise RefusedPickle(f"it asks to load {shown}, which is not plain data; refused")
    return file.tell()


def _check_tensors(weights: Mapping[str, Tensor], size: int) -> None:
    """Refuse tensors that are not plain views of what the file holds."""
    for name, tensor in weights.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise RefusedPickle(f"{shorten(name)} is of a special kind")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise RefusedPickle(f"{shorten(name)} reaches outside its storage")
    # Tied weights are few; a hostile file names the same memory again and again.
    if sum(tensor.nbytes for tensor in weights.values()) > 4 * size:
        raise RefusedPickle("tensors of many times its bytes; refused")
