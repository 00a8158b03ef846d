"""What there is in a folder: image files, DICOM series, and files that are neither."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
SERIES_UID = "0020|000e"
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
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    series: dict[str, list[str]] = {}
    rest = []
    for file in (str(here / name) for name in names):
        uid = series_uid(file)
        if uid:
            series.setdefault(uid, []).append(file)
        else:
            rest.append(file)
    relative = str(here.relative_to(folder))
    for uid, files in sorted(series.items()):
        yield Source(relative if len(series) == 1 else f"{relative}#{uid}", tuple(files), True)
    for file in rest:
        yield Source(str(Path(file).relative_to(folder)), (file,))


def series_uid(file: str) -> str:
    """SeriesInstanceUID of a DICOM image; empty for any other file."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(file)
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return ""
    return reader.GetMetaData(SERIES_UID).strip() if reader.HasMetaDataKey(SERIES_UID) else ""
