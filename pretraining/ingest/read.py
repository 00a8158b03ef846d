"""Reading one source with SimpleITK, or saying in a sentence why not."""

from __future__ import annotations

import gzip
import math
import struct
import zlib

import numpy as np
import SimpleITK as sitk

from pretraining.ingest.find import IMAGE_ENDINGS, Source

NIFTI_HEADER = 348
MAX_TILT_DEGREES = 0.5
SLICE_TOLERANCE = 0.05
"""Of the slice distance: what positions may be off."""


class Refused(Exception):
    """A source that is no usable CT volume; the text is the reason."""


def read(source: Source) -> sitk.Image:
    """A 3D scalar image with positive spacing, HU for DICOM (RescaleSlope and RescaleIntercept applied).

    Raises:
        Refused: with the reason.
    """
    try:
        if source.is_dicom:
            return check_geometry(read_series(source.files))
        if not source.files[0].lower().endswith(IMAGE_ENDINGS):
            raise Refused("no image: neither DICOM nor one of " + ", ".join(IMAGE_ENDINGS))
        with open(source.files[0], "rb") as file:  # SimpleITK's message would not say what is wrong
            if not file.read(1):
                raise Refused("the file is empty")
        if source.files[0].lower().endswith((".nii", ".nii.gz")):
            check_nifti(source.files[0])
        return check_geometry(read_file(source.files[0]))
    except PermissionError:
        raise Refused("permission denied") from None
    except OSError as error:
        raise Refused(error.strerror or str(error)) from None
    except RuntimeError as error:
        raise Refused(f"cannot be read: {itk_reason(error)}") from None


def check_nifti(file: str) -> None:
    """``Refused`` for what ITK reads without a word: cut-off files, whose rest it fills up, and impossible spacings."""
    try:
        with gzip.open(file) if file.lower().endswith(".gz") else open(file, "rb") as stream:
            head = stream.read(NIFTI_HEADER)
            size = len(head)
            while chunk := stream.read(2**22):
                size += len(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Refused(f"truncated or damaged: {error}") from None
    order = next(
        (o for o in "<>" if len(head) == NIFTI_HEADER and head[:4] == struct.pack(f"{o}i", NIFTI_HEADER)), None
    )
    if order is None:
        return  # NIfTI-2, or none: ITK decides
    axes, *lengths = struct.unpack_from(f"{order}8h", head, 40)
    (bits,) = struct.unpack_from(f"{order}h", head, 72)
    pixdim = struct.unpack_from(f"{order}8f", head, 76)
    (offset,) = struct.unpack_from(f"{order}f", head, 108)
    check_spacing(pixdim[1:4])
    expected = int(offset) + math.prod(lengths[: max(axes, 0)]) * bits // 8
    if size < expected:
        raise Refused(f"truncated: {size} bytes of {expected}")


def read_file(file: str) -> sitk.Image:
    """A single-file image; a fourth axis of length 1 is dropped."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    size, components = reader.GetSize(), reader.GetNumberOfComponents()
    if components > 1:
        raise Refused(f"{components} values a voxel (RGB or vector image), not CT")
    if len(size) == 4 and size[3] > 1:
        raise Refused(f"4D image of {size[3]} volumes; split it first")
    if len(size) == 4:
        reader.SetExtractSize([*size[:3], 0])
    elif len(size) != 3:
        raise Refused(f"{len(size)}D image; volumes have three axes")
    check_spacing(reader.GetSpacing()[:3])
    return reader.Execute()


def read_series(files: tuple[str, ...]) -> sitk.Image:
    """A DICOM series of parallel, evenly spaced CT slices; a slice that is there twice is taken once."""
    headers = [(file, header(file)) for file in files]
    first = headers[0][1]
    modality = tag(first, "0008|0060")
    if modality != "CT":
        raise Refused(f"modality {modality or 'unknown'}, not CT")
    if "LOCALIZER" in tag(first, "0008|0008").upper():
        raise Refused("localizer (scout) image")
    if first.GetNumberOfComponents() > 1:
        raise Refused(f"{first.GetNumberOfComponents()} values a voxel (RGB), not CT")
    if len(files) == 1 and first.GetDimension() == 3 and first.GetSize()[2] > 1:
        return sitk.ReadImage(files[0])  # one file with many frames
    tilt = float(tag(first, "0018|1120") or 0)
    if abs(tilt) > MAX_TILT_DEGREES:
        raise Refused(f"gantry tilt of {tilt:g}°: the volume would be sheared")
    ordered = order_slices(headers)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(ordered)
    return reader.Execute()


def header(file: str) -> sitk.ImageFileReader:
    """A file's tags, without its voxels."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return reader


def tag(reader: sitk.ImageFileReader, key: str) -> str:
    """A tag's text; empty if it is not there."""
    return reader.GetMetaData(key).strip() if reader.HasMetaDataKey(key) else ""


def order_slices(headers: list[tuple[str, sitk.ImageFileReader]]) -> list[str]:
    """Files by position along the normal, duplicates dropped. ``Refused`` for gaps and slices that are shifted."""
    places: dict[float, tuple[str, np.ndarray]] = {}
    normal = None
    for file, reader in headers:
        orientation = np.array([float(v) for v in tag(reader, "0020|0037").split("\\") if v])
        position = np.array([float(v) for v in tag(reader, "0020|0032").split("\\") if v])
        if orientation.size != 6 or position.size != 3:
            raise Refused(f"slice without position or orientation ({file})")
        own = np.cross(orientation[:3], orientation[3:])
        normal = own if normal is None else normal
        if not np.allclose(own, normal, atol=1e-3):
            raise Refused("slices of different orientation in one series")
        places.setdefault(round(float(position @ normal), 3), (file, position))
    if len(places) < 2:
        raise Refused(f"{len(places)} slice; volumes have more")
    heights = sorted(places)
    gaps = np.diff(heights)
    step = float(np.median(gaps))
    for low, gap in zip(heights, gaps, strict=False):
        if abs(gap - step) > SLICE_TOLERANCE * step:
            missing = max(round(gap / step) - 1, 0)
            what = f"{missing} missing slice(s)" if missing else "uneven slices"
            raise Refused(f"{what} after position {low:g} mm (distance {gap:g} mm instead of {step:g} mm)")
    along = places[heights[-1]][1] - places[heights[0]][1]
    angle = math.degrees(math.acos(min(1.0, abs(along @ normal) / np.linalg.norm(along))))
    if angle > MAX_TILT_DEGREES:
        raise Refused(f"gantry tilt: slices are shifted by {angle:.1f}° against their normal")
    return [places[height][0] for height in heights]


def check_geometry(image: sitk.Image) -> sitk.Image:
    """``Refused`` unless the image is a scalar volume of positive spacing."""
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise Refused(f"{image.GetDimension()}D image of {image.GetNumberOfComponentsPerPixel()} values a voxel")
    check_spacing(image.GetSpacing())
    return image


def check_spacing(spacing: tuple[float, ...]) -> None:
    """``Refused`` for what no scanner writes."""
    if not all(math.isfinite(s) and s > 0 for s in spacing):
        raise Refused(f"spacing {spacing} mm is not positive")


def itk_reason(error: RuntimeError) -> str:
    """The sentence that matters in ITK's message of many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception thrown", "The following", "/", "\\"))]
    line = (telling or lines or ["unknown reason"])[-1]
    return line.split("): ", 1)[-1].removeprefix("ITK ERROR: ")[:200]
