"""Reads pickles without running anything that they carry.

`pickle.load` imports and calls whatever a file names. Here the operations that data needs are
interpreted one by one; every other is refused. A name in the file stands for a function of the
reader's own choice, or is refused; nothing is ever imported, looked up or given attributes. Lengths
are checked against the bytes that are there, and `Limits` bound what a small file can grow to.
"""

from __future__ import annotations

import math
import pickletools
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What stands for a name: given the arguments of the call that the file asks for.
Maker = Callable[[tuple[object, ...]], object]
# The maker of the name (module, attribute), or None for a name that is not known.
Find = Callable[[str, str], Maker | None]


class RefusedPickle(ValueError):
    """The file is damaged, or it holds something other than the data it should."""


@dataclass
class Limits:
    """What may still be made while one file is read, pickles inside it included.

    Attributes:
        copies: bytes that calls may copy. An honest file copies each of its bytes a few times; a
            hostile one asks for the same large text again and again.
        operations: steps left. A module takes about 200, a large network has a thousand.
    """

    copies: int
    operations: int = 2_000_000

    def step(self) -> None:
        self.operations -= 1
        if self.operations < 0:
            raise RefusedPickle("it asks for more steps than an honest file takes; refused")

    def copy(self, size: int) -> None:
        self.copies -= size
        if self.copies < 0:
            raise RefusedPickle("it asks for more data than it has bytes; refused")


class Name:
    """A name that the file mentions and the reader knows."""

    def __init__(self, module: str, attribute: str, make: Maker) -> None:
        self.text = f"{module}.{attribute}"
        self.make = make


class Built(ABC):
    """An object whose contents the file gives after it was made."""

    @abstractmethod
    def build(self, state: object) -> None:
        """Take the contents.

        Raises:
            RefusedPickle: they are not what this object holds.
        """


def read_pickle(
    data: memoryview,
    find: Find,
    limits: Limits,
    persistent: Callable[[object], object] | None = None,
) -> tuple[object, int]:
    """The value of the pickle at the start of `data`, and the number of bytes it takes.

    Byte strings that are longer than 255 come back as views of `data`, texts of Python 2 as bytes,
    arrays as `PickledArray`. Containers may hold themselves and be nested to any depth.

    Args:
        data: bytes; more may follow.
        find: what stands for each name.
        limits: spent as the pickle is read.
        persistent: what stands for a reference to something outside the pickle; None refuses them.

    Raises:
        RefusedPickle: damaged or not accepted; the text says what was met, in one line.
    """
    try:
        return _Machine(data, find, limits, persistent).run()
    except RefusedPickle:
        raise
    except (ArithmeticError, IndexError, RecursionError, TypeError, ValueError) as error:
        raise RefusedPickle(f"damaged pickle ({_line(error)})") from None


class _Machine:
    """The stack machine that a pickle is a program for, without its dangerous half."""

    def __init__(
        self,
        data: memoryview,
        find: Find,
        limits: Limits,
        persistent: Callable[[object], object] | None,
    ) -> None:
        self.data = data
        self.position = 0
        self.find = find
        self.limits = limits
        self.persistent = persistent
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def run(self) -> tuple[object, int]:
        while True:
            self.limits.step()
            name = self._operation()
            if name == "STOP":
                return self.stack.pop(), self.position
            if name in _NUMBERS:
                self._number(name, self._unpacked(_NUMBERS[name]))
            elif name in _LENGTHS:
                self._text(name, self._bytes(self._unpacked(_LENGTHS[name])))
            elif name in _MEMO:
                self._remember(name)
            elif name in _NAMES:
                self._call(name)
            else:
                self._collect(name)

    def _operation(self) -> str:
        code = self._bytes(1)[0]
        if code not in _OPERATIONS:
            raise RefusedPickle(f"damaged pickle (no operation {code:#04x})")
        return _OPERATIONS[code]

    def _bytes(self, size: int) -> memoryview:
        end = self.position + size
        if size < 0 or end > len(self.data):
            raise RefusedPickle("damaged pickle (it ends too early)")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def _unpacked(self, layout: str) -> Any:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout)))[0]

    def _line(self) -> str:
        found = bytes(self.data[self.position : self.position + 256]).find(b"\n")
        text = str(self._bytes(found), "ascii")
        self.position += 1
        return text

    def _number(self, name: str, value: Any) -> None:
        match name:
            case "PROTO":
                if value > 5:
                    raise RefusedPickle(f"protocol {value} given, up to 5 accepted")
            case "FRAME":
                if value > len(self.data) - self.position:
                    raise RefusedPickle("damaged pickle (it ends too early)")
            case "BINPUT" | "LONG_BINPUT":
                self.memo[value] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                if value not in self.memo:
                    raise RefusedPickle(f"damaged pickle (no value {value})")
                self.stack.append(self.memo[value])
            case _:
                self.stack.append(value)

    def _text(self, name: str, raw: memoryview) -> None:
        match name:
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                self.stack.append(str(raw, "utf-8"))
            case "SHORT_BINBYTES" | "SHORT_BINSTRING":
                self.stack.append(bytes(raw))
            case "LONG1":
                if len(raw) > 8:
                    raise RefusedPickle(f"an integer of {len(raw)} bytes, up to 8 accepted")
                self.stack.append(int.from_bytes(raw, "little", signed=True))
            case _:
                self.stack.append(raw)

    def _remember(self, name: str) -> None:
        if name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif self.persistent is None:
            raise RefusedPickle(f"operation {name} is not accepted here; refused")
        else:
            self.stack.append(self.persistent(self.stack.pop()))

    def _call(self, name: str) -> None:
        """The operations around names; all they lead to are the reader's own functions."""
        match name:
            case "GLOBAL":
                module, attribute = self._line(), self._line()
                self.stack.append(self._named(module, attribute))
            case "STACK_GLOBAL":
                attribute, module = as_text(self.stack.pop()), as_text(self.stack.pop())
                self.stack.append(self._named(module, attribute))
            case "REDUCE" | "NEWOBJ":
                arguments, called = self.stack.pop(), self.stack.pop()
                if not isinstance(called, Name) or not isinstance(arguments, tuple):
                    raise RefusedPickle("a call of what is no name; refused")
                self.stack.append(called.make(arguments))
            case _:
                state, target = self.stack.pop(), self.stack[-1]
                if not isinstance(target, Built):
                    raise RefusedPickle("a state set on what takes none; refused")
                target.build(state)

    def _named(self, module: str, attribute: str) -> Name:
        make = self.find(module, attribute)
        if make is None:
            shown = shorten(f"{module[:100]}.{attribute[:100]}")
            raise RefusedPickle(f"it asks to load {shown}, which is not plain data; refused")
        return Name(module, attribute, make)

    def _collect(self, name: str) -> None:
        """The operations that make constants, and make and fill collections."""
        match name:
            case "NONE":
                self.stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                self.stack.append(name == "NEWTRUE")
            case "MARK":
                self.marks.append(len(self.stack))
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_DICT":
                self.stack.append({})
            case "EMPTY_SET":
                self.stack.append(set())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(self._take(len(self.stack) - int(name[-1]))))
            case "TUPLE":
                self.stack.append(tuple(self._take(self.marks.pop())))
            case "APPEND" | "APPENDS":
                start = self.marks.pop() if name == "APPENDS" else len(self.stack) - 1
                values, target = self._take(start), self.stack[-1]
                if not isinstance(target, list):
                    raise RefusedPickle("damaged pickle (values appended to what is no list)")
                target.extend(values)
            case "ADDITEMS":
                values, target = self._take(self.marks.pop()), self.stack[-1]
                if not isinstance(target, set):
                    raise RefusedPickle("damaged pickle (values added to what is no set)")
                target.update(as_keys(values, "members of a set"))
            case "SETITEM" | "SETITEMS":
                start = self.marks.pop() if name == "SETITEMS" else len(self.stack) - 2
                values, target = self._take(start), self.stack[-1]
                if not isinstance(target, dict):
                    raise RefusedPickle("damaged pickle (items set in what is no dict)")
                keys = as_keys(values[::2], "dict keys")
                target.update(zip(keys, values[1::2], strict=True))
            case _:
                raise RefusedPickle(f"operation {name} is not plain data; refused")

    def _take(self, start: int) -> list[object]:
        """Remove and return the stack from `start` on."""
        if not 0 <= start <= len(self.stack):
            raise RefusedPickle("damaged pickle (empty stack)")
        values = self.stack[start:]
        del self.stack[start:]
        return values


_OPERATIONS = {ord(operation.code): operation.name for operation in pickletools.opcodes}
_MEMO = {"MEMOIZE", "BINPERSID"}
_NAMES = {"GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"}
# How the argument, or its length, is written.
_NUMBERS = {
    **{"BININT": "<i", "BININT1": "<B", "BININT2": "<H", "BINFLOAT": ">d"},
    **{"BINPUT": "<B", "LONG_BINPUT": "<I", "BINGET": "<B", "LONG_BINGET": "<I"},
    **{"PROTO": "<B", "FRAME": "<Q"},
}
_LENGTHS = {
    **{"SHORT_BINUNICODE": "<B", "BINUNICODE": "<I", "BINUNICODE8": "<Q", "LONG1": "<B"},
    **{"SHORT_BINBYTES": "<B", "BINBYTES": "<I", "BINBYTES8": "<Q"},
    **{"SHORT_BINSTRING": "<B", "BINSTRING": "<i"},
}


# --- what names stand for -----------------------------------------------------------------------


class PickledType(Built):
    """A number type of numpy."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype

    def build(self, state: object) -> None:
        """All that the state adds to the name of a number type is the order of its bytes."""
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|", b"<", b">", b"|"):
            raise RefusedPickle("damaged pickle (state of a number type)")
        # In place, for arrays and the memo hold this object already.
        self.dtype = self.dtype.newbyteorder(">" if order in (">", b">") else "<")


class PickledArray(Built):
    """An array of numbers; `values` is set once its contents were read, a view of the file."""

    values: NDArray[Any] | None = None

    def build(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise RefusedPickle("damaged pickle (state of an array)")
        _, shape, kind, column_major, raw = state
        if not isinstance(shape, tuple) or len(shape) > 8 or not isinstance(kind, PickledType):
            raise RefusedPickle("damaged pickle (state of an array)")
        sizes = tuple(as_integer(size) for size in shape)
        data = as_bytes(raw)
        expected = math.prod(sizes) * kind.dtype.itemsize
        if column_major is not False or min(sizes, default=0) < 0 or expected != len(data):
            raise RefusedPickle(
                f"array of shape {sizes} with {len(data)} bytes, in row order expected"
            )
        self.values = np.frombuffer(data, dtype=kind.dtype).reshape(sizes)


def number_makers(types: Mapping[str, str], expected: str, limits: Limits) -> dict[str, Maker]:
    """What stands for the names, "module attribute", that pickled arrays and bytes mention.

    Args:
        types: the number types that are accepted, numpy's names by the names in the file.
        expected: what to call them when another is met.
        limits: spent by what the makers copy.
    """

    def array(arguments: tuple[object, ...]) -> object:
        kind = arguments[0] if arguments else None
        if not isinstance(kind, Name) or kind.text != "numpy.ndarray":
            raise RefusedPickle("an array that is no numpy.ndarray; refused")
        return PickledArray()

    def number_type(arguments: tuple[object, ...]) -> object:
        code = arguments[0] if arguments else None
        text = str(code, "latin-1") if isinstance(code, bytes) else code
        if not isinstance(text, str) or text not in types:
            raise RefusedPickle(f"an array of another type than {expected}")
        return PickledType(np.dtype(types[text]))

    def scalar(arguments: tuple[object, ...]) -> object:
        match arguments:
            case (PickledType(dtype=dtype), raw) if len(as_bytes(raw)) == dtype.itemsize:
                return np.frombuffer(as_bytes(raw), dtype)[0].item()
        raise RefusedPickle("damaged pickle (a number)")

    def encode(arguments: tuple[object, ...]) -> object:
        match arguments:
            case (str() as text, "latin1"):
                limits.copy(len(text))
                return text.encode("latin-1")
        raise RefusedPickle("a text encoded otherwise than in latin1; refused")

    makers = {"numpy dtype": number_type, "numpy ndarray": not_called, "_codecs encode": encode}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        makers |= {f"{module} _reconstruct": array, f"{module} scalar": scalar}
    return makers


def not_called(_: tuple[object, ...]) -> object:
    """Stands for a name that may be mentioned only."""
    raise RefusedPickle("a call that is not plain data; refused")


# --- checks of values ---------------------------------------------------------------------------


def as_integer(value: object) -> int:
    if type(value) is not int:
        raise RefusedPickle(f"damaged pickle ({type(value).__name__} for a number)")
    return value


def as_text(value: object) -> str:
    if not isinstance(value, str):
        raise RefusedPickle(f"damaged pickle ({type(value).__name__} for a text)")
    return value


def as_bytes(value: object) -> bytes | memoryview:
    if not isinstance(value, bytes | memoryview):
        raise RefusedPickle(f"damaged pickle ({type(value).__name__} for bytes)")
    return value


def as_keys(values: list[object], what: str) -> list[str | bytes]:
    keys = [value for value in values if isinstance(value, str | bytes)]
    if len(keys) != len(values):
        raise RefusedPickle(f"{what} that are not text")
    return keys


def shorten(text: str) -> str:
    """A text from a file in quotes, on one line and of bounded length, for a message."""
    return ascii(text if len(text) <= 100 else text[:97] + "...")


def _line(error: Exception) -> str:
    """The first words of an error of a library; it may quote the file."""
    return ascii(str(error)[:100])[1:-1]
