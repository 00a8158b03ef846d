"""What became of every input: ``ingest_report.csv``, and sheets of thumbnails."""

from __future__ import annotations

import csv
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave

REPORT = "ingest_report.csv"
THUMBNAILS = "ingest_thumbnails"
SHEET = (8, 6)
"""Thumbnails across and down."""
WINDOW = (-175, 250)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the report."""

    input: str
    status: str
    """accepted or refused."""
    reason: str = ""
    case: str = ""
    stamp: str = ""
    """Of the input's files; a changed input is looked at again."""
    size: str = ""
    """Voxels x × y × z."""
    spacing: str = ""
    """mm."""
    sha256: str = ""
    """Of the voxels."""
    identity: str = ""
    """Fingerprint of the patient, see ``nnunetv2_hiendmae.identity``; empty if refused before."""
    compared_with: str = ""
    """Data sets of ``--exclude_overlap`` whose patients this is none of."""


COLUMNS = [f.name for f in fields(Row)]


def read_rows(file: Path) -> Iterator[Row]:
    """Lines of a report; one that an interruption cut off is left out."""
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as stream:
        for line in csv.DictReader(stream):
            if {"input", "status", "sha256"} <= set(line) and None not in line.values():
                yield Row(**{name: line.get(name, "") for name in COLUMNS})  # older reports have fewer columns


class Report:
    """The table, appended to as results come, so that an interruption loses at most the line at hand."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / REPORT
        self.rows: dict[str, Row] = {}
        if self.file.is_file():
            self.rows = {row.input: row for row in read_rows(self.file)}
        self.write()

    def write(self) -> None:
        """The whole table anew."""
        temporary = self.file.with_suffix(".tmp")
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows.values())
        os.replace(temporary, self.file)

    def add(self, row: Row) -> None:
        self.rows[row.input] = row
        with open(self.file, "a", newline="", encoding="utf-8", errors="surrogateescape") as stream:
            csv.DictWriter(stream, COLUMNS).writerow(asdict(row))

    def select(self, status: str) -> list[Row]:
        """Rows of a status, in order of input."""
        return sorted((row for row in self.rows.values() if row.status == status), key=lambda row: row.input)


def save_thumbnail(image: sitk.Image, file: Path) -> None:
    """Middle axial slice, windowed, about 96 pixels."""
    voxels = sitk.GetArrayViewFromImage(image)
    middle = np.nan_to_num(voxels[len(voxels) // 2].astype(np.float32))
    step = max(1, max(middle.shape) // 96)
    imsave(file, middle[::step, ::step], cmap="gray", vmin=WINDOW[0], vmax=WINDOW[1])


def draw_sheets(rows: Sequence[Row], folder: Path, status: str, changed: Iterable[str]) -> None:
    """``<status>_000.png``, …: 48 thumbnails each; inputs without a picture show their reason only.

    Sheets before the first ``changed`` input are as they were: a sheet takes two seconds, 100,000 scans have 2,084.
    """
    per_sheet = SHEET[0] * SHEET[1]
    inputs = [row.input for row in rows]
    first_changed = min((bisect_left(inputs, name) for name in changed), default=len(rows) + per_sheet)
    sheets = {folder / f"{status}_{first // per_sheet:03d}.png": first for first in range(0, len(rows), per_sheet)}
    for old in set(folder.glob(f"{status}_*.png")) - set(sheets):
        old.unlink()
    for file, first in sheets.items():
        if first + per_sheet <= first_changed and file.is_file():
            continue
        figure = Figure(figsize=(2 * SHEET[0], 2.4 * SHEET[1]), layout="constrained")
        axes = figure.subplots(SHEET[1], SHEET[0]).ravel()
        for axis in axes:
            axis.set_axis_off()
        for axis, row in zip(axes, rows[first : first + per_sheet], strict=False):
            picture = folder / "cases" / f"{row.case}.png"
            if picture.is_file():
                axis.imshow(imread(picture))
            name = row.input.encode("ascii", errors="replace").decode()  # the font lacks most scripts
            axis.set_title(f"{name[-28:]}\n{row.reason[:32]}".replace("$", r"\$"), fontsize=6)
        figure.savefig(file, dpi=110)
