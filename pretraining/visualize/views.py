"""Volumes as radiologists look at them: axial, coronal and sagittal slices, whatever the order of axes in the file.

Patient's right is on the left of axial and coronal slices, the front at the top of axial and on the left of sagittal
ones, the head at the top of coronal and sagittal ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from nnunetv2_hiendmae.checks import Size
from pretraining.visualize.cases import Frame

PLANES = ("axial", "coronal", "sagittal")


@dataclass(frozen=True, kw_only=True)
class Orientation:
    """How the axes of a volume ``(H, W, D)`` become those of the patient."""

    axes: tuple[int, int, int]
    """Axis of the volume that runs to the head, to the back, to the patient's left."""
    flips: tuple[bool, bool, bool]
    """Whether it runs the other way."""
    spacing: tuple[float, float, float]
    """Mm along the three."""

    @classmethod
    def of(cls, frame: Frame) -> Orientation:
        to_lps = sitk.DICOMOrientImageFilter()
        to_lps.SetDesiredCoordinateOrientation("LPS")
        to_lps.Execute(frame.place(sitk.Image(1, 1, 1, sitk.sitkUInt8)))
        order, flips = to_lps.GetPermuteOrder(), to_lps.GetFlipAxes()  # x, y, z
        z, y, x = (2 - int(axis) for axis in order[::-1])
        spacing = frame.spacing[::-1]
        return cls(
            axes=(z, y, x),
            flips=(bool(flips[2]), bool(flips[1]), bool(flips[0])),
            spacing=(spacing[z], spacing[y], spacing[x]),
        )

    def slices(self, volume: np.ndarray, plane: str) -> np.ndarray:
        """All slices of a plane, ``(n, rows, columns, …)`` of a volume ``(H, W, D, …)``; a view."""
        turned = np.moveaxis(volume, self.axes, (0, 1, 2))
        turned = turned[tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)]
        if plane == "axial":
            return turned
        return np.moveaxis(turned, 1 if plane == "coronal" else 2, 0)[:, ::-1]

    def find(self, voxel: Size, shape: tuple[int, ...], plane: str) -> tuple[int, int, int]:
        """Slice, row and column in which a voxel of a volume of ``shape`` is seen."""
        z, y, x = (
            shape[axis] - 1 - voxel[axis] if flip else voxel[axis]
            for axis, flip in zip(self.axes, self.flips, strict=True)
        )
        down = shape[self.axes[0]] - 1 - z
        return {"axial": (z, y, x), "coronal": (y, down, x), "sagittal": (x, down, y)}[plane]

    def pixel(self, plane: str) -> tuple[float, float]:
        """Height and width of a slice's pixel in mm."""
        z, y, x = self.spacing
        return {"axial": (y, x), "coronal": (z, x), "sagittal": (z, y)}[plane]
