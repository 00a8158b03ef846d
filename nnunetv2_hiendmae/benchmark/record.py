"""``hiendmae_run.json`` in a fold's folder: how the run was made, what it cost, and the hash of its summary."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from nnunetv2_hiendmae import __version__
from nnunetv2_hiendmae.benchmark.splits import write_json
from nnunetv2_hiendmae.files import read_json

RECORD_FILE = "hiendmae_run.json"
SUMMARY = Path("validation") / "summary.json"
FINAL = "checkpoint_final.pth"
LOG_TIME = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+): (.*)$")
# nnU-Net's log in a checkpoint holds numpy's numbers; nothing else but plain data is let in.
NUMPY_NUMBERS: list[Any] = [np.float64(0).__reduce__()[0], np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Written when a run starts, and again when it has finished."""

    command: str
    plans_sha256: str
    """Of the plans file in the preprocessed folder."""
    split_sha256: str
    """Of the training and validation cases."""
    versions: dict[str, str]
    """Of the software; empty for a run that was begun by a plain command."""
    summary_sha256: str | None = None
    """None until the run has finished."""
    parameters: int | None = None
    """Numbers in the checkpoint's network, shared ones counted once."""
    seconds_per_iteration: float | None = None
    """Median epoch over its training iterations; nnU-Net's validation iterations included."""
    seconds_per_volume: float | None = None
    """Final validation over its cases: prediction, export and evaluation."""
    peak_memory_mb: float | None = None
    """Resident memory of the largest process; None if the run was not watched."""
    peak_gpu_memory_mb: float | None = None
    """The whole device's, as nvidia-smi shows it; None without one."""


def versions() -> dict[str, str]:
    """Of the software that makes the numbers."""
    return {"nnunetv2_hiendmae": __version__, "nnunetv2": version("nnunetv2"), "torch": str(torch.__version__)}


def file_sha256(file: Path) -> str:
    """Hash of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_record(folder: Path, record: RunRecord) -> None:
    """Write the record into a fold's folder, whole or not at all."""
    write_json(folder / RECORD_FILE, asdict(record))


def read_record(folder: Path) -> RunRecord | None:
    """The record of a fold's folder, None if it has none.

    Raises:
        ValueError: the file is no such record.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return RunRecord(**{f.name: values[f.name] for f in fields(RunRecord)})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error!r}.") from None


def measure(folder: Path) -> dict[str, Any]:
    """Cost figures of a finished run, from what nnU-Net left in its folder."""
    with torch.serialization.safe_globals(NUMPY_NUMBERS):
        checkpoint = torch.load(folder / FINAL, map_location="cpu", weights_only=True)
    log = checkpoint["logging"]
    epochs = [
        end - start for start, end in zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=True)
    ]
    iterations = int(read_json(folder / "debug.json")["num_iterations_per_epoch"])
    return {
        "parameters": count_parameters(checkpoint["network_weights"]),
        "seconds_per_iteration": round(float(median(epochs)) / iterations, 4),
        "seconds_per_volume": seconds_per_volume(folder),
        "summary_sha256": file_sha256(folder / SUMMARY),
    }


def count_parameters(state: dict[str, torch.Tensor]) -> int:
    """Numbers in a network's state; a tensor under several names (nnU-Net's U-Nets have them) counts once."""
    return sum({t.untyped_storage().data_ptr(): t.numel() for t in state.values()}.values())


def seconds_per_volume(folder: Path) -> float | None:
    """Mean time of nnU-Net's final validation per case; None if no log tells."""
    for log in sorted(folder.glob("training_log_*.txt"), reverse=True):
        lines = [m for m in map(LOG_TIME.match, log.read_text(encoding="utf-8", errors="replace").splitlines()) if m]
        starts = [stamp(m) for m in lines if m[2].startswith("predicting ")]
        ends = [stamp(m) for m in lines if m[2].startswith("Validation complete")]
        if starts and ends:
            return round((ends[-1] - starts[0]).total_seconds() / len(starts), 3)
    return None


def stamp(line: re.Match[str]) -> datetime:
    """When a log line was written."""
    return datetime.strptime(line[1], "%Y-%m-%d %H:%M:%S.%f")
