"""Why the sarcoma images of Dataset502 cannot show what pre-training gives: ``python second_region.py DATASET_FOLDER``.

For each case: the distance from the tumour to each side of the image; the Dice of an ellipsoid ``MARGIN_MM`` inside
the image's sides, which looks at no voxel; and how well HU alone tells tumour from soft tissue within ``NEAR_MM`` of it
(area under the ROC curve: 0.5 not at all, 0 and 1 fully).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

MARGIN_MM = 50
NEAR_MM = 20
SOFT_HU = (-200, 300)


def margins_mm(tumour: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distance of the tumour to the six sides."""
    where = np.argwhere(tumour)
    low, high = where.min(0), np.array(tumour.shape) - 1 - where.max(0)
    distances: np.ndarray = np.concatenate([low * spacing, high * spacing])
    return distances


def ellipsoid(shape: tuple[int, ...], spacing: np.ndarray, margin_mm: float) -> np.ndarray:
    """The voxels of an ellipsoid whose surface is ``margin_mm`` from each side of an image."""
    squares = []
    for n, s in zip(shape, spacing, strict=True):
        radius = max(n * s / 2 - margin_mm, 1)
        squares.append((((np.arange(n) + 0.5) * s - n * s / 2) / radius) ** 2)
    inside: np.ndarray = np.add.outer(np.add.outer(squares[0], squares[1]), squares[2]) < 1
    return inside


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Of two masks."""
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def auc(first: np.ndarray, second: np.ndarray) -> float:
    """Probability that a value of ``first`` is above one of ``second``; ties count half."""
    ordered = np.sort(second)
    below = np.searchsorted(ordered, first, "left") + np.searchsorted(ordered, first, "right")
    return float(below.mean() / 2 / len(second))


def measure(image: Path, label: Path) -> dict[str, Any]:
    """The three figures of a case."""
    reference = sitk.ReadImage(str(label))
    hu, tumour = sitk.GetArrayFromImage(sitk.ReadImage(str(image))), sitk.GetArrayFromImage(reference) == 1
    spacing = np.array(reference.GetSpacing()[::-1])
    distance = sitk.GetArrayFromImage(
        sitk.SignedMaurerDistanceMap(reference == 1, squaredDistance=False, useImageSpacing=True)
    )
    near = ~tumour & (distance <= NEAR_MM) & (hu > SOFT_HU[0]) & (hu < SOFT_HU[1])
    return {
        "margins": margins_mm(tumour, spacing),
        "dice": dice(ellipsoid(tumour.shape, spacing, MARGIN_MM), tumour),
        "auc": auc(hu[tumour], hu[near]),
    }


def main(folder: Path) -> None:
    images = sorted(folder.glob("imagesTr/*_0000.nii.gz"))
    if not images:
        sys.exit(f"second_region.py: {folder} has no imagesTr/*_0000.nii.gz.")
    rows = [measure(file, folder / "labelsTr" / file.name.replace("_0000.", ".")) for file in images]
    sides = np.concatenate([row["margins"] for row in rows])
    other = int((np.abs(sides - np.median(sides)) > 2).sum())
    print(f"{len(rows)} cases, tumour to side: median {np.median(sides):.1f} mm, {other} of {len(sides)} over 2 mm off")
    for name, words in (("dice", f"Dice of an ellipsoid {MARGIN_MM} mm inside the sides"), ("auc", "AUC of HU alone")):
        values = [row[name] for row in rows]
        print(f"{words}: mean {np.mean(values):.3f}, {min(values):.3f} to {max(values):.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python second_region.py DATASET_FOLDER")
    main(Path(sys.argv[1]))
