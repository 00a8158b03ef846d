"""Commands of this environment as processes that can be signalled, killed and watched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import DATASET, World

RUNS = Path("results") / DATASET / "HiEndMAE__nnUNetPlans__3d_fullres"
SMALL = "-preset tiny -device cpu -crop_size 24 24 24 -num_workers 1 -preview_epochs 0 -checkpoint_minutes 0"
ENDLESS = f"hiendmae_pretrain -d 901 {SMALL} -steps 100000 -batch_size 2 -val_every 5"
STARTED: list[subprocess.Popen[str]] = []


class Numbers:
    """A stream whose crop i is full of i, modulo 251."""

    stored = (1, 8, 8, 8), np.dtype(np.uint8)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.full((1, 8, 8, 8), index % 251, dtype=torch.uint8), "jitter": (1.0, 0.0), "case": index}


def start(world: World, command: str, **env: str) -> subprocess.Popen[str]:
    """Start a command as the leader of its own process group; ``end_all`` ends it if the test does not."""
    words = command.split()
    words[0] = str(Path(sys.executable).with_name(words[0]))
    process = subprocess.Popen(
        words, env={**world.env, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        start_new_session=True,
    )  # fmt: skip
    STARTED.append(process)
    return process


def end_all() -> None:
    """Kill what a failed test left behind."""
    while STARTED:
        process = STARTED.pop()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process: subprocess.Popen[str], beginning: str) -> None:
    """Read output until a line begins so."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"the process ended before it wrote '{beginning}'")


def descendants(pid: int, pattern: str = "") -> list[int]:
    """Processes below one, whose command line matches."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, encoding="utf-8", check=False).stdout.split()
    below = [int(child) for child in found]
    commands = {child: Path(f"/proc/{child}/cmdline").read_bytes().decode() for child in below}
    return [c for c in below if pattern in commands[c]] + [d for c in below for d in descendants(c, pattern)]


def ended(command: str, world: World, code: int, limit: Callable[[], None] | None = None, **env: str) -> str:
    """Run a command that must end with ``code`` and without a traceback; returns its output."""
    words = command.split()
    words[0] = str(Path(sys.executable).with_name(words[0]))
    done = subprocess.run(
        words, env={**world.env, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        check=False, preexec_fn=limit,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    return done.stdout
