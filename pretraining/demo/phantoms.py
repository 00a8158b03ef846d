"""Synthetic trunks that look like coarse CT, for the demo: no patient, and no real anatomy, but every organ varies.

Arrays are ``(z, y, x)``: z runs to the head, y to the back, x to the patient's left; positions in mm from the middle.
A phantom is drawn at half the voxel size and averaged, so that edges have partial volume.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidneys": 3, "spine": 4, "aorta": 5, "lungs": 6}
SIZE_MM = ((252, 280), (245, 273), (301, 329))
"""Least and largest extent along z, y, x."""
TEXTURE_HU, NOISE_HU = 7.0, 16.0


class Canvas:
    """A trunk while it is drawn, on the fine grid."""

    def __init__(self, rng: np.random.Generator, voxel_mm: float) -> None:
        self.rng, self.fine_mm = rng, voxel_mm / 2
        shape = tuple(2 * round(mm / voxel_mm) for mm in rng.uniform(*np.transpose(SIZE_MM)))
        self.hu = np.full(shape, -1000.0, np.float32)
        self.labels = np.zeros(shape, np.uint8)
        axes = [((np.arange(n) - (n - 1) / 2) * self.fine_mm).astype(np.float32) for n in shape]
        self.z, self.y, self.x = np.meshgrid(*axes, indexing="ij", sparse=True)

    def ellipsoid(self, centre: tuple[float, float, float], radii: tuple[float, float, float], wobble: float = 0.04,
                  jitter: float = 4.0) -> np.ndarray:  # fmt: skip
        """Mask of an ellipsoid ``(z, y, x)`` in mm, moved and stretched a little."""
        c = np.add(centre, self.rng.normal(0, jitter, 3))
        r = np.multiply(radii, self.rng.normal(1, wobble, 3))
        return ((self.z - c[0]) / r[0]) ** 2 + ((self.y - c[1]) / r[1]) ** 2 + ((self.x - c[2]) / r[2]) ** 2 < 1

    def smooth(self, mm: float) -> np.ndarray:
        """Random field of mean 0 and standard deviation 1, without detail below ``mm``."""
        field = gaussian_filter(self.rng.standard_normal(self.hu.shape, np.float32), mm / self.fine_mm, mode="wrap")
        return field / field.std()

    def vessels(self, mm: float, thickness: float | np.ndarray) -> np.ndarray:
        """Mask of winding tubes: where two smooth fields cross zero together."""
        return np.hypot(self.smooth(mm), self.smooth(mm)) < thickness

    def paint(self, mask: np.ndarray, hu: float, organ: str | None = "background", spread: float = 6.0) -> None:
        """Fill with one value, which differs between patients by ``spread``; ``organ`` None leaves the labels."""
        self.hu[mask] = hu + self.rng.normal(0, spread)
        if organ is not None:
            self.labels[mask] = LABELS[organ]


def make_phantom(rng: np.random.Generator, voxel_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """One trunk: HU (int16) and labels (uint8), ``(z, y, x)``; voxels of 7 mm make about 38 × 37 × 45 of them."""
    c = Canvas(rng, voxel_mm)
    depth, width, fat = rng.uniform(90, 102), rng.uniform(128, 144), rng.uniform(9, 20)
    radius = np.sqrt((c.y / depth) ** 2 + (c.x / width) ** 2) + 0 * c.z  # 1 on the skin
    diaphragm = rng.normal(22, 6) - (c.x / 70) ** 2 * 14 - 12 * (c.y / 60) ** 2 + 8 * (c.x < 0)
    draw_table(c, depth)
    wall = 1 - fat / depth
    cavity = wall - 13 / depth
    c.paint(radius < 1, -100)
    c.paint(radius < wall, 52)
    c.paint((radius < cavity) & (c.z < diaphragm), -95)
    draw_bowel(c, cavity, radius, diaphragm)
    draw_chest(c, cavity, radius, diaphragm)
    draw_organs(c, cavity, radius, diaphragm)
    draw_bones(c, cavity, wall, radius)
    return finish(c, radius < 1)


def draw_table(c: Canvas, depth: float) -> None:
    """A curved shell of carbon fibre with foam in it, below the back."""
    height = c.y - depth - 6 + (c.x / 130) ** 2 * 22 + 0 * c.z
    inside = np.abs(c.x) < 135
    c.paint((height > 0) & (height < 24) & inside, -930, spread=10)
    c.paint(((height > 0) & (height < 10) | (height > 20) & (height < 24)) & inside, 150, spread=20)


def draw_chest(c: Canvas, cavity: float, radius: np.ndarray, diaphragm: np.ndarray) -> None:
    """Lungs with vessels, and the heart between them."""
    apart = np.abs(c.x - 6) > 16 + 10 * np.exp(-((c.y + 10) ** 2) / 1500)
    lungs = (radius < cavity) & (c.z > diaphragm) & apart & (c.y < 78)
    c.paint((radius < cavity) & (c.z > diaphragm), 15)
    c.paint(lungs, -840, "lungs", spread=25)
    near_hilum = 0.14 + 0.14 * np.exp(-(c.x**2) / 2500)
    c.paint(lungs & c.vessels(18, near_hilum), 40, None)
    c.paint(c.ellipsoid((70, -32, 18), (62, 38, 48)) & (c.z > diaphragm), c.rng.uniform(60, 140))


def draw_bowel(c: Canvas, cavity: float, radius: np.ndarray, diaphragm: np.ndarray) -> None:
    """Loops of gut, some with gas in front; the stomach."""
    belly = (radius < cavity - 0.06) & (c.z < diaphragm - 25)
    loops = belly & (c.smooth(18) > 0.1) & (c.y < 25)
    c.paint(loops, 35)
    c.paint(belly & (c.smooth(21) > 1.5) & (c.y < -20), -850, spread=40)
    stomach = c.ellipsoid((5, -30, 55), (34, 34, 36)) & (radius < cavity - 0.02) & (c.z < diaphragm)
    c.paint(stomach, 25)
    c.paint(stomach & (c.y < -45), -900, spread=30)


def draw_organs(c: Canvas, cavity: float, radius: np.ndarray, diaphragm: np.ndarray) -> None:
    """Liver, spleen, kidneys and aorta, with what flows through them."""
    rng, enhanced = c.rng, c.rng.uniform(0.35, 0.65)  # all in one phase of contrast: a toy must be learned in minutes
    inside = (radius < cavity - 0.015) & (c.z < diaphragm - 3)
    liver = (c.ellipsoid((-18, -8, -66), (58, 66, 56)) | c.ellipsoid((2, -40, -8), (30, 34, 56))) & inside
    c.paint(liver, 85 + 35 * enhanced, "liver")
    c.paint(liver & c.vessels(21, 0.22), 95 + 80 * enhanced, None)
    spleen = c.ellipsoid((-10, 24, 80), (50, 46, 34), jitter=3) & inside & ~liver
    c.paint(spleen, 115 + 45 * enhanced, "spleen")
    for side in (-1, 1):
        z, y, x = np.add((-70, 40, 48 * side), rng.normal(0, 4, 3))
        size = rng.normal(1, 0.05)
        kidney = c.ellipsoid((z, y, x), (44 * size, 27 * size, 26 * size), jitter=0)
        c.paint(kidney, 160 + 50 * enhanced, "kidneys")
        c.paint(c.ellipsoid((z, y - 6, x - 14 * side), (18, 9, 12), jitter=0), -40, None)
    bend = rng.normal(0, 4)
    middle_x, middle_y = 12 + bend * np.sin(c.z / 60), 32 + rng.normal(0, 3) - 0.04 * c.z
    tube = np.hypot(c.x - middle_x, c.y - middle_y) < rng.uniform(14, 17)
    c.paint(tube, 180 + 50 * enhanced, "aorta", spread=8)
    c.paint(np.hypot(c.x + 20 + bend, c.y - 26) + 0 * c.z < 10, 70 + 30 * enhanced)  # vena cava


def draw_bones(c: Canvas, cavity: float, wall: float, radius: np.ndarray) -> None:
    """Vertebrae with discs, canal and processes; ribs and breastbone."""
    rng = c.rng
    back = 60 + rng.normal(0, 3)
    phase = rng.uniform(0, 34)
    level = np.mod(c.z + phase, 34.0)
    body = np.hypot((c.x) / 20, (c.y - back) / 16) < rng.normal(1, 0.04)
    process = (np.abs(c.x) < 5) & (c.y > back) & (c.y < back + 38) & (level > 6)
    wings = (np.abs(c.x) < 34) & (np.abs(c.y - back - 16) < 6) & (level > 10) & (level < 24)
    bone = (body | process | wings) & (radius < wall)
    c.paint(bone, 330, "spine", spread=30)
    core = (np.hypot(c.x / 16, (c.y - back) / 12) < 1) & (level > 8)
    c.paint(core, 240, None, spread=20)
    c.paint(body & (level < 6), 90, None)  # discs
    c.paint(np.hypot(c.x, c.y - back - 21) + 0 * c.z < 9, 25, "background")  # canal
    angle = np.abs(np.arctan2(c.x, c.y))  # 0 at the back
    slope = np.mod(c.z + 30 * angle + phase, 27.0)
    ribs = (np.abs(radius - (cavity + wall) / 2) < 0.045) & (slope < 11) & (angle > 0.35) & (angle < 2.5)
    c.paint(ribs & (c.z > -60 + 25 * angle), 380, spread=40)
    c.paint((np.abs(radius - (cavity + wall) / 2) < 0.055) & (angle > 2.95) & (c.z > 45), 230, spread=30)


def finish(c: Canvas, body: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Texture of the tissue, the scanner's blur and noise, and voxels of the final size."""
    hu = c.hu + TEXTURE_HU * c.smooth(7) * body
    hu = halved(gaussian_filter(hu, 0.7))
    noise = gaussian_filter(c.rng.standard_normal(hu.shape, np.float32), 0.5)
    hu = hu + NOISE_HU * c.rng.uniform(0.7, 1.3) * noise / noise.std()
    shares = [halved((c.labels == label).astype(np.float32)) for label in LABELS.values()]
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16), np.argmax(shares, 0).astype(np.uint8)


def halved(volume: np.ndarray) -> np.ndarray:
    """Mean of each 2 × 2 × 2 voxels."""
    z, y, x = (n // 2 for n in volume.shape)
    return volume.reshape(z, 2, y, 2, x, 2).mean((1, 3, 5))


def write_case(folder: Path, name: str, seed: tuple[int, ...], split: str, voxel_mm: float, labelled: bool) -> None:
    """One phantom in nnU-Net's raw format; ``split`` is Tr or Ts."""
    hu, labels = make_phantom(np.random.default_rng(seed), voxel_mm)
    for kind, array, suffix in (("images", hu, "_0000"), ("labels", labels, ""))[: 1 + labelled]:
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((voxel_mm,) * 3)
        file = folder / f"{kind}{split}" / f"{name}{suffix}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(file), useCompression=True)


def describe(folder: Path, num_training: int, labels: dict[str, int]) -> None:
    """nnU-Net's dataset.json."""
    description = {
        "channel_names": {"0": "CT"},
        "labels": labels,
        "numTraining": num_training,
        "file_ending": ".nii.gz",
        "name": folder.name,
        "description": "Shapes with HU values, made by hiendmae_demo. No real anatomy, no patients.",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2))
