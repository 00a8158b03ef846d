"""The published augmentation, drawn from a generator and replayable from its seed.

A draw comes before the crop is read: a rotation by an odd number of quarter turns swaps the two edges to read. What
keeps the shape of a batch is done on the training device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from nnunetv2_hiendmae.checks import Size
from pretraining.device import on_device

FLIP_P = 0.5
ROTATE_P = 0.3
INTENSITY_P = 0.1
INTENSITY_RANGE = 0.1
EXCHANGES = ((0, 0), (0, 1), (0, 2), (1, 2))
"""Pairs of axes; the first is none."""


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

    def exchange_in_loader(self, crop: np.ndarray) -> tuple[np.ndarray, int]:
        """A view ``(C, *size)`` of a crop ``(C, *size_to_read)``, and the exchange left to the device.

        Off the cube an exchange changes the shape, so it comes before crops are put into a batch; else the device does
        it, faster.
        """
        a, b = self.plane
        if self.quarter_turns % 2 == 0:
            return crop, 0
        same = crop.shape[a + 1] == crop.shape[b + 1]
        return (crop, EXCHANGES.index(self.plane)) if same else (crop.swapaxes(a + 1, b + 1), 0)

    @property
    def flips_afterwards(self) -> tuple[bool, bool, bool]:
        """Axes to flip after the exchange, for ``flips`` followed by a rotation like ``np.rot90``."""
        a, b = self.plane
        flips = list(self.flips)
        if self.quarter_turns % 2:
            flips[a], flips[b] = flips[b], flips[a]
        for axis in {0: (), 1: (a,), 2: (a, b), 3: (b,)}[self.quarter_turns]:
            flips[axis] = not flips[axis]
        return flips[0], flips[1], flips[2]


def orient_crops(image: Tensor, exchange: Tensor, flips: Tensor) -> Tensor:
    """Batch ``(B, C, H, W, D)``, each crop with two axes exchanged, then flipped.

    Args:
        image: crops.
        exchange: ``(B,)`` int64 on the CPU, into ``EXCHANGES``.
        flips: ``(B, 3)`` bool on the CPU.
    """
    orientations = exchange * 8 + (flips * torch.tensor((1, 2, 4))).sum(1)
    if not orientations.any():
        return image
    found, counts = orientations.unique(return_counts=True)
    order = on_device(orientations.argsort(), image.device)  # one copy for all groups, and no wait for any
    oriented = torch.empty_like(image)
    for orientation, chosen in zip(found.tolist(), order.split(counts.tolist()), strict=True):
        some = image.index_select(0, chosen)
        if orientation >= 8:
            a, b = EXCHANGES[orientation // 8]
            some = some.transpose(a + 2, b + 2)
        oriented.index_copy_(0, chosen, some.flip([axis + 2 for axis in range(3) if orientation >> axis & 1]))
    return oriented


@cache
def rotation_plane(spacing: tuple[float, float, float]) -> tuple[int, int]:
    """The two axes whose spacings are closest, the axial plane of most CT; a tie goes to the last two."""
    pairs = [(1, 2), (0, 1), (0, 2)]
    return min(pairs, key=lambda pair: abs(np.log(spacing[pair[0]] / spacing[pair[1]])))
