"""Reader of the stored reference numbers in tests/reference (format: README.md there)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parent / "reference"


class Reference:
    """One case: its configuration, stored tensors and the tolerance of each."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.info: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
        self.config: dict[str, Any] = self.info["config"]
        self.values: dict[str, Any] = self.info["values"]
        self._tensors: dict[str, Tensor] = {}
        path = FOLDER / f"{name}.safetensors"
        if path.exists():
            with safe_open(path, framework="pt") as file:
                self._tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def keys(self, prefix: str = "") -> list[str]:
        return [k for k in self._tensors if k.startswith(prefix)]

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def __getitem__(self, key: str) -> Tensor:
        """The stored tensor; weights, kept as exact float16, come back as float32."""
        value = self._tensors[key].clone()
        return value.float() if value.dtype == torch.float16 else value

    def weights(self, prefix: str = "net.") -> dict[str, Tensor]:
        """The state dict stored behind `prefix`, in float32."""
        names = self.info["weights"]["names"]
        return {k.removeprefix(prefix): self[k] for k in names if k.startswith(prefix)}

    def check(self, key: str, actual: Tensor) -> None:
        """Assert |actual - stored| <= atol + rtol |stored| at the tolerance stored with `key`."""
        expected = self._tensors[key]
        tolerance = self.info["tensors"][key].get("tolerance", self.info["default_tolerance"])
        torch.testing.assert_close(
            actual.detach().to(torch.float64),
            expected.to(torch.float64),
            rtol=tolerance["rtol"],
            atol=tolerance["atol"],
            msg=lambda text: f"{self.name}:{key}: {text}",
        )


@functools.cache
def reference(name: str) -> Reference:
    return Reference(name)
