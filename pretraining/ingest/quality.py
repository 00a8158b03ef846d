"""Is it a CT, in HU, and new? Thresholds are meant to refuse what is surely wrong, not what is merely unusual."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from pretraining.ingest.read import Refused


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Thresholds; documented in docs/how-to/your-own-scans.md."""

    min_slices: int = 8
    """Along every axis."""
    min_extent_mm: float = 30.0
    """Along every axis."""
    min_spacing_mm: float = 0.1
    max_spacing_mm: float = 12.0
    soft_tissue_hu: tuple[float, float] = (-200.0, 250.0)
    min_soft_tissue: float = 0.01
    """Share of voxels within ``soft_tissue_hu``."""
    air_hu: float = -600.0
    min_air: float = 0.001
    """Share of voxels below ``air_hu``: in lungs, around the body, or padding."""
    max_hu: float = 32767.0
    offset: float = 1024.0
    """A forgotten rescale intercept shifts everything up by about this."""


def check_voxels(image: sitk.Image, gate: Gate) -> None:
    """``Refused`` with the reason, for voxels that cannot be HU of a CT."""
    voxels = sitk.GetArrayViewFromImage(image)
    if not np.isfinite(voxels).all():
        raise Refused("NaN or infinite voxels")
    low, high = float(voxels.min()), float(voxels.max())
    if low == high:
        raise Refused(f"constant volume (every voxel is {low:g})")
    for size, spacing in zip(image.GetSize(), image.GetSpacing(), strict=True):
        if size < gate.min_slices:
            raise Refused(f"{size} voxels along one axis, fewer than {gate.min_slices}")
        if not gate.min_spacing_mm <= spacing <= gate.max_spacing_mm:
            raise Refused(f"spacing {spacing:g} mm is outside {gate.min_spacing_mm:g}…{gate.max_spacing_mm:g} mm")
        if size * spacing < gate.min_extent_mm:
            raise Refused(f"{size * spacing:.0f} mm along one axis, less than {gate.min_extent_mm:g} mm")
    if high - low <= 20:
        raise Refused(f"values from {low:g} to {high:g}: already normalised, not HU")
    if low >= 0 and high <= 255:
        raise Refused(f"values from {low:g} to {high:g}: an 8-bit windowed image, not HU")
    if high > gate.max_hu or low < -gate.max_hu - 1:
        raise Refused(f"values from {low:g} to {high:g}: not HU")
    share = lambda a, b: float(((voxels >= a) & (voxels <= b)).mean())  # noqa: E731
    soft = share(*gate.soft_tissue_hu)
    shifted = share(*(edge + gate.offset for edge in gate.soft_tissue_hu))
    if low >= -50 and shifted > max(soft, gate.min_soft_tissue):
        raise Refused(
            f"values from {low:g} to {high:g} look shifted by +{gate.offset:g}: rescale intercept not applied"
        )
    if soft < gate.min_soft_tissue:
        raise Refused(f"{soft:.2%} of the voxels are soft tissue {gate.soft_tissue_hu} HU, fewer than 1 %")
    if share(-np.inf, gate.air_hu) < gate.min_air:
        raise Refused(f"no air: fewer than {gate.min_air:.1%} of the voxels are below {gate.air_hu:g} HU")


def content_hash(voxels: np.ndarray) -> str:
    """sha256 of the voxels ``(z, y, x)`` as rounded HU and their shape: the same in every file format."""
    whole = np.clip(np.rint(np.nan_to_num(voxels)), -32768, 32767).astype("<i2")
    return hashlib.sha256(f"{whole.shape}".encode() + np.ascontiguousarray(whole).tobytes()).hexdigest()
