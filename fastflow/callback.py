"""Callbacks: drivers may change training, observers must not."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from fastflow.state import TrainState


class Callback:
    """Base of both kinds. Public methods of a callback are hooks and nothing else: a name that is
    no hook raises TypeError when the class is created, so a misspelt hook cannot go unnoticed.
    Helpers start with an underscore.
    """

    hooks: ClassVar[frozenset[str]] = frozenset(
        {"setup", "on_start", "on_end", "state_dict", "load_state_dict"}
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            public = callable(function) and not name.startswith("_") and not isinstance(value, type)
            if public and name not in cls.hooks:
                near = difflib.get_close_matches(name, cls.hooks, n=1, cutoff=0.0)[0]
                raise TypeError(
                    f"{cls.__name__}.{name} is not a hook of {cls.__mro__[1].__name__}: did you "
                    f"mean {near!r}? hooks: {', '.join(sorted(cls.hooks))}. A helper's name "
                    f"starts with an underscore."
                )

    def setup(self, state: TrainState) -> None:
        """Once, after the networks are built and before a checkpoint is loaded."""

    def on_start(self, state: TrainState) -> None:
        """Once, after resuming, before the first step."""

    def on_end(self, state: TrainState) -> None:
        """Once, when the last step is done or the run was asked to stop; not after an error.

        Drivers come first, then the last checkpoint is written, then observers follow.
        """

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, as JSON values; it rides in every checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class Driver(Callback):
    """A callback that takes part in training: curriculum, clipping, EMA.

    Attributes:
        provides: names of the curriculum values it writes in `before_step`.
    """

    hooks = Callback.hooks | {"before_step", "before_update", "after_update", "before_save"}

    @property
    def provides(self) -> frozenset[str]:
        return frozenset()

    def before_step(self, state: TrainState) -> None:
        """Before the batch is drawn: write `state.curriculum`."""

    def before_update(self, state: TrainState) -> None:
        """Gradients of the global batch are complete and unscaled; the optimizer has not run."""

    def after_update(self, state: TrainState) -> None:
        """The optimizer has run and `state.step` counts the step: update EMAs."""

    def before_save(self, state: TrainState) -> None:
        """A checkpoint of this moment is about to be written: raise if it must not be."""


class Observer(Callback):
    """A callback that only looks. Removing it never changes the weights by one bit: it draws from
    its own generators and leaves networks, optimizer, gradients and curriculum alone.
    """

    hooks = Callback.hooks | {"after_step"}

    def after_step(self, state: TrainState) -> None:
        """After everything of a step, `state.step` steps being done; `state.metrics` holds it."""
