"""Running the demo's commands: shown, with a bar, their output in logs; what is finished is not done again."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunetv2_hiendmae.checks import Failed
from nnunetv2_hiendmae.files import LOCK, atomic_file
from pretraining.demo.recipe import Command, Step
from pretraining.processes import usable_cores

SETTINGS = "made_by_hiendmae_demo.json"
POLL_SECONDS = 0.3
KEPT = ("nnUNet_extTrainer",)
"""Of the user's own variables: it may be how nnU-Net finds our trainers."""
SIGNS = (
    (r"No space left|Disk quota", "the disk is full; free some space, or name another folder with -o"),
    (r"MemoryError|allocate memory|out of memory|signal SIGKILL", "the memory is full; close other programs"),
    (r"[Cc]ompiler|\bgcc\b|Triton", "a C compiler is missing; install one (Debian, Ubuntu: apt install g++)"),
)
"""What a log says, and what that means to a user."""


def environment(out: Path, loaders: int) -> dict[str, str]:
    """The user's environment with nnU-Net's folders in ``out``, and without settings of nnU-Net and of ours."""
    env = {k: v for k, v in os.environ.items() if k in KEPT or not k.startswith(("nnUNet_", "HIENDMAE_"))}
    for kind in ("raw", "preprocessed", "results"):
        env[f"nnUNet_{kind}"] = str(out / f"nnUNet_{kind}")
    # One loader at most beside each training, and no torch.compile, which takes minutes and a C compiler.
    own = {"nnUNet_n_proc_DA": str(loaders), "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
    return {**env, **own, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}


def own_folder(out: Path) -> None:
    """Make the demo's folder. ``ValueError`` if it holds something that the demo did not make."""
    if out.exists() and any(out.iterdir()) and not (out / SETTINGS).exists():
        raise ValueError(f"-o {out}: the folder holds other files; name a new one.")
    out.mkdir(parents=True, exist_ok=True)
    (out / SETTINGS).touch()


def keep_or_clear(out: Path, wanted: dict[str, Any]) -> None:
    """Keep what a demo with the same settings has finished; remove another's."""
    file, text = out / SETTINGS, json.dumps(wanted)
    before = file.read_text(encoding="utf-8")
    if before == text:
        print(f"{out} holds a demo with these settings: what is finished is kept.")
        return
    if before:
        print(f"{out} holds a demo with other settings (-device, -seed, version): starting anew.")
    clear(out, (name for name in os.listdir(out) if name not in (SETTINGS, LOCK)))
    file.write_text(text, encoding="utf-8")


def is_done(out: Path, name: str) -> bool:
    """Whether a step was finished."""
    return (out / "logs" / f"{name}.done").exists()


def clear(out: Path, globs: Iterable[str]) -> None:
    """Remove what an unfinished step, or another demo, left."""
    for path in (path for glob in globs for path in out.glob(glob)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / "logs").mkdir(exist_ok=True)


def mark_done(out: Path, name: str) -> None:
    with atomic_file(out / "logs" / f"{name}.done"):
        pass


def run_step(step: Step, out: Path, env: dict[str, str]) -> None:
    """Run the commands of a step at the same time, unless it is done. ``Failed`` if one fails: the others are ended."""
    print(f"\n{step.what}", *(f"$ {command.text}" for command in step.commands), sep="\n", flush=True)
    if is_done(out, step.name):
        print("  done before")
        return
    clear(out, step.makes)
    env = {**env, "OMP_NUM_THREADS": str(max(step.threads, usable_cores() // len(step.commands)))}
    logs = [out / "logs" / f"{step.name}_{i}.log" for i in range(len(step.commands))]
    started = time.monotonic()
    running = [start(command, log, env) for command, log in zip(step.commands, logs, strict=True)]
    try:
        wait(step, out, running, logs)
    finally:
        for process in running:
            end(process)
    mark_done(out, step.name)
    print(f"  {time.monotonic() - started:.0f} s; output in {', '.join(str(log) for log in logs)}", flush=True)


def start(command: Command, log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """The command of this environment, on the PATH or not."""
    words = shlex.split(command.text)
    beside = Path(sys.executable).parent / words[0]
    words[0] = str(beside) if beside.exists() else words[0]
    with open(log, "wb") as file:
        return subprocess.Popen(words, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a command and the processes that it started."""
    with suppress(ProcessLookupError):  # all have ended by themselves
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait(step: Step, out: Path, running: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
    """Show a bar until all have ended. ``Failed`` as soon as one failed."""
    total = sum(command.total for command in step.commands)
    shape = "  {percentage:3.0f}% |{bar:30}| {elapsed}, about {remaining} to go"
    with tqdm(total=total, bar_format=shape, disable=not sys.stderr.isatty(), leave=False) as bar:
        while True:
            codes = [process.poll() for process in running]
            for command, log, code in zip(step.commands, logs, codes, strict=True):
                if code:
                    raise Failed(reason(command, log, code))
            if None not in codes:
                return
            bar.n = min(total, sum(progress(command, out) for command in step.commands))
            bar.refresh()
            time.sleep(POLL_SECONDS)


def progress(command: Command, out: Path) -> int:
    """How far a command is, of its ``total``."""
    files = [file for file in out.glob(command.files) if not file.name.endswith("_seg.b2nd")]
    if command.line:
        found = sum(file.read_text(encoding="utf-8", errors="replace").count(command.line) for file in files)
    else:
        found = len(files)
    return min(found, command.total)


def reason(command: Command, log: Path, code: int) -> str:
    """One line on why a command failed: what its log means, or the log's last line."""
    text = log.read_text(encoding="utf-8", errors="replace") + ("\nsignal SIGKILL" if code == -9 else "")
    known = [remedy for sign, remedy in SIGNS if re.search(sign, text)]
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
    return f"{command.text.split()[0]} failed: {known[0] if known else last} (its output: {log})"
