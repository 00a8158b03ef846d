"""What all commands have in common: help that starts with examples, mistakes told in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

MAX_COUNT = 2**31 - 1
"""Of steps, crops, processes and the like: more is a slip of the hand."""


def check_count(name: str, value: int, low: int = 1) -> None:
    """``ValueError`` unless ``value`` is ``low`` to ``MAX_COUNT``."""
    if not low <= value <= MAX_COUNT:
        raise ValueError(f"{name} {value} must be at least {low} and at most {MAX_COUNT}.")


class CommandParser(argparse.ArgumentParser):
    """Argument parser whose help begins with ``examples``; a mistake is one line on stderr and exit code 2."""

    def __init__(self, *, examples: str = "", **settings: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)  # type: ignore[arg-type]
        self.examples = examples

    def format_help(self) -> str:
        return f"{self.examples}\n{super().format_help()}" if self.examples else super().format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} -h)\n")
