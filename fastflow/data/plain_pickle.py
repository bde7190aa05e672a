"""Reads pickles as plain data: numbers, texts, bytes, lists, dicts and arrays of bytes.

`pickle.load` runs whatever a file names. Here the few operations that plain data need are
interpreted one by one and every other is refused, so nothing in a file is ever imported or called.
Enough for the batches of CIFAR-10, in protocol 2 as published and as later Pythons write them.
"""

from __future__ import annotations

import math
import pickletools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# The names that a pickled array of bytes mentions; all they stand for here is written below.
_RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_NDARRAY = "numpy ndarray"
_DTYPE = "numpy dtype"
_ENCODE = "_codecs encode"
_ACCEPTED = (*_RECONSTRUCT, _NDARRAY, _DTYPE, _ENCODE)


class RefusedPickle(ValueError):
    """The file is damaged, or it holds something other than plain data."""


@dataclass
class ByteArray:
    """A pickled array of dtype uint8; `values` is set once its contents were read."""

    values: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class _Name:
    """A module and an attribute that the file mentions; never looked up."""

    text: str


@dataclass(frozen=True)
class _ByteType:
    """The dtype uint8."""


def read_plain_pickle(data: bytes) -> object:
    """The value of a pickle of plain data.

    Texts of Python 2 come back as bytes, arrays as `ByteArray`.

    Raises:
        RefusedPickle: damaged, or not plain data; the text names what was met.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.pop()
            machine.run(opcode.name, argument)
    except RefusedPickle:
        raise
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise RefusedPickle(f"damaged pickle ({error})") from None
    raise RefusedPickle("damaged pickle (no end)")


class _Machine:
    """The stack machine that a pickle is a program for, without its dangerous half."""

    def __init__(self) -> None:
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def run(self, name: str, argument: object) -> None:
        match name:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                self.stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                self.stack.append(name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2":
                self.stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINBYTES" | "SHORT_BINBYTES":
                self.stack.append(argument)
            case "BINSTRING" | "SHORT_BINSTRING":
                self.stack.append(str(argument).encode("latin-1"))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                key = len(self.memo) if name == "MEMOIZE" else argument
                self.memo[_integer(key)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[_integer(argument)])
            case "GLOBAL":
                self.stack.append(_name(str(argument)))
            case "STACK_GLOBAL":
                attribute, module = _string(self.pop()), _string(self.pop())
                self.stack.append(_name(f"{module} {attribute}"))
            case "REDUCE":
                arguments, function = self.pop(), self.pop()
                self.stack.append(_reduce(function, arguments))
            case "BUILD":
                state = self.pop()
                _build(self.stack[-1], state)
            case _:
                self._collect(name)

    def _collect(self, name: str) -> None:
        """The operations that make and fill tuples, lists and dicts."""
        match name:
            case "MARK":
                self.marks.append(len(self.stack))
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_DICT":
                self.stack.append({})
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
            case "SETITEM" | "SETITEMS":
                start = self.marks.pop() if name == "SETITEMS" else len(self.stack) - 2
                values, target = self._take(start), self.stack[-1]
                if not isinstance(target, dict):
                    raise RefusedPickle("damaged pickle (items set in what is no dict)")
                keys = values[::2]
                if not all(isinstance(key, str | bytes) for key in keys):
                    raise RefusedPickle("dict keys that are not text")
                target.update(zip(keys, values[1::2], strict=True))
            case _:
                raise RefusedPickle(f"operation {name} is not plain data; refused")

    def pop(self) -> object:
        return self.stack.pop()

    def _take(self, start: int) -> list[object]:
        """Remove and return the stack from `start` on."""
        if not 0 <= start <= len(self.stack):
            raise RefusedPickle("damaged pickle (empty stack)")
        values = self.stack[start:]
        del self.stack[start:]
        return values


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise RefusedPickle(f"damaged pickle ({type(value).__name__} for a number)")
    return value


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise RefusedPickle(f"damaged pickle ({type(value).__name__} for a text)")
    return value


def _name(text: str) -> _Name:
    if text not in _ACCEPTED:
        shown = text[:100].replace(" ", ".")
        raise RefusedPickle(f"it asks to load {shown!r}, which is not plain data; refused")
    return _Name(text)


def _reduce(function: object, arguments: object) -> object:
    """The result of the few calls that plain data mention, computed here."""
    if isinstance(function, _Name) and isinstance(arguments, tuple):
        called = function.text
        if called in _RECONSTRUCT and arguments[:1] == (_Name(_NDARRAY),):
            return ByteArray()
        if called == _DTYPE and arguments:
            if arguments[0] not in ("u1", b"u1"):
                raise RefusedPickle("an array of another type than u1 (bytes)")
            return _ByteType()
        if called == _ENCODE and len(arguments) == 2 and arguments[1] == "latin1":
            return _string(arguments[0]).encode("latin-1")
    raise RefusedPickle("a call that is not plain data; refused")


def _build(target: object, state: object) -> None:
    """Give an array its contents; the state of a byte type says nothing new."""
    if isinstance(target, _ByteType) and isinstance(state, tuple):
        return
    if not isinstance(target, ByteArray) or not isinstance(state, tuple) or len(state) != 5:
        raise RefusedPickle("a state set on what is no array; refused")
    _, shape, dtype, column_major, raw = state
    if not isinstance(shape, tuple) or not isinstance(raw, bytes) or dtype != _ByteType():
        raise RefusedPickle("damaged pickle (state of an array)")
    sizes = tuple(_integer(size) for size in shape)
    if column_major is not False or min(sizes, default=0) < 0 or math.prod(sizes) != len(raw):
        raise RefusedPickle(f"array of shape {sizes} with {len(raw)} bytes, in row order expected")
    target.values = np.frombuffer(raw, dtype=np.uint8).reshape(sizes)
