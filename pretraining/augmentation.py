"""The published augmentation, drawn from a generator and replayable from its seed.

A draw comes before the crop is read: a rotation by an odd number of quarter turns swaps the two edges to read. Flips
and rotation move stored voxels in the loader's process; scale and shift are arithmetic on the canonical batch, so they
happen on the training device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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

    def move(self, crop: np.ndarray) -> Tensor:
        """Stored crop ``(C, *size_to_read)`` flipped, then rotated like ``np.rot90``: a new ``(C, *size)`` tensor."""
        a, b = self.plane
        flipped = {axis for axis, flip in enumerate(self.flips) if flip}
        # A quarter turn is a flip followed by an exchange of the two axes; half a turn is two flips.
        flipped ^= {0: set(), 1: {b}, 2: {a, b}, 3: {a}}[self.quarter_turns]
        moved = torch.from_numpy(crop).flip([axis + 1 for axis in flipped])
        return moved.transpose(a + 1, b + 1).contiguous() if self.quarter_turns % 2 else moved


def rotation_plane(spacing: tuple[float, float, float]) -> tuple[int, int]:
    """The two axes whose spacings are closest, the axial plane of most CT; a tie goes to the last two."""
    pairs = [(1, 2), (0, 1), (0, 2)]
    return min(pairs, key=lambda pair: abs(np.log(spacing[pair[0]] / spacing[pair[1]])))
