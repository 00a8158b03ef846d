"""Real files for ingesting: CT-like volumes in many formats, and everything that goes wrong with them."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk


def ct(
    seed: int, size: tuple[int, int, int] = (24, 32, 40), spacing: tuple[float, ...] = (2.0, 2.0, 3.0)
) -> sitk.Image:
    """Air around a noisy body with a bone; ``size`` is (z, y, x)."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij")
    hu = np.where(grid[1] ** 2 + grid[2] ** 2 < 0.7, rng.normal(40, 20, size), -1000)
    hu[:, size[1] // 2 - 2 : size[1] // 2 + 2, size[2] // 2 - 2 : size[2] // 2 + 2] = 700
    image = sitk.GetImageFromArray(hu.astype(np.int16))
    image.SetSpacing(spacing)
    return image


def write(image: sitk.Image, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))
    return file


def write_dicom(
    image: sitk.Image,
    folder: Path,
    uid: str,
    skip: tuple[int, ...] = (),
    each: Callable[[int], dict[str, str]] = lambda z: {},
    **tags: str,
) -> None:
    """One file a slice; ITK stores (HU - RescaleIntercept) / RescaleSlope.

    ``tags`` like "0020|0012" are of all slices, ``each`` gives those of a slice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    spacing, offset = image.GetSpacing(), float(tags.get("offset", "0"))
    for z in range(image.GetDepth()):
        if z in skip:
            continue
        one = image[:, :, z]
        values = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2", "0008|0060": tags.get("modality", "CT"),
            "0008|0008": tags.get("image_type", "ORIGINAL\\PRIMARY\\AXIAL"),
            "0020|000e": uid, "0020|000d": "1.2.826.0.1.3680043.2.1125.1", "0008|0018": f"{uid}.{z + 1}",
            "0020|0032": f"0\\{float(tags.get('shift', '0')) * z:g}\\{z * spacing[2] + offset:g}",
            "0020|0037": "1\\0\\0\\0\\1\\0", "0020|0013": str(z + 1), "0028|1052": "-1024", "0028|1053": "2",
            "0018|1120": tags.get("tilt", "0"), "0028|0030": f"{spacing[1]}\\{spacing[0]}",
            "0018|0050": f"{spacing[2]}",
            **{key: value for key, value in tags.items() if "|" in key}, **each(z),
        }  # fmt: skip
        for key, value in values.items():
            one.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{uid[-4:]}_{z:03d}.dcm"))
        writer.Execute(one)


def write_good(heap: Path) -> set[str]:
    """Volumes that must be accepted; returns their names in the report."""
    write(ct(1), heap / "plain.nii.gz")
    write(ct(2), heap / "deep" / "er" / "uncompressed.nii")
    write(ct(3), heap / "ünï côdé 患者.nrrd")
    write(ct(4), heap / "meta.mha")
    write(sitk.JoinSeries(ct(5)), heap / "one_volume_4d.nii.gz")
    write_dicom(ct(6), heap / "dicom", "1.2.826.0.1.3680043.2.1125.6001")
    long = heap.joinpath(*["long" * 40] * 4)
    write(ct(7), long / "far_down.nii.gz")
    names = [
        "plain.nii.gz",
        "deep/er/uncompressed.nii",
        "ünï côdé 患者.nrrd",
        "meta.mha",
        "one_volume_4d.nii.gz",
        "dicom",
    ]
    return {*names, "dicom", str((long / "far_down.nii.gz").relative_to(heap))}


def write_bad(heap: Path) -> dict[str, str]:
    """Inputs that must be refused; returns a word of each reason."""
    good = write(ct(20), heap / "tmp.nii.gz").read_bytes()
    (heap / "truncated.nii.gz").write_bytes(good[: len(good) // 2])
    (heap / "zero.nii.gz").write_bytes(b"")
    (heap / "text.nii.gz").write_text("this is no image\n")
    raw = bytearray(gzip.decompress(good))
    nan = bytearray(raw)
    nan[80:84] = np.float32(np.nan).tobytes()  # pixdim[1] of the NIfTI header
    (heap / "nan_header.nii").write_bytes(nan)
    negative = bytearray(raw)
    negative[84:88] = np.float32(-2).tobytes()
    (heap / "negative_spacing.nii").write_bytes(negative)
    negative[84:88] = np.float32(0).tobytes()
    (heap / "zero_spacing.nii").write_bytes(negative)
    (heap / "short.nii").write_bytes(raw[: len(raw) // 2])
    (heap / "notes.txt").write_text("hello")
    os.remove(heap / "tmp.nii.gz")
    float_ct = sitk.Cast(ct(21), sitk.sitkFloat32)
    write(float_ct / 2000 + 0.5, heap / "normalised.nii.gz")
    write(sitk.Cast(sitk.IntensityWindowing(ct(22), -175, 250, 0, 255), sitk.sitkUInt8), heap / "eight_bit.nii.gz")
    write(ct(23) + 1024, heap / "offset.nii.gz")
    voxels = sitk.GetArrayFromImage(float_ct)
    voxels[3, 4, 5] = np.nan
    write(sitk.GetImageFromArray(voxels), heap / "nan_voxel.mha")  # ITK turns NaN in NIfTI into 0
    write(sitk.GetImageFromArray(np.zeros((20, 30, 30), np.int16)), heap / "constant.nii.gz")
    write(ct(24)[:, :, 3], heap / "flat.nii.gz")
    write(ct(25, (1, 32, 40)), heap / "one_slice.nii.gz")
    write(sitk.JoinSeries([ct(26), ct(27)]), heap / "two_volumes.nii.gz")
    channel = sitk.Cast(ct(28), sitk.sitkUInt8)
    write(sitk.Compose(channel, channel, channel), heap / "rgb.nii.gz")
    write(ct(1), heap / "the_same_as_plain.mha")
    write_dicom(ct(29), heap / "gap", "1.2.826.0.1.3680043.2.1125.7001", skip=(9,))
    write_dicom(ct(30), heap / "gap", "1.2.826.0.1.3680043.2.1125.7002", modality="MR")
    write_dicom(ct(31), heap / "tilted", "1.2.826.0.1.3680043.2.1125.7003", tilt="12.5")
    write_dicom(ct(32), heap / "sheared", "1.2.826.0.1.3680043.2.1125.7004", shift="0.4")
    write_dicom(ct(33), heap / "scout", "1.2.826.0.1.3680043.2.1125.7005", image_type="ORIGINAL\\PRIMARY\\LOCALIZER")
    return {
        "truncated.nii.gz": "truncated", "zero.nii.gz": "empty", "text.nii.gz": "damaged",
        "nan_header.nii": "is not positive", "negative_spacing.nii": "is not positive",
        "zero_spacing.nii": "is not positive", "short.nii": "truncated: ", "notes.txt": "no image",
        "normalised.nii.gz": "already normalised", "eight_bit.nii.gz": "8-bit", "offset.nii.gz": "+1024",
        "nan_voxel.mha": "NaN", "constant.nii.gz": "constant", "flat.nii.gz": "2D",
        "one_slice.nii.gz": "1 voxels along one axis", "two_volumes.nii.gz": "4D image of 2 volumes",
        "rgb.nii.gz": "3 values a voxel", "the_same_as_plain.mha": "duplicate of plain.nii.gz",
        "gap#1.2.826.0.1.3680043.2.1125.7001": "1 missing slice",
        "gap#1.2.826.0.1.3680043.2.1125.7002": "modality MR",
        "tilted": "gantry tilt of 12.5", "sheared": "shifted by", "scout": "localizer",
    }  # fmt: skip
