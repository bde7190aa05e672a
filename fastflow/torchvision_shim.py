"""Imports packages that need torchvision where its compiled operators do not fit this torch.

A torchvision built for CUDA cannot load its operators beside a CPU build of torch, and then its
import fails with "operator torchvision::nms does not exist". Feature extractors need none of
these operators, so declaring them, without an implementation, is enough.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

from fastflow.errors import MissingPackageError

_declared: list[torch.library.Library] = []  # a declaration lives as long as its Library


def import_beside_torchvision(name: str, purpose: str, extra: str) -> ModuleType:
    """Import the module `name`; declare torchvision's operators if its import fails without.

    Args:
        name: a dotted module name.
        purpose: what needs it, for the error message.
        extra: the extra of fastflow that installs it.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or name, purpose, extra) from None
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    _forget("torchvision", name.partition(".")[0])
    _declare()
    return importlib.import_module(name)


def _forget(*packages: str) -> None:
    """Drop half-imported modules."""
    for module in list(sys.modules):
        if module.partition(".")[0] in packages:
            del sys.modules[module]


def _declare() -> None:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define(
        "qnms(Tensor dets, Tensor scores, float iou_threshold, float dets_scale, "
        "int dets_zero_point) -> Tensor"
    )
    _declared.append(library)
