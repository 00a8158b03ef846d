"""Is it a CT, in HU, and new? Thresholds are meant to refuse what is surely wrong, not what is merely unusual."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretraining.prepare.geometry import Refused

LOWEST, HIGHEST = -4096, 8191
"""HU range of the histogram; its ends hold what lies beyond."""
NEIGHBOURS = 5
"""Bins on each side that a bin is compared with."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Thresholds; documented in docs/how-to/your-own-scans.md."""

    min_slices: int = 8
    """Along every axis."""
    min_extent_mm: float = 30.0
    """Along every axis."""
    min_spacing_mm: float = 0.1
    max_spacing_mm: float = 12.0
    soft_tissue_hu: tuple[int, int] = (-200, 250)
    min_soft_tissue: float = 0.01
    """Share of the voxels, padding apart, within ``soft_tissue_hu``."""
    fat_or_air_hu: int = -30
    min_fat_or_air: float = 0.001
    """Share of the voxels below ``fat_or_air_hu``: fat, lungs, gas, around the body, or padding."""
    max_hu: float = 32767.0
    padding_hu: int = -600
    """A value at or below that stands far out in the histogram is padding …"""
    clipped_air_hu: int = -1000
    """… but for this one, to which real air is clipped."""
    impossible_hu: int = -1100
    """Nothing real is below."""
    offset: int = 1024
    """A rescale intercept that was forgotten, or applied twice, shifts everything by about this."""


def check_voxels(voxels: np.ndarray, spacing: Sequence[float], gate: Gate) -> None:
    """``Refused`` with the reason, for voxels that cannot be HU of a CT.

    Padding (one value at or below ``padding_hu`` that fills much of the volume) has no say in it.

    Args:
        voxels: ``(z, y, x)``, or any order of the axes.
        spacing: in mm, in the same order.
        gate: thresholds.
    """
    if not np.isfinite(voxels).all():
        raise Refused("NaN or infinite voxels")
    low, high = float(voxels.min()), float(voxels.max())
    if low == high:
        raise Refused(f"constant volume (every voxel is {low:g})")
    for size, mm in zip(voxels.shape, spacing, strict=True):
        if size < gate.min_slices:
            raise Refused(f"{size} voxels along one axis, fewer than {gate.min_slices}")
        if not gate.min_spacing_mm <= mm <= gate.max_spacing_mm:
            raise Refused(f"spacing {mm:g} mm is outside {gate.min_spacing_mm:g}…{gate.max_spacing_mm:g} mm")
        if size * mm < gate.min_extent_mm:
            raise Refused(f"{size * mm:.0f} mm along one axis, less than {gate.min_extent_mm:g} mm")
    if high > gate.max_hu or low < -gate.max_hu - 1:
        raise Refused(f"values from {low:g} to {high:g}: not HU")
    counts = histogram(voxels)
    padding = find_padding(counts, gate)
    tissue = np.where(padding, 0, counts)
    used = np.flatnonzero(tissue)
    if not len(used):
        raise Refused(f"values from {low:g} to {high:g}, and nothing but padding")
    range_text = f"values from {used[0] + LOWEST} to {used[-1] + LOWEST}" + " beside padding" * bool(padding.any())
    if used[-1] - used[0] <= 20:
        raise Refused(f"{range_text}: already normalised, not HU")
    if used[0] + LOWEST >= 0 and used[-1] + LOWEST <= 255:
        raise Refused(f"{range_text}: an 8-bit windowed image, not HU")
    check_offset(counts, tissue, gate, range_text)


def check_offset(counts: np.ndarray, tissue: np.ndarray, gate: Gate, range_text: str) -> None:
    """``Refused`` where soft tissue is not where it is in HU. Histograms of all voxels, and of those but padding."""
    share = lambda a, b: float(tissue[a - LOWEST : b - LOWEST + 1].sum() / tissue.sum())  # noqa: E731
    low, high = gate.soft_tissue_hu
    soft = share(low, high)
    above, below = share(low + gate.offset, high + gate.offset), share(low - gate.offset, high - gate.offset)
    # Of 191 real CT, each has 8 times more fat and air than bone this dense; without the intercept none has any.
    negative = share(gate.impossible_hu, gate.fat_or_air_hu)
    if negative < above / 10 and above > max(gate.min_soft_tissue, soft / 20):
        raise Refused(f"{range_text} look shifted by +{gate.offset}: rescale intercept not applied")
    impossible = counts[: gate.impossible_hu - LOWEST].sum() / counts.sum()
    no_peak = soft < 4 * share(2 * low - high, low)  # of those CT, none is below 8, and none above 2.2 when shifted
    if impossible > gate.min_fat_or_air and no_peak and below > 5 * soft:
        raise Refused(f"{range_text} look shifted by -{gate.offset}: rescale intercept applied twice")
    if soft < gate.min_soft_tissue:
        raise Refused(f"{soft:.2%} of the voxels are soft tissue {gate.soft_tissue_hu} HU, fewer than 1 %")
    if counts[: gate.fat_or_air_hu - LOWEST].sum() < gate.min_fat_or_air * counts.sum():
        raise Refused(
            f"no fat or air: fewer than {gate.min_fat_or_air:.1%} of the voxels are below {gate.fat_or_air_hu} HU"
        )


def histogram(voxels: np.ndarray) -> np.ndarray:
    """Counts of the rounded values ``LOWEST`` to ``HIGHEST``."""
    whole = np.clip(np.rint(voxels), LOWEST, HIGHEST).astype(np.int32) - LOWEST
    return np.bincount(whole.ravel(), minlength=HIGHEST - LOWEST + 1)


def find_padding(counts: np.ndarray, gate: Gate) -> np.ndarray:
    """Mask of the bins at or below ``padding_hu`` that hold ten times what those around them do."""
    kernel = np.ones(2 * NEIGHBOURS + 1)
    kernel[NEIGHBOURS] = 0
    around = np.convolve(counts, kernel / kernel.sum(), "same")
    stands_out = (counts > 10 * around) & (counts > 0.001 * counts.sum())
    stands_out[gate.padding_hu - LOWEST + 1 :] = False
    stands_out[gate.clipped_air_hu - LOWEST] = False
    return stands_out


def content_hash(voxels: np.ndarray) -> str:
    """sha256 of the voxels ``(z, y, x)`` as rounded HU and their shape: the same in every file format."""
    whole = np.clip(np.rint(np.nan_to_num(voxels)), -32768, 32767).astype("<i2")
    return hashlib.sha256(f"{whole.shape}".encode() + np.ascontiguousarray(whole).tobytes()).hexdigest()
