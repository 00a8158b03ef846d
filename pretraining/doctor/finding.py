"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass

LEVELS = {"ok": "\033[32m", "warning": "\033[33m", "problem": "\033[31m"}
"""And their colours on a terminal."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    level: str
    """ok, warning (works, but read this), or problem (a command will fail)."""
    what: str
    remedy: str = ""
    """The command or step that fixes it; empty if nothing is to be done."""

    def text(self, colours: bool) -> str:
        """One line, and below it the remedy."""
        label = f"{LEVELS[self.level]}{self.level:<8}\033[0m" if colours else f"{self.level:<8}"
        return f"{label} {self.what}" + (f"\n         → {self.remedy}" if self.remedy else "")
