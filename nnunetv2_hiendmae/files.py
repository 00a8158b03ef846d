"""nnU-Net's folders, and files that are read, written and locked so that nothing is lost. Mistakes are one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

LOCK = ".lock"


def raw_root() -> Path:
    """``nnUNet_raw``. ``ValueError`` if it is not set."""
    return set_folder(nnUNet_raw, "nnUNet_raw", "names the raw data")


def preprocessed_root() -> Path:
    """``nnUNet_preprocessed``. ``ValueError`` if it is not set."""
    return set_folder(nnUNet_preprocessed, "nnUNet_preprocessed", "names the preprocessed data")


def results_folder() -> Path:
    """``nnUNet_results``. ``ValueError`` if it is not set."""
    return set_folder(nnUNet_results, "nnUNet_results", "names the folder for results")


def raw_folder(dataset: str) -> Path:
    """``nnUNet_raw/DatasetXXX_Name`` of a data set named or numbered. ``ValueError`` if nnU-Net does not know it."""
    return raw_root() / dataset_name(dataset)


def preprocessed_folder(dataset: str) -> Path:
    """``nnUNet_preprocessed/DatasetXXX_Name`` of a data set named or numbered. ``ValueError`` as ``raw_folder``."""
    return preprocessed_root() / dataset_name(dataset)


def dataset_name(dataset: str, flag: str = "-d") -> str:
    """``DatasetXXX_Name`` of a data set named or numbered. ``ValueError`` if nnU-Net knows no such data set."""
    try:
        # nnU-Net may return a numpy string, which a checkpoint of plain data must not hold.
        return str(maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset))
    except (RuntimeError, ValueError) as error:  # no such number; no number
        raise ValueError(f"{flag} {dataset}: {' '.join(str(error).split())}") from None


def dataset_ids(names: Iterable[str]) -> str:
    """``500_501`` of ``Dataset500_X`` and ``Dataset501_Y``: how folders for several data sets are called."""
    return "_".join(name[len("Dataset") :].split("_")[0] for name in names)


def dataset_names(datasets: Iterable[str]) -> tuple[str, ...]:
    """``dataset_name`` of each, once: a data set may be named and numbered."""
    return tuple(dict.fromkeys(map(dataset_name, datasets)))


def read_json(file: Path, remedy: str = "Make it again, or restore it from a copy.") -> Any:
    """Content of a JSON file. ``ValueError`` naming the file, and the remedy, if it is not there or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist. {remedy}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error}). {remedy}") from None


def read_plans(file: Path, remedy: str) -> dict[str, Any]:
    """nnU-Net plans. ``ValueError`` as ``read_json``, also for JSON that is no plans."""
    plans = read_json(file, remedy)
    if not isinstance(plans, dict) or not isinstance(plans.get("configurations"), dict):
        raise ValueError(f"{file} holds no nnU-Net plans. {remedy}")
    return plans


def set_folder(variable: Any, name: str, purpose: str) -> Path:
    """The folder that one of nnU-Net's environment variables names."""
    if not variable.is_set():
        raise ValueError(f"The environment variable {name} is not set; it {purpose}.")
    return Path(str(variable))


@contextmanager
def atomic_file(path: Path, unfinished: str = ".tmp") -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is whole and on disk; else an older one stays.

    Until then its name ends on ``unfinished``: several processes that may write it at once need an end each.
    """
    temporary = path.with_name(path.name + unfinished)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class AtWorkError(ValueError):
    """Another process has the folder."""


@contextmanager
def alone_in(folder: Path, remedy: str) -> Iterator[None]:
    """Keep other processes out of a run's folder. ``AtWorkError`` with the remedy if one is in it."""
    lock = FileLock(folder / LOCK, timeout=0)  # given back by the system, however the process ends
    try:
        lock.acquire()
    except Timeout:
        raise AtWorkError(f"Another process is at work in {folder}. {remedy}") from None
    except NotImplementedError:  # a file system without locks must not keep anybody from training
        print(f"WARNING: {folder} cannot be locked; do not start the same run twice.")
    try:
        yield
    finally:
        lock.release()
