"""Processes that do not outlive the one that started them, even if that is killed."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use: a scheduler's affinity or a container's quota can leave fewer than there are."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, cgroup_quota())))


def cgroup_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """CPU quota in cores of this process' control groups and of those around them; infinite where there is none."""
    quotas = [math.inf]
    with suppress(OSError):  # not Linux
        for line in own.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):  # version 1 has a tree for each controller
                continue
            top = root / "cpu" if controllers else root
            folder = top / group.lstrip("/")
            for place in (folder, *(p for p in folder.parents if p.is_relative_to(top))):
                quotas.append(quota_of(place))
    return min(quotas)


def quota_of(folder: Path) -> float:
    """Cores that one control group may use."""
    with suppress(OSError, ValueError):  # no such file; "max"
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    return math.inf


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
