"""Changes of a scan that a network should bear, each with the reference that belongs to the changed scan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import radians

import numpy as np
import SimpleITK as sitk

AIR_HU = -1000


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A case as nnU-Net's raw data hold it."""

    channels: tuple[sitk.Image, ...]
    """All on one grid."""
    is_ct: tuple[bool, ...]
    """Which of them are in HU."""
    reference: sitk.Image
    """The segmentation, on the same grid."""
    seed: int = 0
    """Of the noise."""


@dataclass(frozen=True)
class Shift:
    """A change, named with its size: the name stands in tables and finds what was measured before."""

    name: str
    apply: Callable[[Scan], Scan]
    needs_ct: bool = False
    """It is a change of HU, without effect on other modalities."""


def rotated(scan: Scan, degrees: float) -> Scan:
    """Turned about the patient's long axis through the middle of the image; what comes into view is air."""
    first = scan.channels[0]
    middle = first.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in first.GetSize()])
    turn = sitk.Euler3DTransform(middle, 0, 0, radians(degrees))

    def turned(image: sitk.Image, interpolator: int, outside: float) -> sitk.Image:
        return sitk.Resample(image, image, turn, interpolator, outside)

    return replace(
        scan,
        channels=tuple(
            turned(image, sitk.sitkLinear, AIR_HU if ct else float(sitk.GetArrayViewFromImage(image).min()))
            for image, ct in zip(scan.channels, scan.is_ct, strict=True)
        ),
        reference=turned(scan.reference, sitk.sitkNearestNeighbor, 0),
    )


def scaled(scan: Scan, factor: float) -> Scan:
    """A larger or smaller patient: the voxels stay, their size changes."""

    def sized(image: sitk.Image) -> sitk.Image:
        image = sitk.Image(image)
        image.SetSpacing([factor * mm for mm in image.GetSpacing()])
        return image

    return replace(scan, channels=tuple(map(sized, scan.channels)), reference=sized(scan.reference))


def with_added(scan: Scan, hu: Callable[[tuple[int, ...]], np.ndarray | float]) -> Scan:
    """``hu(shape)`` added to the channels in HU, within the range of their data type."""

    def added(image: sitk.Image) -> sitk.Image:
        stored = sitk.GetArrayFromImage(image)
        values = stored.astype(np.float32) + hu(stored.shape)
        if stored.dtype.kind != "f":
            limits = np.iinfo(stored.dtype)
            values = np.clip(np.rint(values), limits.min, limits.max)
        new = sitk.GetImageFromArray(values.astype(stored.dtype))
        new.CopyInformation(image)
        return new

    channels = zip(scan.channels, scan.is_ct, strict=True)
    return replace(scan, channels=tuple(added(image) if ct else image for image, ct in channels))


def noisy(scan: Scan, hu: float) -> Scan:
    """Gaussian noise of that standard deviation, the same for every network."""
    rng = np.random.default_rng(scan.seed)
    return with_added(scan, lambda shape: hu * rng.standard_normal(shape, np.float32))


def thick(scan: Scan, times: int) -> Scan:
    """Slices averaged in groups; a last group that is not whole is left out, of the reference too."""
    first = scan.channels[0]
    axis = int(np.argmax(np.abs(np.reshape(first.GetDirection(), (3, 3))[2])))  # the one along the patient
    whole = list(first.GetSize())
    whole[axis] -= whole[axis] % times
    groups = [times if i == axis else 1 for i in range(3)]
    cut = [sitk.RegionOfInterest(image, whole, [0, 0, 0]) for image in (*scan.channels, scan.reference)]
    return replace(scan, channels=tuple(sitk.BinShrink(image, groups) for image in cut[:-1]), reference=cut[-1])


def cropped(scan: Scan, share: float) -> Scan:
    """The middle of every slice: arms and flanks are cut off."""
    first = scan.channels[0]
    along = int(np.argmax(np.abs(np.reshape(first.GetDirection(), (3, 3))[2])))
    size = [n if i == along else max(1, round(share * n)) for i, n in enumerate(first.GetSize())]
    start = [(n - m) // 2 for n, m in zip(first.GetSize(), size, strict=True)]
    channels = tuple(sitk.RegionOfInterest(image, size, start) for image in scan.channels)
    return replace(scan, channels=channels, reference=sitk.RegionOfInterest(scan.reference, size, start))


UNCHANGED = Shift("unchanged", lambda scan: scan)
SHIFTS = (
    UNCHANGED,
    Shift("rotated by 10°", lambda scan: rotated(scan, 10)),
    Shift("10 % larger", lambda scan: scaled(scan, 1.1)),
    Shift("10 % smaller", lambda scan: scaled(scan, 0.9)),
    Shift("noise of 40 HU", lambda scan: noisy(scan, 40), needs_ct=True),
    Shift("30 HU brighter", lambda scan: with_added(scan, lambda _: 30), needs_ct=True),
    Shift("slices twice as thick", lambda scan: thick(scan, 2)),
    Shift("three quarters of each slice's width and height", lambda scan: cropped(scan, 0.75)),
)
