"""Where crops come from: the interface of the two back ends, and the choice of a crop's place.

Volumes are ``(C, H, W, D)`` in nnU-Net's axis order. A back end hands out voxels as it stores them, with the affine map
onto the canonical domain (HU window scaled to [0, 1]); the map is applied on the training device, to a whole batch.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nnunetv2_hiendmae.checks import Size
from nnunetv2_hiendmae.intensity import ChannelIntensity, to_canonical

BODY_CELL = 8
"""Edge in voxels of a cell of the coarse body map."""
TISSUE_MARGIN = 0.01
"""Of the window (4 HU), above air: keeps rounding and resampling ripple from counting as tissue."""


@dataclass(frozen=True)
class DataSetInfo:
    """What a run records of a data set."""

    name: str
    num_cases: int
    spacing: tuple[float, float, float]
    """In mm, in the axis order of the volumes."""


class Corpus(Protocol):
    """Cases of one or more data sets under one numbering. Reading keeps no volume in memory."""

    datasets: tuple[DataSetInfo, ...]
    in_channels: int
    dtype: np.dtype
    """Of stored voxels."""
    origin: dict[str, Any]
    """The fields of ``RunConfig`` that say where the cases come from."""
    warnings: list[str]
    """What a user should know of the data, one sentence each."""

    def __len__(self) -> int:
        """Number of cases."""

    def name(self, case: int) -> str:
        """``DataSet/case``, for people."""

    def dataset(self, case: int) -> DataSetInfo:
        """The data set of a case."""

    def shape(self, case: int) -> Size:
        """``(H, W, D)``."""

    def body_cells(self, case: int) -> np.ndarray:
        """``(n, 3)`` integer indices of the ``BODY_CELL``³ cells that are mostly tissue."""

    def read(self, case: int, start: Size, size: Size) -> np.ndarray:
        """Crop ``(C, *size)`` of stored voxels, possibly a view of the file; beyond the volume it is air.

        Raises:
            ValueError: the file is damaged; names it.
        """

    def content_mark(self, case: int) -> int:
        """Checksum that differs where the stored case does; cheap, without reading all of it."""

    def intensity(self, case: int) -> np.ndarray:
        """``(C, 2)`` float32 scale and shift: ``canonical = clip(scale · stored + shift, 0, 1)``."""


def choose_start(corpus: Corpus, rng: np.random.Generator, case: int, size: Size, body_fraction: float) -> Size:
    """First voxel of a random crop: centred on tissue with probability ``body_fraction``, else anywhere.

    The crop is shifted to lie inside the volume; along an axis where the volume is smaller, the volume is placed at
    random inside the crop (the start is negative).
    """
    shape = corpus.shape(case)
    on_tissue = rng.random() < body_fraction
    cells = corpus.body_cells(case) if on_tissue else np.empty((0, 3))
    if len(cells):
        centre = cells[rng.integers(len(cells))].astype(int) * BODY_CELL + rng.integers(0, BODY_CELL, 3)
    else:
        centre = rng.integers(0, shape)
    start = [
        min(max(int(c) - n // 2, 0), edge - n) if edge >= n else -int(rng.integers(0, n - edge + 1))
        for c, n, edge in zip(centre, size, shape, strict=True)
    ]
    return start[0], start[1], start[2]


def find_body_cells(canonical_volume: np.ndarray, air: np.ndarray) -> np.ndarray:
    """``(n, 3)`` int16 cells of a canonical volume ``(C, H, W, D)`` that are mostly tissue (most, where none is)."""
    tissue = (canonical_volume > air.reshape(-1, 1, 1, 1) + TISSUE_MARGIN).any(0)
    padded = np.pad(tissue, [(0, -n % BODY_CELL) for n in tissue.shape])
    share = padded.reshape([e for n in padded.shape for e in (n // BODY_CELL, BODY_CELL)]).mean((1, 3, 5))
    return np.argwhere(share > min(0.5, share.max() / 2)).astype(np.int16)


def remember(cache: OrderedDict[Any, Any], key: Any, value: Any, size: int) -> None:
    """Add to a cache of a back end, dropping the oldest entry beyond ``size``."""
    cache[key] = value
    if len(cache) > size:
        cache.popitem(last=False)


def affine(channels: tuple[ChannelIntensity, ...]) -> np.ndarray:
    """``(C, 2)`` float32 scale and shift from a plan's intensities to the canonical domain."""
    return np.array([(c.scale, c.shift) for c in channels], np.float32)


def air_values(channels: tuple[ChannelIntensity, ...]) -> np.ndarray:
    """``(C,)`` float32 canonical value of air: 0 unless the plans clip into the window."""
    return np.array([c.air for c in channels], np.float32)


def canonical_volume(stored: np.ndarray, intensity: np.ndarray) -> np.ndarray:
    """Stored voxels ``(C, …)`` of a case to the canonical domain, float32; ``intensity`` as ``Corpus.intensity``."""
    scale, shift = intensity.T.reshape(2, -1, *(1,) * (stored.ndim - 1))
    return to_canonical(stored, scale, shift).astype(np.float32, copy=False)
