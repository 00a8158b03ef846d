"""A synthetic CT data set for tests. Simple shapes with HU values; not real anatomy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

LABELS = {"background": 0, "liver": 1, "kidneys": 2, "spine": 3, "aorta": 4}
Spacing = tuple[float, float, float]

SPACING_MM: Spacing = (4.0, 4.0, 5.0)
"""x, y, z."""


def ellipsoid(grid: np.ndarray, centre: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    """Mask of the voxels of ``grid`` ``(3, …)`` in mm inside an ellipsoid."""
    return np.sum([((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)], axis=0) < 1


def make_phantom(rng: np.random.Generator, spacing: Spacing = SPACING_MM) -> tuple[np.ndarray, np.ndarray]:
    """One trunk: HU (float32) and labels (uint8), both ``(z, y, x)`` of a random non-cubic size.

    Air -1000, lungs -800, fat -100, muscle 50, liver 110, kidneys 180, aorta 150 to 250, vertebral bone 400 HU, each
    with its own offset per patient, smooth texture, scanner blur and noise of 12 HU.

    Args:
        rng: draws the patient.
        spacing: x, y, z in mm; the extent is about 240 × 200 × 200 mm.
    """
    extent = rng.uniform((176, 180, 216), (224, 216, 252))  # z, y, x in mm
    size = tuple(int(e / s) for e, s in zip(extent, spacing[::-1], strict=True))
    mm = [(np.arange(n) - n / 2) * s for n, s in zip(size, spacing[::-1], strict=True)]
    grid = np.stack(np.meshgrid(*mm, indexing="ij"))  # (3, z, y, x) in mm
    jitter = lambda *values: tuple(v + rng.normal(0, 3) for v in values)  # noqa: E731
    scale = rng.uniform(0.9, 1.05)
    hu = np.full(size, -1000.0, np.float32)
    labels = np.zeros(size, np.uint8)

    def put(centre: tuple[float, ...], radii: tuple[float, ...], value: float, label: int | None = None) -> None:
        mask = ellipsoid(grid, jitter(*centre), tuple(r * scale * rng.uniform(0.9, 1.1) for r in radii))
        hu[mask] = value + rng.normal(0, 8)
        if label is not None:
            labels[mask] = label

    put((0, 0, 0), (400, 80, 105), -100, 0)
    put((0, 0, 0), (400, 70, 94), 50, 0)
    for side in (-1, 1):
        put((75, -5, 45 * side), (60, 45, 32), -800, 0)
    put((-10, -10, -40), (45, 42, 45), 110, LABELS["liver"])
    for side in (-1, 1):
        put((-45, 25, 48 * side), (28, 16, 16), 180, LABELS["kidneys"])
    put((0, 45, 0), (400, 15, 17), 400, LABELS["spine"])
    put((0, 20, 6), (400, 9, 9), rng.uniform(150, 250), LABELS["aorta"])

    hu += 12 * gaussian_filter(rng.normal(size=size), 2).astype(np.float32) / 0.05 * (hu > -500)
    hu = gaussian_filter(hu, 0.6) + rng.normal(0, 12, size).astype(np.float32)
    return np.clip(hu, -1024, 3071), labels


def write_phantoms(
    raw: Path, name: str, num_training: int, num_test: int, seed: int = 0, spacing: Spacing = SPACING_MM
) -> Path:
    """Write a data set in nnU-Net's raw format (imagesTr, labelsTr, imagesTs, labelsTs, dataset.json); its folder."""
    folder = raw / name
    for i in range(num_training + num_test):
        split = "Tr" if i < num_training else "Ts"
        hu, labels = make_phantom(np.random.default_rng((seed, i)), spacing)
        for kind, array, suffix in (("images", hu.astype(np.int16), "_0000"), ("labels", labels, "")):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing(spacing)
            file = folder / f"{kind}{split}" / f"phantom_{i:03d}{suffix}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(image, str(file), useCompression=True)
    description = {
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": num_training,
        "file_ending": ".nii.gz",
        "name": "Synthetic trunk phantoms",
        "description": "Ellipsoids with HU values. No real anatomy, no patients.",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2))
    return folder
