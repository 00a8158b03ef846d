"""Changed scans keep their references: what was inside the organ's mask before is inside the changed mask after."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_hiendmae.benchmark.robustness import dice_by_organ
from nnunetv2_hiendmae.benchmark.shifts import SHIFTS, UNCHANGED, Scan, Shift

SPACING = (2.0, 2.0, 5.0)
SIZE = (61, 50, 21)


def ellipsoid(pixel: int = sitk.sitkInt16) -> Scan:
    """An organ of 100 HU off the middle, in air, and beside it a second channel that is not CT."""
    z, y, x = np.mgrid[: SIZE[2], : SIZE[1], : SIZE[0]].astype(float)
    inside = ((x - 36) / 12) ** 2 + ((y - 20) / 8) ** 2 + ((z - 11) / 6) ** 2 < 1
    images = [np.where(inside, 100, -1000), np.where(inside, 7, 0), inside]
    made = [sitk.GetImageFromArray(image.astype(np.int16)) for image in images]
    for image in made:
        image.SetSpacing(SPACING)
        image.SetOrigin((-70, 12, 900))
    ct, pet, reference = made
    return Scan(
        channels=(sitk.Cast(ct, pixel), pet), is_ct=(True, False), reference=sitk.Cast(reference, sitk.sitkUInt8)
    )


def permuted(scan: Scan) -> Scan:
    """The same scan stored with the patient's long axis first."""
    order = sitk.PermuteAxesImageFilter()
    order.SetOrder([2, 0, 1])
    return replace(scan, channels=tuple(map(order.Execute, scan.channels)), reference=order.Execute(scan.reference))


def overlap(scan: Scan) -> float:
    """Dice of what is above -450 HU and the reference, on the reference's grid."""
    organ = sitk.Cast(scan.channels[0] > -450, sitk.sitkUInt8)
    return dice_by_organ(organ, scan.reference, {"body": 1}, None)["body"]


@pytest.mark.parametrize("shift", SHIFTS, ids=[shift.name for shift in SHIFTS])
@pytest.mark.parametrize("axes", ["axial", "sagittal"])
def test_the_reference_follows_the_scan(shift: Shift, axes: str) -> None:
    before = ellipsoid() if axes == "axial" else permuted(ellipsoid())
    after = shift.apply(before)
    assert overlap(after) > (0.9 if "thick" in shift.name else 0.97)
    assert after.channels[0].GetSize() == after.channels[1].GetSize()
    assert after.channels[0].GetPixelID() == before.channels[0].GetPixelID()
    volume = [np.prod(s.reference.GetSpacing()) * sitk.GetArrayFromImage(s.reference).sum() for s in (before, after)]
    factor = {"10 % larger": 1.1**3, "10 % smaller": 0.9**3}.get(shift.name, 1)
    assert volume[1] == pytest.approx(factor * volume[0], rel=0.02)
    same = [sitk.Hash(a) == sitk.Hash(b) for a, b in zip(before.channels, after.channels, strict=True)]
    voxels_stay = shift is UNCHANGED or "10 % " in shift.name
    assert same == [voxels_stay, voxels_stay or shift.needs_ct]  # HU are not added to what is not CT


def test_sizes_of_the_changes() -> None:
    by_name = {shift.name: shift.apply(ellipsoid()) for shift in SHIFTS}
    assert by_name["slices twice as thick"].channels[0].GetSize() == (61, 50, 10)
    assert by_name["slices twice as thick"].reference.GetSize() == (61, 50, 20)
    assert by_name["slices twice as thick"].channels[0].GetSpacing() == (2.0, 2.0, 10.0)
    assert by_name["three quarters of each slice's width and height"].reference.GetSize() == (46, 38, 21)
    assert by_name["10 % larger"].channels[0].GetSpacing() == pytest.approx((2.2, 2.2, 5.5))
    plain = sitk.GetArrayFromImage(ellipsoid().channels[0]).astype(float)
    brighter = sitk.GetArrayFromImage(by_name["30 HU brighter"].channels[0])
    assert (brighter - plain == 30).all()
    noise = sitk.GetArrayFromImage(by_name["noise of 40 HU"].channels[0]) - plain
    assert abs(noise.mean()) < 1 and noise.std() == pytest.approx(40, rel=0.02)
    again = next(s for s in SHIFTS if "noise" in s.name)
    assert sitk.Hash(again.apply(ellipsoid()).channels[0]) == sitk.Hash(by_name["noise of 40 HU"].channels[0])
    other = again.apply(replace(ellipsoid(), seed=1))
    assert sitk.Hash(other.channels[0]) != sitk.Hash(by_name["noise of 40 HU"].channels[0])


def test_the_turn_is_about_the_long_axis_through_the_middle() -> None:
    """Second writing: the organ's centre of mass turns by the angle about the image's middle."""
    before, after = ellipsoid(), next(s for s in SHIFTS if "rotated" in s.name).apply(ellipsoid())

    def centre(scan: Scan) -> np.ndarray:
        voxels = np.argwhere(sitk.GetArrayFromImage(scan.reference)).mean(0)[::-1]
        return np.array(scan.reference.TransformContinuousIndexToPhysicalPoint(voxels.tolist()))

    middle = np.array(before.reference.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in SIZE]))
    a, b = centre(before) - middle, centre(after) - middle
    angle = np.degrees(np.arctan2(a[0] * b[1] - a[1] * b[0], a[0] * b[0] + a[1] * b[1]))
    assert abs(angle) == pytest.approx(10, abs=1) and a[2] == pytest.approx(b[2], abs=0.5)
    assert np.hypot(*a[:2]) == pytest.approx(np.hypot(*b[:2]), rel=0.05)


def test_integers_do_not_wrap() -> None:
    scan = ellipsoid(sitk.sitkUInt8)  # -1000 is stored as 24, the organ as 100
    full = replace(scan, channels=(sitk.Clamp(scan.channels[0] + 150, sitk.sitkUInt8), scan.channels[1]))
    brighter = next(s for s in SHIFTS if "brighter" in s.name).apply(full)
    assert sitk.GetArrayFromImage(brighter.channels[0]).max() == 255
