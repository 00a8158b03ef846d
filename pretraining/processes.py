"""Processes that do not outlive the one that started them, even if that is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor


def process_pool(processes: int) -> ProcessPoolExecutor:
    """A pool of fresh interpreters: a forked one would share locks with this process' threads."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=context, initializer=begin_worker)


def begin_worker() -> None:
    """A terminal's Ctrl-C reaches the workers too; they finish the case at hand, and the first process stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_the_parent()


def end_with_the_parent() -> None:
    """End this process as soon as the one that started it is gone.

    A worker waits for tasks on a pipe of which it holds both ends, so it would otherwise wait for ever.
    """
    when_the_parent_ends(lambda: os._exit(1))


def when_the_parent_ends(action: Callable[[], None]) -> None:
    """Call ``action`` in a thread of this process once its parent is gone, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        action()

    threading.Thread(target=watch, daemon=True).start()
