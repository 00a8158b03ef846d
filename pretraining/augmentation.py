"""The published augmentation, drawn from a generator and applied to one crop in the loader's process.

A draw comes before the crop is read: a rotation by an odd number of quarter turns swaps the two edges to read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Size = tuple[int, int, int]

FLIP_P = 0.5
ROTATE_P = 0.3
INTENSITY_P = 0.1
INTENSITY_RANGE = 0.1


@dataclass(frozen=True)
class Augmentation:
    """One crop's draw."""

    flips: tuple[bool, bool, bool] = (False, False, False)
    quarter_turns: int = 0
    plane: tuple[int, int] = (1, 2)
    scale: float = 1.0
    shift: float = 0.0

    @classmethod
    def draw(cls, rng: np.random.Generator, plane: tuple[int, int]) -> Augmentation:
        """Flip each axis (p 0.5), rotate 1 to 3 quarter turns (p 0.3), scale and shift by up to 0.1 (p 0.1 each)."""
        flips = rng.random(3) < FLIP_P
        turns = int(rng.integers(1, 4)) if rng.random() < ROTATE_P else 0
        scale, shift = (
            rng.uniform(-INTENSITY_RANGE, INTENSITY_RANGE) if rng.random() < INTENSITY_P else 0.0 for _ in range(2)
        )
        return cls((bool(flips[0]), bool(flips[1]), bool(flips[2])), turns, plane, 1.0 + scale, shift)

    def size_to_read(self, size: Size) -> Size:
        """Edges of the crop before rotation."""
        edges = list(size)
        if self.quarter_turns % 2:
            a, b = self.plane
            edges[a], edges[b] = edges[b], edges[a]
        return edges[0], edges[1], edges[2]

    def apply(self, crop: np.ndarray) -> np.ndarray:
        """Crop ``(C, *size_to_read)`` to ``(C, *size)``; intensities are not clipped afterwards, as published."""
        crop = np.flip(crop, tuple(axis + 1 for axis, flip in enumerate(self.flips) if flip))
        crop = np.rot90(crop, self.quarter_turns, (self.plane[0] + 1, self.plane[1] + 1))
        return np.ascontiguousarray(crop * np.float32(self.scale) + np.float32(self.shift))


def rotation_plane(spacing: tuple[float, float, float]) -> tuple[int, int]:
    """The two axes whose spacings are closest, the axial plane of most CT; a tie goes to the last two."""
    pairs = [(1, 2), (0, 1), (0, 2)]
    return min(pairs, key=lambda pair: abs(np.log(spacing[pair[0]] / spacing[pair[1]])))
