"""What there is in a folder: image files, DICOM series, and files that are neither."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
COMPANIONS = (".raw", ".zraw", ".img", ".hdr")
"""Voxels of .mhd and .nhdr headers: read with them."""


@dataclass(frozen=True)
class Source:
    """One candidate volume."""

    name: str
    """Path relative to the input folder, with ``#series`` for one of several series in a folder."""
    files: tuple[str, ...]
    is_dicom: bool = False

    @property
    def stamp(self) -> str:
        """Changes when a file does: sizes and times of all files."""
        digest = hashlib.sha256()
        for file in self.files:
            try:
                state = os.stat(file)
                digest.update(f"{file} {state.st_size} {state.st_mtime_ns}\n".encode(errors="surrogateescape"))
            except OSError:
                digest.update(f"{file} unreadable\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def case(self, dataset_name: str) -> str:
        """Case identifier: the same for the same path, whatever else is in the heap."""
        return f"{dataset_name}_{hashlib.sha256(self.name.encode(errors='surrogateescape')).hexdigest()[:12]}"


def find_sources(folder: Path) -> Iterator[Source]:
    """Every file below a folder, in a fixed order, as part of exactly one source."""
    for directory, subfolders, names in os.walk(folder):
        subfolders.sort()
        here = Path(directory)
        loose = []
        for name in sorted(names):
            if name.lower().endswith(IMAGE_ENDINGS):
                yield Source(str((here / name).relative_to(folder)), (str(here / name),))
            elif not name.lower().endswith(COMPANIONS):
                loose.append(name)
        yield from find_series(folder, here, loose)


def find_series(folder: Path, here: Path, names: list[str]) -> Iterator[Source]:
    """DICOM series among the files of one folder; the rest one by one."""
    rest = {str(here / name) for name in names}
    series_ids = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(here)) if any(map(looks_like_dicom, rest)) else ()
    relative = str(here.relative_to(folder))
    for series in series_ids:
        files = tuple(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(here), series))
        rest -= set(files)
        yield Source(relative if len(series_ids) == 1 else f"{relative}#{series}", files, True)
    for file in sorted(rest):
        yield Source(str(Path(file).relative_to(folder)), (file,))


def looks_like_dicom(file: str) -> bool:
    """The letters DICM after the preamble."""
    try:
        with open(file, "rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False
