"""What there is in a folder: image files, DICOM series, and files that are neither."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk

from pretraining.prepare.dicom import Slice, stacks

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
HEADERS, VOXELS = (".mhd", ".nhdr"), (".raw", ".zraw")
"""Voxels beside a header are read with it."""


@dataclass(frozen=True)
class Source:
    """One candidate volume."""

    name: str
    """Path relative to the input folder, with ``#series`` for one of several series in a folder, and
    ``#tag=value`` for one of several volumes in a series."""
    files: tuple[str, ...]
    is_dicom: bool = False

    @property
    def stamp(self) -> str:
        """Changes when a file does: names, sizes and times of all files, wherever they are seen from."""
        digest = hashlib.sha256()
        for file in self.files:
            try:
                state = os.stat(file)
                told = f"{state.st_size} {state.st_mtime_ns}"
            except OSError:
                told = "unreadable"
            digest.update(f"{os.path.basename(file)} {told}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def case(self, dataset_name: str) -> str:
        """Case identifier: the same for the same path, whatever else is in the heap."""
        return f"{dataset_name}_{hashlib.sha256(self.name.encode(errors='surrogateescape')).hexdigest()[:12]}"


def find_sources(folder: Path) -> Iterator[Source]:
    """Every file below a folder, in a fixed order, as part of exactly one source; so is a folder that cannot be read.

    Links to folders are followed, each folder once.
    """
    seen: set[str] = set()
    closed: list[OSError] = []
    for directory, subfolders, names in os.walk(folder, onerror=closed.append, followlinks=True):
        subfolders.sort()
        here = Path(directory)
        real = os.path.realpath(here)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        loose = []
        companions = VOXELS if any(name.lower().endswith(HEADERS) for name in names) else ()
        for name in sorted(names):
            if name.lower().endswith(IMAGE_ENDINGS):
                yield Source(str((here / name).relative_to(folder)), (str(here / name),))
            elif not name.lower().endswith(companions):
                loose.append(name)
        yield from find_series(folder, here, loose)
    for error in closed:
        yield Source(os.path.relpath(error.filename, folder), (error.filename,))


def find_series(folder: Path, here: Path, names: list[str]) -> Iterator[Source]:
    """DICOM volumes among the files of one folder; the rest one by one."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    series: dict[str, list[Slice]] = {}
    rest = []
    for file in (str(here / name) for name in names):
        one = read_slice(file)
        if one is not None and one.series:
            series.setdefault(one.series, []).append(one)
        else:
            rest.append(file)
    relative = str(here.relative_to(folder))
    for uid, slices in sorted(series.items()):
        for label, stack in stacks(slices):
            name = "#".join([relative, *([uid] if len(series) > 1 else []), *([label] if label else [])])
            yield Source(name, tuple(one.file for one in stack), True)
    for file in rest:
        yield Source(str(Path(file).relative_to(folder)), (file,))


def read_slice(file: str) -> Slice | None:
    """A DICOM image; None for any other file."""
    try:
        return Slice.read(file)
    except RuntimeError:
        return None
