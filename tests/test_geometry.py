"""Headers that contradict themselves, and DICOM series of more than one volume."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import shared_folder
from heap import ct, write, write_dicom

from pretraining.prepare.find import Source, find_sources
from pretraining.prepare.geometry import Refused
from pretraining.prepare.read import check_file, read

UID = "1.2.826.0.1.3680043.2.1125.9001"
STRAIGHT = np.diag([-2.0, -2.0, 3.0, 1.0])


def turned(degrees: float, axis: int = 0) -> np.ndarray:
    """STRAIGHT, turned about an axis."""
    i, j = (k for k in range(3) if k != axis)
    turn = np.eye(4)
    turn[[i, j], [i, j]] = np.cos(np.radians(degrees))
    turn[i, j], turn[j, i] = -np.sin(np.radians(degrees)), np.sin(np.radians(degrees))
    return turn @ STRAIGHT


def moved(mm: float) -> np.ndarray:
    affine = STRAIGHT.copy()
    affine[:3, 3] = mm
    return affine


def sheared(degrees: float) -> np.ndarray:
    affine = STRAIGHT.copy()
    affine[1, 2] = 3 * np.tan(np.radians(degrees))
    return affine


def nifti(file: Path, sform: tuple[np.ndarray, int], qform: tuple[np.ndarray, int], **fields: object) -> Source:
    """Voxels under a header as it is given; nibabel would make its parts agree."""
    voxels = sitk.GetArrayFromImage(ct(1)).T
    image = nibabel.Nifti1Image(voxels, None)
    header = image.header
    header.set_zooms((2, 2, 3))
    image.set_qform(qform[0], 1, strip_shears=True)
    header["pixdim"][1:4] = fields.pop("pixdim", (2, 2, 3))
    header.set_sform(sform[0], 1)
    header["sform_code"], header["qform_code"] = sform[1], qform[1]
    header["xyzt_units"], header["vox_offset"], header["magic"] = 2, 352, b"n+1"
    header["scl_slope"], header["scl_inter"] = 1, 0
    for name, value in fields.items():
        header[name] = value
    file.write_bytes(gzip.compress(header.binaryblock + bytes(4) + voxels.tobytes(order="F"), 1))
    return Source(file.name, (str(file),))


GOOD = {
    "both": ((STRAIGHT, 1), (STRAIGHT, 1)),
    "sform only": ((STRAIGHT, 2), (STRAIGHT, 0)),
    "qform only": ((STRAIGHT, 0), (STRAIGHT, 1)),
    "neither": ((STRAIGHT, 0), (STRAIGHT, 0)),
    "a form that does not count is sheared": ((sheared(15), 0), (STRAIGHT, 1)),
    "a form that does not count is turned": ((STRAIGHT, 1), (turned(30), 0)),
    "oblique": ((turned(20), 1), (turned(20), 1)),
    "oblique, sform only": ((turned(33, 2), 1), (STRAIGHT, 0)),
    "rounded": ((np.diag([-2.001, -1.999, 3.004, 1]), 1), (moved(0.3), 1)),
}


@pytest.mark.parametrize("name", GOOD)
def test_headers_that_agree(tmp_path: Path, name: str) -> None:
    assert read(nifti(tmp_path / "a.nii.gz", *GOOD[name])).GetSpacing() == (2, 2, 3)


@pytest.mark.parametrize(
    ("sform", "qform", "fields", "reason"),
    [
        ((sheared(15), 1), (STRAIGHT, 1), {}, r"gantry tilt.*sform axes 2 and 3 meet at 75.0°.*dcm2niix"),
        ((sheared(15), 1), (STRAIGHT, 0), {}, "gantry tilt"),
        ((np.diag([-3, -3, 3, 1]), 2), (STRAIGHT, 0), {"pixdim": (1, 1, 1)}, r"says 3 × 3 × 3 mm, pixdim 1 × 1 × 1"),
        ((np.diag([-2, -2, 3.1, 1]), 1), (STRAIGHT, 1), {}, r"sform says 2 × 2 × 3.1 mm, pixdim 2 × 2 × 3 mm"),
        ((turned(20), 1), (STRAIGHT, 1), {}, "20.0° apart.*set_sform"),
        ((np.diag([2, -2, 3, 1]), 1), (STRAIGHT, 1), {}, r"to RPS\) and qform \(axes to LPS"),
        ((moved(50), 1), (STRAIGHT, 1), {}, "origin at 50 50 50 mm, the qform at 0 0 0 mm"),
        ((STRAIGHT * np.nan, 1), (STRAIGHT, 1), {}, "sform is not finite"),
        ((STRAIGHT * 0, 1), (STRAIGHT, 1), {}, "axis that is zero"),
        ((STRAIGHT, 1), (STRAIGHT, 1), {"quatern_b": 0.9, "quatern_c": 0.9}, "quaternion .* is no rotation"),
        ((STRAIGHT, 0), (STRAIGHT, 1), {"xyzt_units": 1}, "xyzt_units says metre"),
        ((STRAIGHT, 1), (STRAIGHT, 1), {"pixdim": (2, -2, 3)}, "pixdim 2 × -2 × 3 mm is not positive"),
    ],
)  # fmt: skip
def test_headers_that_contradict_themselves(
    tmp_path: Path, sform: tuple, qform: tuple, fields: dict, reason: str
) -> None:
    source = nifti(tmp_path / "a.nii.gz", sform, qform, **fields)
    with pytest.raises(Refused, match=reason):
        read(source)
    with pytest.raises(Refused, match=reason):
        check_file(source.files[0], whole=False)


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("a.mha", b"0 0 1\nOffset", b"0 0.26 1\nOffset", "gantry tilt"),
        ("a.mha", b"0 0 1\nOffset", b"0 0 3\nOffset", "directions scales by 1 × 1 × 3"),
        ("a.mha", b"ElementSpacing = 2 2 3\n", b"", "no ElementSpacing"),
        (
            "a.mha",
            b"ElementSpacing = 2 2 3",
            b"ElementSpacing = 2 2 -3",
            "2 × 2 × -3 mm is not positive",
        ),
        ("a.mha", b"ElementSpacing", b"ElementSize = 1 1 1\nElementSpacing", "2 × 2 × 3 mm, ElementSize 1 × 1 × 1 mm"),
        ("a.mha", b"ElementSpacing", b"ElementSpacing = 1 1 1\nElementSpacing", "twice, 1 1 1 and 2 2 3"),
        ("a.nrrd", b"(0,0,3)", b"(0,0.8,3)", "gantry tilt"),
        ("a.nrrd", b"space directions: (2,0,0) (0,2,0) (0,0,3)\n", b"", "neither space directions nor spacings"),
        ("a.nrrd", b"(0,0,3)", b'(0,0,3)\nspace units: "cm" "cm" "cm"', "space units says cm"),
        ("a.nrrd", b"(0,0,3)", b"(0,0,3)\nspacings: 1 1 1", "cannot be read"),
    ],
)
def test_text_headers(tmp_path: Path, name: str, old: bytes, new: bytes, reason: str) -> None:
    file = write(ct(1), tmp_path / name)
    assert check_file(str(file)) == (40, 32, 24)
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))
    with pytest.raises(Refused, match=reason):
        read(Source(name, (str(file),)))


def retag(folder: Path, number: int, **tags: str) -> None:
    """Write a second scan of the same place into a folder, under one more tag for each of its files."""
    write_dicom(ct(number), folder / "new", UID, **tags)
    for file in sorted((folder / "new").iterdir()):
        file.rename(folder / f"{number}_{file.name}")
    (folder / "new").rmdir()


@pytest.mark.parametrize(
    ("key", "first", "second", "name"),
    [
        ("0020|0012", "1", "2", "AcquisitionNumber"),
        ("0020|0100", "1", "2", "TemporalPositionIdentifier"),
        ("0008|0008", "ORIGINAL\\PRIMARY\\AXIAL", "DERIVED\\SECONDARY\\AXIAL", "ImageType"),
        ("0018|1210", "B30f", "B70f", "ConvolutionKernel"),
        ("0018|0010", "", "Iohexol", "ContrastBolusAgent"),
        ("0008|0032", "101500", "101630", "AcquisitionTime"),
        ("0020|0037", "1\\0\\0\\0\\1\\0", "1\\0\\0\\0\\-1\\0", "ImageOrientationPatient"),
        ("0010|0020", "a", "b", "PatientID"),
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_scans_of_one_series_are_told_apart(
    tmp_path: Path, key: str, first: str, second: str, name: str, half: bool
) -> None:
    """At the same places, and half a slice apart, where all slices would make an even grid."""
    write_dicom(ct(1), tmp_path, UID, **{key: first})
    retag(tmp_path, 2, offset="1.5" if half else "0", **{key: second})
    sources = {source.name: source for source in find_sources(tmp_path)}
    assert set(sources) == {f".#{name}={value or 'none'}" for value in (first, second)}
    for number, value in ((1, first), (2, second)):
        voxels = sitk.GetArrayFromImage(read(sources[f".#{name}={value or 'none'}"]))
        wanted = sitk.GetArrayFromImage(ct(number))
        flipped = wanted[::-1] if value == "1\\0\\0\\0\\-1\\0" else wanted
        np.testing.assert_allclose(voxels, flipped, atol=1)


def test_stops_of_a_scan_are_one_volume(tmp_path: Path) -> None:
    """Each stretch is an acquisition, each slice has its time."""
    write_dicom(ct(1), tmp_path, UID, each=lambda z: {"0020|0012": str(z // 8), "0008|0032": str(100000 + z)})
    (source,) = find_sources(tmp_path)
    assert source.name == "." and read(source).GetSize() == (40, 32, 24)


def test_scans_that_no_tag_tells_apart(tmp_path: Path) -> None:
    write_dicom(ct(1), tmp_path, UID)
    retag(tmp_path, 2)
    (source,) = find_sources(tmp_path)
    with pytest.raises(Refused, match=r"two slices with other voxels at position 0 mm .* series of its own"):
        read(source)


def test_positions_of_one_decimal(tmp_path: Path) -> None:
    write_dicom(ct(1), tmp_path, UID, each=lambda z: {"0020|0032": f"0\\0\\{round(0.625 * z, 1)}"})
    (source,) = find_sources(tmp_path)
    assert read(source).GetSpacing()[2] == pytest.approx(0.625, abs=0.003)


@pytest.mark.parametrize(
    ("each", "reason"),
    [
        (lambda z: {"0020|0032": f"0\\0\\{3 * z + 3 * (z > 12)}"}, "1 missing slice"),
        (lambda z: {"0020|0032": f"0\\0\\{3 * z + 0.3 * max(0, z - 12)}"}, "uneven slices"),
        (lambda z: {"0018|1120": "0" if z else "-15"}, "gantry tilt of -15°.*dcm2niix"),
        (lambda z: {"0008|0016": "1.2.840.10008.5.1.4.1.1.2.1"}, "enhanced CT.*dcm2niix"),
    ],
)
def test_series_that_are_no_volume(tmp_path: Path, each: object, reason: str) -> None:
    write_dicom(ct(1), tmp_path, UID, each=each)
    for source in find_sources(tmp_path):
        with pytest.raises(Refused, match=reason):
            read(source)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"\x20\0\x32\0", b"\x20\0\x33\0", "without position or orientation"),
        (b"1\\0\\0\\0\\1\\0", b"1\\0\\0\\1\\1\\0", "gantry tilt.*ImageOrientationPatient.*45.0°"),
        (b"\x28\0\x30\0", b"\x28\0\x31\0", "without PixelSpacing"),
    ],
)
def test_slices_that_do_not_tell_where_they_lie(tmp_path: Path, old: bytes, new: bytes, reason: str) -> None:
    """ITK writes no such files."""
    write_dicom(ct(1), tmp_path, UID)
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        assert old in content
        file.write_bytes(content.replace(old, new, 1))
    (source,) = find_sources(tmp_path)
    with pytest.raises(Refused, match=reason):
        read(source)


def test_real_ct_passes() -> None:
    files = sorted((shared_folder() / "data").glob("Dataset50[0123]*/imagesTr/*.nii.gz"))
    assert len(files) > 100
    for file in files:
        check_file(str(file), whole=False)
