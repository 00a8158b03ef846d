"""Panels: volumes painted slice by slice, the same for pictures and page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from PIL import Image

from pretraining.visualize.attention import AttentionMap
from pretraining.visualize.cases import Case
from pretraining.visualize.features import FeatureColours
from pretraining.visualize.tiles import Reconstruction, enlarge
from pretraining.visualize.views import Orientation

HIDDEN = (38, 70, 120)
"""Blue: no CT has it."""
MARK = (0, 255, 255)
ERROR_HU = 200.0
"""White on the error scale."""
HEAT = colormaps["inferno"]
OVERLAY = 0.75
"""Opacity of the strongest attention, and of feature colours."""
FULL_COLOUR = 99
"""Percentile of an attention map's weights at which the colour is strongest."""
CROP_PIXELS = 240
"""Crops are enlarged to about this many pixels."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of every slice."""

    title: str
    volumes: tuple[np.ndarray, ...]
    """Each ``(H, W, D, …)``."""
    paint: Callable[..., np.ndarray]
    """Slices of the volumes to RGB ``(rows, columns, 3)`` uint8."""

    def image(self, orientation: Orientation, plane: str, index: int) -> np.ndarray:
        """A slice, ``(rows, columns, 3)`` uint8."""
        return self.paint(*(orientation.slices(volume, plane)[index] for volume in self.volumes))


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Panels that share a slider."""

    key: str
    """Names the files."""
    title: str
    text: str
    panels: list[Panel]
    voxel: tuple[int, int, int]
    """``(h, w, d)`` in the panels' volumes, through which the first slices go."""
    scales: tuple[str, ...] = ()
    """Of ``SCALES``: legends."""
    columns: int = 4
    """Panels in a row of the page, where there is room."""

    @property
    def shape(self) -> tuple[int, int, int]:
        h, w, d = self.panels[0].volumes[0].shape[:3]
        return h, w, d


def gray(canonical: np.ndarray) -> np.ndarray:
    """``(rows, columns)`` in [0, 1] to RGB uint8."""
    return np.repeat(np.rint(np.clip(canonical, 0, 1) * 255).astype(np.uint8)[..., None], 3, -1)


def hide(canonical: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """What the encoder saw; hidden patches are blue."""
    return np.where(masked[..., None], np.array(HIDDEN, np.uint8), gray(canonical))


def heat(share: np.ndarray) -> np.ndarray:
    """``(rows, columns)`` in [0, 1] to RGB uint8."""
    return HEAT(np.clip(share, 0, 1), bytes=True)[..., :3]


def blend(under: np.ndarray, over: np.ndarray, opacity: np.ndarray | float) -> np.ndarray:
    """RGB uint8 over RGB uint8."""
    return np.rint(under * (1 - opacity) + over * opacity).astype(np.uint8)


def outline(rgb: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The border of a region ``(rows, columns)``, one pixel wide, in cyan; slices without it stay as they are."""
    inner = region.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            inner &= np.roll(region, step, axis)
    return np.where((region & ~inner)[..., None], np.array(MARK, np.uint8), rgb)


def enlarged(image: np.ndarray, factor: int, smooth: bool) -> np.ndarray:
    """A slice with ``factor``² pixels for one; smooth for CT, in blocks for tokens."""
    if not smooth:
        return image.repeat(factor, 0).repeat(factor, 1)
    return np.asarray(Image.fromarray(image).resize((image.shape[1] * factor, image.shape[0] * factor), 2))


def reconstruction_panels(case: Case, result: Reconstruction) -> list[Panel]:
    """Original, masked, reconstruction, error."""
    width = case.window_hu[1] - case.window_hu[0]
    error = np.abs(result.rebuilt - case.volume) * width / ERROR_HU
    return [
        Panel(title="original", volumes=(case.volume,), paint=gray),
        Panel(title="masked: what the encoder sees", volumes=(case.volume, result.masked), paint=hide),
        Panel(title="reconstruction", volumes=(result.rebuilt,), paint=gray),
        Panel(title="absolute error", volumes=(error,), paint=heat),
    ]


def attention_panels(
    crop: np.ndarray, query: np.ndarray, named: list[tuple[str, AttentionMap]], patch: tuple[int, int, int]
) -> list[Panel]:
    """The crop ``(H, W, D)`` with the query patch outlined, then a map over it each; ``query`` is the patch, bool."""
    factor = max(1, round(CROP_PIXELS / max(crop.shape)))

    def under(ct: np.ndarray) -> np.ndarray:
        return enlarged(gray(ct), factor, smooth=True)

    def marked(ct: np.ndarray, region: np.ndarray) -> np.ndarray:
        return outline(under(ct), enlarged(region, factor, smooth=False))

    def overlaid(ct: np.ndarray, region: np.ndarray, share: np.ndarray) -> np.ndarray:
        over = enlarged(np.nan_to_num(share), factor, smooth=False)
        image = blend(under(ct), heat(over), OVERLAY * np.sqrt(over)[..., None])
        return outline(image, enlarged(region, factor, smooth=False))

    panels = [Panel(title="crop and query patch", volumes=(crop, query), paint=marked)]
    for name, attention in named:
        strongest = float(np.nanmax(attention.weights))
        title = f"{name}\nmax {strongest * attention.num_keys:.1f} × uniform"
        if attention.to_others >= 0.005:
            title += f", class or register tokens {attention.to_others:.0%}"
        full = max(float(np.nanpercentile(attention.weights, FULL_COLOUR)), 1e-12)
        share = enlarge(np.clip(attention.weights / full, 0, 1), patch).astype(np.float32)
        panels.append(Panel(title=title, volumes=(crop, query, share), paint=overlaid))
    return panels


def feature_panels(case: Case, named: list[tuple[str, FeatureColours]]) -> list[Panel]:
    """The CT, then the colours of a layer each."""

    def overlaid(ct: np.ndarray, rgb: np.ndarray) -> np.ndarray:
        return np.where(rgb.any(-1, keepdims=True), blend(gray(ct), rgb, OVERLAY), gray(ct))

    panels = [Panel(title="CT", volumes=(case.volume,), paint=gray)]
    for name, found in named:
        shares = " ".join(f"{share:.0%}" for share in found.explained)
        title = f"{name}\nplace {found.place:.0%}; rest {shares}"
        panels.append(Panel(title=title, volumes=(case.volume, found.rgb), paint=overlaid))
    return panels
