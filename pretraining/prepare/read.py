"""Reading one source with SimpleITK, or saying in a sentence why not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import SimpleITK as sitk

from pretraining.prepare.dicom import read_series
from pretraining.prepare.find import IMAGE_ENDINGS, Source
from pretraining.prepare.geometry import STRAIGHTEN, Refused, check_axes, check_spacing, millimetres, same_spacing
from pretraining.prepare.headers import check_text_header
from pretraining.prepare.nifti import ENDINGS as NIFTI
from pretraining.prepare.nifti import check_nifti


def read(source: Source) -> sitk.Image:
    """A 3D scalar image whose header agrees with itself, HU for DICOM (RescaleSlope and RescaleIntercept applied).

    Raises:
        Refused: with the reason.
    """
    with told_in_a_sentence():
        if source.is_dicom:
            image = read_series(source.files)
            check_grid(image)
            return image
        if os.path.isdir(source.files[0]):
            os.listdir(source.files[0])  # tells why it could not be looked into
            raise Refused("the folder could not be read before; start again")
        if not source.files[0].lower().endswith(IMAGE_ENDINGS):
            raise Refused("no image: neither DICOM nor one of " + ", ".join(IMAGE_ENDINGS))
        return open_file(source.files[0]).Execute()


def check_file(file: str, whole: bool = True) -> tuple[int, ...] | None:
    """Voxels x, y, z of an image file; None for a format that ``read`` does not know, of which nothing is said.

    Raises:
        Refused: ``read`` would refuse it. Whether it is ``whole`` takes reading it to the end.
    """
    if not file.lower().endswith(IMAGE_ENDINGS):
        return None
    with told_in_a_sentence():
        return open_file(file, whole).GetSize()[:3]


@contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """What cannot be read is refused."""
    try:
        yield
    except PermissionError:
        raise Refused("permission denied") from None
    except OSError as error:
        raise Refused(error.strerror or str(error)) from None
    except RuntimeError as error:
        raise Refused(f"cannot be read: {itk_reason(error)}") from None


def open_file(file: str, whole: bool = True) -> sitk.ImageFileReader:
    """A reader of a file's 3D image, all but the voxels checked; a fourth axis of length 1 is dropped."""
    with open(file, "rb") as stream:  # SimpleITK's message would not say what is wrong
        if not stream.read(1):
            raise Refused("the file is empty")
    if file.lower().endswith(NIFTI):
        check_nifti(file, whole)
    else:
        check_text_header(file)
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
    check_grid(reader)
    return reader


def check_grid(image: sitk.Image | sitk.ImageFileReader) -> None:
    """``Refused`` unless the spacing is positive and the axes are of unit length, at right angles."""
    check_spacing(image.GetSpacing()[:3])
    n = image.GetDimension()
    axes = np.array(image.GetDirection()).reshape(n, n)[:3, :3]
    check_axes(axes, "the matrix of directions")
    lengths = np.linalg.norm(axes, axis=0)
    if not same_spacing(lengths, (1, 1, 1)):
        raise Refused(
            f"the spacing is {millimetres(image.GetSpacing()[:3])} mm, and the matrix of directions scales by "
            f"{millimetres(lengths)} instead of 1; store one of them only"
        )


def itk_reason(error: RuntimeError) -> str:
    """The sentence that matters in ITK's message of many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception thrown", "The following", "/", "\\"))]
    line = (telling or lines or ["unknown reason"])[-1]
    if "orthonormal" in line:
        return f"sheared: its axes are not quite at right angles, which ITK and nnU-Net refuse; {STRAIGHTEN}"
    return line.split("): ", 1)[-1].removeprefix("ITK ERROR: ")[:200]
