"""The run's latest checkpoint, written beside training."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from pretraining.checkpoint import save_latest


class Saver:
    """Copies the state and writes the copy in a thread. What goes wrong there is raised at the next look.

    While open; at the end it waits for what is being written.
    """

    def __init__(self, folder: Path, minutes: float, keep: int) -> None:
        self.folder, self.minutes, self.keep = folder, minutes, keep
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None
        self.started = time.monotonic()
        self.step = 0
        """Of the newest checkpoint, written or being written."""

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.thread.shutdown()

    def due(self) -> bool:
        """Whether it is time for the next one.

        Raises:
            OSError, FloatingPointError: the last one could not be written, or was not finite.
        """
        if self.writing is not None:
            if not self.writing.done():
                return False
            self.wait()
        return time.monotonic() - self.started >= 60 * self.minutes

    def save(self, state: dict[str, Any]) -> None:
        """Begin to write a state, unless the one of that step is on its way. Raises what ``due`` does."""
        self.wait()
        if state["step"] == self.step:
            return
        self.started, self.step = time.monotonic(), state["step"]
        self.writing = self.thread.submit(save_latest, self.folder, copied(state), self.keep)

    def wait(self) -> None:
        """Until nothing is being written. Raises what ``due`` does."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()


def copied(value: Any) -> Any:
    """Plain data with its tensors copied to the CPU: training goes on with the others."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return [copied(v) for v in value] if isinstance(value, (list, tuple)) else value
