"""Limits that hold everywhere. An error writes ``field=value``; commands show the flag instead (``run_command``)."""

from __future__ import annotations

Size = tuple[int, int, int]
"""Voxels or tokens along the three axes of a volume, in nnU-Net's order (slices first)."""

MAX_COUNT = 2**31 - 1
"""Of steps, crops, processes and the like: more is a slip of the hand."""


class Failed(Exception):
    """What ends a command without being a mistake of the user, in one line."""

    exit_code = 1


def check_count(name: str, value: int, low: int = 1) -> None:
    """``ValueError`` unless ``value`` is an integer of ``low`` to ``MAX_COUNT``."""
    if type(value) is not int or not low <= value <= MAX_COUNT:
        raise ValueError(f"{name}={value!r} must be an integer of at least {low} and at most {MAX_COUNT}.")
