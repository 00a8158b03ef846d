"""Command-line entry points of this package."""

from __future__ import annotations

import argparse
from typing import NoReturn


def plan_entry() -> NoReturn:
    raise SystemExit(argparse.ArgumentParser().format_help())
