"""Run what is not finished: start, continue or validate each run with a plain nnU-Net command, and record it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.architectures.encoder import EncoderConfig
from nnunetv2_hiendmae.benchmark.arms import (
    PRETRAINED_SHA256,
    configuration_of,
    fold_folder,
    plans_file,
    train_command,
)
from nnunetv2_hiendmae.benchmark.grid import Grid, Run
from nnunetv2_hiendmae.benchmark.record import (
    FINAL,
    RECORD_FILE,
    SUMMARY,
    RunRecord,
    file_sha256,
    measure,
    read_record,
    versions,
    write_record,
)
from nnunetv2_hiendmae.benchmark.splits import SPLITS_FILE, split_index, split_sha256
from nnunetv2_hiendmae.files import AtWorkError, alone_in, preprocessed_folder, read_json
from nnunetv2_hiendmae.nnunet.settings import BLOCK, FineTuneSettings

CHECKPOINTS = ("checkpoint_latest.pth", "checkpoint_best.pth")  # of a training that was interrupted


def state_of(folder: Path) -> str:
    """``finished``, ``validate`` (trained, not evaluated), ``continue`` (has a checkpoint) or ``new``.

    A recorded run whose checkpoints were removed to save space is finished as long as it has its summary.
    """
    evaluated = (folder / SUMMARY).is_file()
    if (folder / FINAL).is_file():
        return "finished" if evaluated else "validate"
    if any((folder / name).is_file() for name in CHECKPOINTS):
        return "continue"
    return "finished" if evaluated and (folder / RECORD_FILE).is_file() else "new"


def expected_record(grid: Grid, run: Run) -> RunRecord:
    """The record of a run that starts now."""
    folder = preprocessed_folder(run.dataset)
    split = read_json(folder / SPLITS_FILE)[split_index(folder, run.fold, run.labels, run.seed)]
    return RunRecord(
        command=shlex.join(train_command(grid, run)),
        plans_sha256=file_sha256(plans_file(grid, run)),
        split_sha256=split_sha256(split),
        versions=versions(),
    )


def trained_otherwise(grid: Grid, run: Run) -> str | None:
    """Why a run without a record is not the one the grid asks for, by the plans that nnU-Net saved; None if it is.

    The trainer fills in what the plans' ``hiendmae`` block leaves open, so the saved block may hold more.
    """
    files = fold_folder(grid, run).parent / "plans.json", plans_file(grid, run)
    saved, wanted = (configuration_of(file, run.configuration) for file in files)
    rest = [{k: v for k, v in configuration.items() if k != BLOCK} for configuration in (saved, wanted)]
    weights = [read_json(file).get(PRETRAINED_SHA256) for file in files]
    blocks = [configuration.get(BLOCK, {}) for configuration in (saved, wanted)]
    given = [{**{k: b.get(k) for k in blocks[1]}, "architecture": encoder_of(b, blocks[1])} for b in blocks]
    if rest[0] == rest[1] and weights[0] == weights[1] and given[0] == given[1]:
        return None
    return "it was made with other plans than the grid has now"


def encoder_of(block: dict[str, Any], wanted: dict[str, Any]) -> EncoderConfig | None:
    """The encoder that a block asks for by name or numbers; None if the wanted one leaves it open.

    Its channels follow the data, and tokens that are wanted are those of the block, whatever its preset has.
    """
    encoder = FineTuneSettings(architecture=block.get("architecture")).encoder if "architecture" in wanted else None
    tokens = wanted.get("vit_patch_size")
    return encoder and replace(encoder, in_channels=1, patch_size=tuple(tokens or encoder.patch_size))


def stale(record: RunRecord, expected: RunRecord) -> str | None:
    """Why a recorded run is not the one the grid asks for now; None if it is."""
    for name, words in (("plans_sha256", "plans"), ("split_sha256", "training or validation cases")):
        if getattr(record, name) != getattr(expected, name):
            return f"it was made with other {words} than the grid has now"
    return None


def perform(grid: Grid, run: Run, logs: Path) -> None:
    """Bring one run to its end; nothing is done for a finished and recorded one.

    Raises:
        RuntimeError: the command failed or left no summary; names the log and its last lines.
        ValueError: the run folder holds another run than the grid asks for.
        AtWorkError: another process is at work in it.
    """
    folder = fold_folder(grid, run)
    record = read_record(folder)
    if (
        record
        and record.summary_sha256
        and state_of(folder) == "finished"
        and not stale(record, expected_record(grid, run))
    ):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder, "It is left to that one."):
        perform_alone(grid, run, folder, logs)


def perform_alone(grid: Grid, run: Run, folder: Path, logs: Path) -> None:
    """``perform`` in a folder that no other process touches."""
    expected, record, state = expected_record(grid, run), read_record(folder), state_of(folder)
    if record is None and state != "new":  # begun by a plain command, with versions that nobody noted
        reason, expected = trained_otherwise(grid, run), replace(expected, versions={})
    else:
        reason = stale(record, expected) if record else None
    if reason:
        raise ValueError(f"{folder}: {reason}. Remove the folder, or give the grid another name.")
    if state == "finished" and record and record.summary_sha256:
        return
    memory: dict[str, float | None] = {}
    if state == "new":
        check_pretrained(grid, run)
    if state != "finished":
        write_record(folder, record or expected)
        command = train_command(grid, run)
        if state != "new" and "-pretrained_weights" in command:  # the checkpoint has them; nnU-Net refuses both
            command = command[: command.index("-pretrained_weights")]
        command += {"new": [], "continue": ["--c"], "validate": ["--val"]}[state]
        memory = watch(command, logs / f"{run.name.replace('/', '_').replace(' ', '_')}.log")
        if state_of(folder) != "finished":
            raise RuntimeError(f"'{shlex.join(command)}' ended without {folder / SUMMARY}.")
    write_record(folder, replace(record or expected, **measure(folder), **larger(record, memory)))


def check_pretrained(grid: Grid, run: Run) -> None:
    """``ValueError`` if the file of ``-pretrained_weights`` is no longer the one that was planned."""
    planned = read_json(plans_file(grid, run)).get(PRETRAINED_SHA256)
    if planned is not None and file_sha256(Path(str(run.arm.weights))) != planned:
        raise ValueError(f"{run.arm.weights} is not the file that was planned (sha256 {planned}). Plan again.")


def larger(record: RunRecord | None, memory: dict[str, float | None]) -> dict[str, Any]:
    """The peaks of a run over its interruptions."""
    before = {name: getattr(record, name, None) for name in ("peak_memory_mb", "peak_gpu_memory_mb")}
    return {name: max((v for v in (old, memory.get(name)) if v), default=None) for name, old in before.items()}


def watch(command: list[str], log: Path) -> dict[str, float | None]:
    """Run a command of this environment, its output appended to a log; returns its peak memory.

    Raises:
        RuntimeError: it failed; with the end of the log.
    """
    print(f"$ {shlex.join(command)}", flush=True)
    beside = Path(sys.executable).with_name(command[0])  # on the PATH or not
    words = [str(beside) if beside.exists() else command[0], *command[1:]]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        done = threading.Event()
        gpu: list[float] = []
        sampler = threading.Thread(target=sample_gpu, args=(gpu, done), daemon=True)
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGTERM)  # with its loader processes
            process.wait()
            raise
        finally:
            done.set()
            sampler.join()
    process.returncode = code = os.waitstatus_to_exitcode(status)
    if code:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"'{shlex.join(command)}' ended with exit code {code}. The end of {log}:\n{end}")
    kilobytes = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return {"peak_memory_mb": round(kilobytes / 1024), "peak_gpu_memory_mb": max(gpu, default=None)}


def sample_gpu(samples: list[float], done: threading.Event) -> None:
    """Append the memory in use on the first visible GPU, in MB, every second; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    query = ["nvidia-smi", "-i", gpu, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    while not done.wait(1):
        try:
            answer = subprocess.run(query, capture_output=True, encoding="utf-8", check=False, timeout=10)
        except subprocess.TimeoutExpired:
            continue
        if answer.returncode or not answer.stdout.strip().isdigit():
            return
        samples.append(float(answer.stdout))


@contextmanager
def ends_as_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP as KeyboardInterrupt: no training goes on without the process that records it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler == signal.SIG_DFL:  # nohup ignores the second
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_part(grid: Grid, part_id: int, num_parts: int, logs: Path) -> list[str]:
    """Perform every ``num_parts``-th run, from ``part_id`` on; returns one line for each that failed.

    A failed run does not keep the others from being made. One that another process is at work in is left to it, so
    that several processes share the runs without parts.
    """
    failures = []
    mine: list[Any] = grid.runs()[part_id::num_parts]
    for number, run in enumerate(mine, 1):
        print(f"[{number}/{len(mine)}] {run.name}: {state_of(fold_folder(grid, run))}", flush=True)
        try:
            perform(grid, run, logs)
        except AtWorkError as error:
            print(error, flush=True)
        except Exception as error:  # whatever is wrong in one folder must not keep the other runs from being made
            words = str(error) if isinstance(error, (RuntimeError, ValueError)) else repr(error)
            print(f"FAILED {run.name}: {words}", file=sys.stderr, flush=True)
            failures.append(f"{run.name}: {words.splitlines()[0]}")
    return failures
