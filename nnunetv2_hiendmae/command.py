"""The one way to run a command: help that starts with examples, exit codes, and what went wrong in one line."""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from nnunetv2_hiendmae.checks import Failed


class CommandParser(argparse.ArgumentParser):
    """Argument parser whose help begins with ``examples``; a mistake is one line on stderr and exit code 2."""

    def __init__(self, *, examples: str = "", **settings: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)  # type: ignore[arg-type]
        self.examples = examples

    def format_help(self) -> str:
        return f"{self.examples}\n{super().format_help()}" if self.examples else super().format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} -h)\n")


def run_command(
    parser: CommandParser, work: Callable[[argparse.Namespace], int | None], again: str = "nothing was kept"
) -> NoReturn:
    """Parse the flags, work, and exit.

    Exit codes: 0, or what ``work`` returns; 1 for what went wrong on the way; 2 for a user's mistake; 130 for Ctrl-C.

    Args:
        parser: of the command's flags.
        work: what the command does. ``ValueError`` stands for a user's mistake, ``OSError`` and ``Failed`` for what
            else can go wrong.
        again: what became of the work done so far, and how to go on.
    """
    args = parser.parse_args()
    try:
        code = work(args) or 0
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        code, line = verdict(error, again)
        parser.exit(code, f"{parser.prog}: {with_flags(line, parser)}\n")
    sys.exit(code)


def verdict(error: BaseException, again: str) -> tuple[int, str]:
    """Exit code and line for what ended a command. A fault of the program itself prints its traceback first."""
    if was_interrupted(error):
        return 130, f"interrupted; {again}"
    text = one_line(error)
    if full := full_memory(error):
        return 1, f"error: the memory of {full} is full; use less at a time (see the flags, -h)"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return 1, f"error: --compile: torch cannot compile the model here ({text.split(' Set TORCH')[0]}); leave it out"
    if isinstance(error, ValueError):
        # What a loader process met is in the data, not in a flag.
        return (1 if "in DataLoader worker" in str(error) else 2), f"error: {text}"
    if isinstance(error, (ConnectionError, EOFError)):
        return 1, f"error: a process was lost; {again}"
    if isinstance(error, Failed):
        return error.exit_code, f"error: {text.rstrip('.')}; {again}"
    if isinstance(error, (OSError, RuntimeError, FloatingPointError)):
        return 1, f"error: {text.rstrip('.')}; {again}"
    traceback.print_exception(error)
    return 1, f"error: this should not have happened; {again}"


def full_memory(error: BaseException) -> str | None:
    """Whose memory an error says is full: that of ``the GPU`` or of ``this machine``; None if it says nothing of it."""
    if type(error).__name__ == "OutOfMemoryError" or re.search("(CUDA|MPS).*out of memory", str(error)):
        return "the GPU"
    return "this machine" if isinstance(error, MemoryError) or "allocate memory" in str(error) else None


def was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C came first: what is raised while a program stops, of a pool half begun say, only follows it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def one_line(error: BaseException) -> str:
    """A message as one line, without the traceback that torch puts around what a loader process met."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "Original Traceback" in str(error):
        return re.sub(r"^\w+Error: ", "", lines[-1])
    return " ".join(" ".join(lines).split())


def with_flags(line: str, parser: argparse.ArgumentParser) -> str:
    """The line with ``-flag value`` for every ``field=value`` that a flag of the command sets."""
    verbs = [p for a in parser._actions if isinstance(a, argparse._SubParsersAction) for p in a.choices.values()]
    flags = {a.dest: a.option_strings[0] for p in (parser, *verbs) for a in p._actions if a.option_strings}
    return re.sub(r"(?<![\w.-])(\w+)=", lambda m: f"{flags[m[1]]} " if m[1] in flags else m[0], line)
