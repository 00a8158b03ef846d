"""DICOM: which slices make a volume, and the volume they make.

One series may hold several scans of one place: phases, repeated acquisitions, reconstructions. ITK sorts all slices of
a series by position, which would shuffle them into a volume that never was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from pretraining.prepare.geometry import MAX_TILT_DEGREES, STRAIGHTEN, Refused, check_axes, check_spacing

POSITION, ORIENTATION = "0020|0032", "0020|0037"
SERIES, MODALITY, IMAGE_TYPE, TILT = "0020|000e", "0008|0060", "0008|0008", "0018|1120"
SIZE, PIXEL_SPACING, FRAMES, SOP_CLASS = ("0028|0010", "0028|0011"), "0028|0030", "0028|0008", "0008|0016"
RESCALE = ("0028|1053", "0028|1052")

ALWAYS_APART = {
    "PatientID": "0010|0020", "Modality": MODALITY, "ImageType": IMAGE_TYPE, "ConvolutionKernel": "0018|1210",
    "Rows": SIZE[0], "Columns": SIZE[1], "PixelSpacing": PIXEL_SPACING,
}  # fmt: skip
"""Slices that differ here are never of one volume."""
APART_IF_INTERLEAVED = {
    "StudyInstanceUID": "0020|000d", "FrameOfReferenceUID": "0020|0052", "AcquisitionNumber": "0020|0012",
    "TemporalPositionIdentifier": "0020|0100", "TemporalPositionIndex": "0020|9128", "StackID": "0020|9056",
    "NominalPercentageOfCardiacPhase": "0020|9241", "TriggerTime": "0018|1060",
    "ContrastBolusAgent": "0018|0010", "ContrastBolusStartTime": "0018|1042", "KVP": "0018|0060",
    "EchoTime": "0018|0081", "SliceThickness": "0018|0050", "ReconstructionDiameter": "0018|1100",
    "FilterType": "0018|1160", "ScanOptions": "0018|0022", "SeriesNumber": "0020|0011",
    "SeriesDescription": "0008|103e", "ImageComments": "0020|4000", "AcquisitionDate": "0008|0022",
    "AcquisitionDateTime": "0008|002a", "AcquisitionTime": "0008|0032",
}  # fmt: skip
"""Slices that differ here are of several volumes if these lie in one place. If not, they are parts of one scan: a
scanner that stops between slices counts an acquisition, and a time, for each stop."""
ENHANCED = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
"""SOP classes of many frames a file: Enhanced CT and Legacy Converted Enhanced CT."""
SLICE_TOLERANCE, ROUNDING_MM, LARGEST_TOLERANCE = 0.05, 0.1, 0.25
"""What a position may be off an even grid: this share of the slice distance; in mm if that is more, for positions of
one decimal; and never more than that share. A slice that is missing is half a distance off."""


@dataclass(frozen=True)
class Slice:
    """One DICOM file, without its voxels."""

    file: str
    tags: dict[str, str]
    values_per_voxel: int

    @classmethod
    def read(cls, file: str) -> Slice:
        """``RuntimeError`` for a file that is no DICOM image."""
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(file)
        reader.ReadImageInformation()
        tags = {key: reader.GetMetaData(key).strip(" \0") for key in reader.GetMetaDataKeys()}
        return cls(file, tags, reader.GetNumberOfComponents())

    @property
    def series(self) -> str:
        """SeriesInstanceUID."""
        return self.tag(SERIES)

    def tag(self, key: str) -> str:
        """A tag's text; empty if it is not there."""
        return self.tags.get(key, "")

    def numbers(self, key: str) -> np.ndarray:
        """A tag's numbers; empty if it is not there or holds anything else."""
        try:
            return np.array([float(v) for v in self.tag(key).split("\\") if v])
        except ValueError:
            return np.array([])

    @property
    def axes(self) -> np.ndarray | None:
        """Columns: directions along a row, along a column, and the normal ``(3, 3)``; None if the file does not say."""
        six = self.numbers(ORIENTATION)
        return None if six.size != 6 else np.column_stack([six[:3], six[3:], np.cross(six[:3], six[3:])])

    @property
    def height(self) -> float | None:
        """Position along the normal in mm; None if the file does not say."""
        axes, position = self.axes, self.numbers(POSITION)
        return None if axes is None or position.size != 3 else round(float(position @ axes[:, 2]), 3)


Stack = list[Slice]


def stacks(slices: Stack) -> Iterator[tuple[str, Stack]]:
    """The volumes among the slices of one series, each with the tags that set it apart; empty if it is the only one."""
    groups: dict[tuple[object, ...], Stack] = {}
    orientations: list[np.ndarray | None] = []
    for one in slices:
        key = (*(comparable(one, tag) for tag in ALWAYS_APART.values()), orientation_number(one.axes, orientations))
        groups.setdefault(key, []).append(one)
    names = {**ALWAYS_APART, "ImageOrientationPatient": ORIENTATION}
    differing = [name for i, name in enumerate(names) if len({key[i] for key in groups}) > 1]
    for group in groups.values():
        label = [f"{name}={group[0].tag(names[name]) or 'none'}" for name in differing]
        for more, stack in split_interleaved(group):
            yield ";".join([*label, *more]), stack


def split_interleaved(stack: Stack) -> Iterator[tuple[list[str], Stack]]:
    """The stack, or the stacks that lie in one place and differ in a tag."""
    for name, key in APART_IF_INTERLEAVED.items():
        groups: dict[str, Stack] = {}
        for one in stack:
            groups.setdefault(one.tag(key), []).append(one)
        # Where each slice has its own value, the tag tells no volumes apart.
        if 1 < len(groups) <= len(stack) / 2 and are_interleaved(list(groups.values())):
            for value, group in sorted(groups.items()):
                for more, part in split_interleaved(group):
                    yield [f"{name}={value or 'none'}", *more], part
            return
    yield [], stack


def are_interleaved(groups: list[Stack]) -> bool:
    """Whether two of the groups share a stretch of positions."""
    heights = [[h for one in group if (h := one.height) is not None] for group in groups]
    ends = sorted((min(h), max(h)) for h in heights if h)
    return any(low <= last for (_, last), (low, _) in pairwise(ends))


def comparable(one: Slice, key: str) -> object:
    """A tag's numbers, however they are written, else its text."""
    return tuple(one.numbers(key).round(4)) or one.tag(key)


def orientation_number(axes: np.ndarray | None, known: list[np.ndarray | None]) -> int:
    """Which of the orientations met so far it is; a new one is added to them."""
    for i, other in enumerate(known):
        if axes is None or other is None:
            if axes is other:
                return i
        elif np.allclose(axes, other, atol=1e-3):
            return i
    known.append(axes)
    return len(known) - 1


def read_series(files: tuple[str, ...]) -> sitk.Image:
    """The volume of parallel, evenly spaced CT slices; a slice that is there twice is taken once.

    Raises:
        Refused: with the reason.
    """
    slices = [Slice.read(file) for file in files]
    for one in slices:
        check_slice(one)
    applied = {all(one.tag(key) for key in RESCALE) for one in slices}
    if len(applied) > 1:
        raise Refused("some slices have RescaleSlope and RescaleIntercept, some have not; export the series again")
    ordered = order_slices(slices)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([one.file for one in ordered])
    image = reader.Execute()
    heights = [h for one in ordered if (h := one.height) is not None]
    image.SetSpacing((*image.GetSpacing()[:2], (heights[-1] - heights[0]) / (len(heights) - 1)))
    return image


def check_slice(one: Slice) -> None:
    """``Refused`` unless it is a CT slice that tells where it lies."""
    name, modality = Path(one.file).name, one.tag(MODALITY)
    if modality != "CT":
        raise Refused(f"modality {modality or 'unknown'}, not CT")
    if "LOCALIZER" in one.tag(IMAGE_TYPE).upper():
        raise Refused("localizer (scout) image")
    if one.values_per_voxel > 1:
        raise Refused(f"{one.values_per_voxel} values a voxel (RGB), not CT")
    frames = one.tag(FRAMES)
    if frames not in ("", "1") or one.tag(SOP_CLASS) in ENHANCED:
        raise Refused(
            f"{name} holds {frames or 1} frames (enhanced CT), whose places and phases are not read here; convert it "
            f"to NIfTI (dcm2niix) or to one file a slice (emf2sf of dcm4che) first"
        )
    axes = one.axes
    if axes is None or one.height is None:
        raise Refused(f"slice without position or orientation ({name}); export the series again")
    check_axes(axes, f"ImageOrientationPatient of {name}")
    spacing = one.numbers(PIXEL_SPACING)
    if spacing.size != 2:
        raise Refused(f"slice without PixelSpacing ({name}), for which ITK takes 1 mm; export the series again")
    check_spacing(spacing.tolist(), f"PixelSpacing of {name}")
    tilt = one.numbers(TILT)
    if tilt.size and abs(tilt[0]) > MAX_TILT_DEGREES:
        raise Refused(f"gantry tilt of {tilt[0]:g}°: the volume would be sheared; {STRAIGHTEN}")


def order_slices(slices: Stack) -> Stack:
    """By position along the normal, copies dropped. ``Refused`` for gaps, rivals, and slices that are shifted."""
    places: dict[float, Slice] = {}
    for one in slices:
        height = one.height
        assert height is not None
        if not same_voxels(places.setdefault(height, one), one):
            names = f"{Path(places[height].file).name} and {Path(one.file).name}"
            raise Refused(
                f"two slices with other voxels at position {height:g} mm ({names}), and no tag that tells two scans "
                f"apart; export each scan as a series of its own"
            )
    if len(places) < 2:
        raise Refused("a single slice; volumes have more")
    ordered = [places[height] for height in sorted(places)]
    check_even(np.array(sorted(places)))
    along = ordered[-1].numbers(POSITION) - ordered[0].numbers(POSITION)
    axes = ordered[0].axes
    assert axes is not None
    angle = math.degrees(math.acos(min(1.0, abs(along @ axes[:, 2]) / np.linalg.norm(along))))
    if angle > MAX_TILT_DEGREES:
        raise Refused(f"gantry tilt: slices are shifted by {angle:.1f}° against their normal; {STRAIGHTEN}")
    return ordered


def same_voxels(first: Slice, second: Slice) -> bool:
    """Whether two files hold the same slice."""
    if first.file == second.file:
        return True
    one, other = (sitk.GetArrayFromImage(sitk.ReadImage(each.file)) for each in (first, second))
    return np.array_equal(one, other)


def check_even(heights: np.ndarray) -> None:
    """``Refused`` unless the heights in mm, in order, are those of an even grid."""
    gaps = np.diff(heights)
    step = float(np.median(gaps))
    grid = np.linspace(heights[0], heights[-1], len(heights))
    if np.abs(heights - grid).max() <= min(max(SLICE_TOLERANCE * step, ROUNDING_MM), LARGEST_TOLERANCE * step):
        return
    worst = int(np.abs(gaps - step).argmax())
    missing = max(round(gaps[worst] / step) - 1, 0)
    what = f"{missing} missing slice(s)" if missing else "uneven slices"
    raise Refused(
        f"{what} after position {heights[worst]:g} mm (distance {gaps[worst]:g} mm instead of {step:g} mm); "
        f"export the series again, or cut it there"
    )
