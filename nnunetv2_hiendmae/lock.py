"""One process at a time in a run's folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"


@contextmanager
def alone_in(folder: Path, mend: str) -> Iterator[None]:
    """Keep other processes out of a run's folder. ``ValueError`` with the mend if one is in it."""
    lock = FileLock(folder / LOCK, timeout=0)  # given back by the system, however the process ends
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"Another process is at work in {folder}. {mend}") from None
    except NotImplementedError:  # a file system without locks must not keep anybody from training
        print(f"WARNING: {folder} cannot be locked; do not start the same run twice.")
    try:
        yield
    finally:
        lock.release()
