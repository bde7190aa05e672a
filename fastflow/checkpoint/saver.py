"""Saving beside training: the state is copied, and a thread writes the copy while steps go on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastflow.callback import Callback
from fastflow.checkpoint import engine, files
from fastflow.checkpoint.contents import meta_of, tensors_of
from fastflow.checkpoint.files import Keep
from fastflow.errors import CheckpointError, LostProcessError, warn
from fastflow.peers import of_peers
from fastflow.state import TrainState


class Saver:
    """Writes the checkpoints of a run, one at a time, in a thread of its own.

    With several processes, those threads talk over the group beside training's. Leaving its
    `with` block waits for the checkpoint that is being written, also after an error.

    Args:
        state: the run.
        callbacks: whose state goes into every checkpoint.
        scaler: the same.
    """

    def __init__(
        self, state: TrainState, callbacks: Sequence[Callback], scaler: torch.amp.GradScaler
    ) -> None:
        self._state = state
        self._callbacks = callbacks
        self._scaler = scaler
        self._world = state.world.beside
        self._root = state.run_dir / files.FOLDER
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step = 0

    def save(self, keep: Keep | None = None) -> None:
        """Begin to write a checkpoint of this moment; every process must call it.

        It is complete when `wait` has returned. A second one of the same step changes nothing.

        Args:
            keep: which older ones stay once it is complete; None leaves all.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        step = self._state.step
        assert step > 0, "before the first step there is nothing to save"
        if step == self._step:
            return
        self._step = step
        tensors = tensors_of(self._state)
        meta = meta_of(self._state, tensors, self._callbacks, self._scaler)
        copies = tree_map_only(Tensor, _copied, tensors)
        # A daemon, so that a process that is told to abort does not stay for it.
        self._thread = threading.Thread(
            target=self._run, args=(copies, meta, keep), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            CheckpointError: it could not be written; earlier ones are as they were.
            LostProcessError: another process died or did not answer meanwhile.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise, as far as is known by now."""
        return self._error is not None

    def last(self) -> Path | None:
        """The last complete checkpoint, once none is being written; None if there is none."""
        if self._thread is not None:
            self._thread.join()
        return files.latest(self._state.run_dir)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except (CheckpointError, LostProcessError) as late:
            if error is None:
                raise
            if error is not late:
                warn(str(late))

    def _run(self, tensors: dict[str, Any], meta: dict[str, Any], keep: Keep | None) -> None:
        try:
            try:
                self._write(tensors, meta, keep)
            except engine.FAILURES as error:
                raise self._explained(error, meta["step"]) from error
        except BaseException as error:  # whatever it is: `wait` raises it in training
            self._error = error

    def _write(self, tensors: dict[str, Any], meta: dict[str, Any], keep: Keep | None) -> None:
        world, root = self._world, self._root
        partial = world.on_main(lambda: files.begin(root, meta["step"]))
        own = engine.write(tensors, partial, world)
        found = world.on_all(lambda: {path.name: files.digest_of(path) for path in own})
        digests = {name: digest for some in found for name, digest in some.items()}

        def finish() -> None:
            last = files.finish(partial, meta, digests)
            if keep is not None:
                files.prune(last, keep)

        world.on_main(finish)

    def _explained(self, error: Exception, step: int) -> Exception:
        if self._world.is_main:
            files.abandon(self._root)
        what = f"the checkpoint at step {step} was not written to {self._root}"
        last = f"the last good one is {files.latest(self._state.run_dir) or 'none'}"
        if of_peers(error):
            return LostProcessError(f"{what}: another process died or does not answer; {last}")
        return CheckpointError(f"{what}: {engine.reason(error)}; {last}")


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
