"""Boxes of a volume: where a crop lies, and its voxels."""

from __future__ import annotations

import numpy as np

from nnunetv2_hiendmae.checks import Size


def read_padded(volume: np.ndarray, start: Size, size: Size, air: np.ndarray) -> np.ndarray:
    """Crop ``(C, *size)`` of an array, or of what slices like one, filled with ``air`` ``(C,)`` beyond its edges."""
    low = [max(s, 0) for s in start]
    high = [min(s + n, edge) for s, n, edge in zip(start, size, volume.shape[1:], strict=True)]
    source = volume[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    if source.shape[1:] == size:
        return source
    crop = np.empty((volume.shape[0], *size), volume.dtype)
    crop[:] = air.reshape(-1, 1, 1, 1)
    inside = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
    crop[(slice(None), *inside)] = source
    return crop


def crop_around(voxel: Size, shape: tuple[int, ...], size: Size) -> Size:
    """First voxel of the crop with a voxel in its middle, moved into the volume where the volume is large enough."""
    h, w, d = (
        min(max(v - n // 2, 0), edge - n) if edge >= n else -((n - edge) // 2)
        for v, n, edge in zip(voxel, size, shape, strict=True)
    )
    return h, w, d
