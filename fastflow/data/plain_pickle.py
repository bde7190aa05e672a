"""Reads pickles as plain data: numbers, texts, bytes, lists, dicts and arrays of bytes.

Nothing in a file is ever imported or called (`fastflow.safe_pickle`). Enough for the batches of
CIFAR-10, in protocol 2 as published and as later Pythons write them.
"""

from __future__ import annotations

from fastflow.safe_pickle import Limits, PickledArray, RefusedPickle, number_makers, read_pickle

__all__ = ["ByteArray", "RefusedPickle", "read_plain_pickle"]

# No other arrays are accepted here.
ByteArray = PickledArray


def read_plain_pickle(data: bytes) -> object:
    """The value of a pickle of plain data.

    Texts of Python 2 come back as bytes, byte strings of more than 255 as views of `data`, arrays
    of uint8 as `ByteArray`.

    Raises:
        RefusedPickle: damaged, or not plain data; the text names what was met.
    """
    limits = Limits(copies=2 * len(data))
    makers = number_makers({"u1": "u1"}, "u1 (bytes)", limits)
    return read_pickle(
        memoryview(data), lambda module, name: makers.get(f"{module} {name}"), limits
    )[0]
