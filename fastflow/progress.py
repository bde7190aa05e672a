"""How far a run has come: the only thing curricula, schedules and methods know of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from fastflow.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Progress:
    """A moment of training, taken before the optimizer step `step` (counted from 0).

    Attributes:
        step: optimizer steps finished.
        images: training images seen, `step * batch_size`.
        total_steps: steps the experiment runs.
        batch_size: global batch size.
        curriculum: values written by driver callbacks, e.g. `{"ratio": 0.5}`.
    """

    step: int
    images: int
    total_steps: int
    batch_size: int
    curriculum: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """A curriculum value. Raises ConfigError when no driver has provided it."""
        if name not in self.curriculum:
            raise ConfigError(
                f"curriculum value {name!r} was not provided; present: "
                f"{', '.join(sorted(self.curriculum)) or 'none'}. Add the driver callback that "
                f"provides it (CTScheduleCallback for consistency models)"
            )
        return self.curriculum[name]
