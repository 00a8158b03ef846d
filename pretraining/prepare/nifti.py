"""What ITK reads from a NIfTI file without a word: cut-off voxels, and a header that contradicts itself.

A header tells the axes up to three times: pixdim (spacing), qform (a rotation) and sform (any matrix). ITK, and with it
nnU-Net, takes the spacing from pixdim; nibabel takes everything from the sform, else from the qform. A form whose code
is 0 does not count (NIfTI-1 standard, section "3D image orientation and location in space").
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO

import nibabel
import numpy as np

from pretraining.prepare.geometry import (
    MAX_TILT_DEGREES,
    Refused,
    angle_between,
    check_axes,
    check_spacing,
    millimetres,
    same_spacing,
)

ENDINGS = (".nii", ".nii.gz")
HEADERS = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
"""By their size in bytes, with which a file begins."""
FLOATS = {16: "f4", 64: "f8"}
"""Codes of datatype that can hold what is no number."""
ORIGIN_TOLERANCE_MM = 1.0
NOT_MILLIMETRES = {1: "metre", 3: "micron"}
"""Codes of xyzt_units that ITK converts and nibabel does not."""
ONE_FORM = "keep the right one (nibabel: image.set_qform(A); image.set_sform(A))"

Header = nibabel.Nifti1Header | nibabel.Nifti2Header


def open_nifti(file: str) -> IO[bytes]:
    """The bytes of a file, unpacked."""
    return gzip.open(file) if Path(file).suffix.lower() == ".gz" else open(file, "rb")  # type: ignore[return-value]


def read_header(stream: IO[bytes]) -> Header | None:
    """The header at the beginning of a file; None if there is none."""
    block = stream.read(max(HEADERS))
    for order in "<>" if len(block) >= min(HEADERS) else "":
        size = struct.unpack_from(f"{order}i", block)[0]
        if size in HEADERS and len(block) >= size:
            return HEADERS[size](block[:size], endianness=order, check=False)
    return None


def check_nifti(file: str, whole: bool) -> None:
    """``Refused`` for a header that contradicts itself, and (``whole``) a cut-off file or NaN, which ITK fills up."""
    try:
        with open_nifti(file) as stream:
            header = read_header(stream)
            stream.seek(0)
            size = look_through(stream, header) if whole else 0
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Refused(f"truncated or damaged: {error}; get the file again") from None
    if header is None:
        return  # ITK says what it is
    check_header(header)
    if not whole:
        return
    axes, *lengths = (int(n) for n in header["dim"])
    expected = int(header["vox_offset"]) + math.prod(lengths[: max(axes, 0)]) * int(header["bitpix"]) // 8
    if size < expected:
        raise Refused(f"truncated: {size} bytes of {expected}; get the file again")


def look_through(stream: IO[bytes], header: Header | None) -> int:
    """Bytes of a file. ``Refused`` for values that are no numbers: ITK reads them as 0, which is water."""
    offset, kind = (0, None) if header is None else (int(header["vox_offset"]), FLOATS.get(int(header["datatype"])))
    size = len(stream.read(max(offset, 0)))
    for chunk in iter(lambda: stream.read(2**22), b""):
        size += len(chunk)
        if header is not None and kind is not None and offset >= 0:
            dtype = np.dtype(header.endianness + kind)
            if not np.isfinite(np.frombuffer(chunk, dtype, len(chunk) // dtype.itemsize)).all():
                raise Refused("NaN or infinite voxels, which readers turn into 0 HU; store the HU of air there")
    return size


def check_header(header: Header) -> None:
    """``Refused`` unless units, pixdim, qform and sform of a header agree."""
    pixdim = header["pixdim"][1:4].astype(float)
    check_spacing(pixdim, "pixdim")
    unit = int(header["xyzt_units"]) & 7
    if unit in NOT_MILLIMETRES:
        raise Refused(
            f"xyzt_units says {NOT_MILLIMETRES[unit]}, pixdim {millimetres(pixdim)}: readers differ in whether they "
            f"convert; store the header in mm"
        )
    sform = header.get_sform() if header["sform_code"] > 0 else None
    qform = read_qform(header) if header["qform_code"] > 0 else None
    if sform is None:
        return
    if not np.isfinite(sform).all():
        raise Refused(f"the sform is not finite; {ONE_FORM}")
    check_axes(sform[:3, :3], "the sform")
    spacing = np.linalg.norm(sform[:3, :3], axis=0)
    if not same_spacing(spacing, pixdim):
        raise Refused(f"the sform says {millimetres(spacing)} mm, pixdim {millimetres(pixdim)} mm; {ONE_FORM}")
    if qform is None:
        return
    angle = angle_between(sform[:3, :3], qform[:3, :3])
    if angle > MAX_TILT_DEGREES:
        mine, theirs = ("".join(nibabel.aff2axcodes(form)) for form in (sform, qform))
        raise Refused(f"sform (axes to {mine}) and qform (axes to {theirs}) are {angle:.1f}° apart; {ONE_FORM}")
    if np.abs(sform[:3, 3] - qform[:3, 3]).max() > ORIGIN_TOLERANCE_MM:
        mine, theirs = (" ".join(f"{mm:.5g}" for mm in form[:3, 3]) for form in (sform, qform))
        raise Refused(f"the sform has its origin at {mine} mm, the qform at {theirs} mm; {ONE_FORM}")


def read_qform(header: Header) -> np.ndarray:
    """The qform as a matrix ``(4, 4)``. ``Refused`` if its quaternion is none."""
    header = header.copy()
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # as the NIfTI library does; nibabel refuses others
    try:
        qform = header.get_qform(coded=False)
    except ValueError:
        qform = np.full((4, 4), np.nan)
    if not np.isfinite(qform).all():
        numbers = ", ".join(f"{float(header[f'quatern_{part}']):g}" for part in "bcd")
        raise Refused(f"the qform's quaternion ({numbers}) is no rotation; {ONE_FORM}")
    return qform
