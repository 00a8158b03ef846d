"""Galleries as PNG: three planes through one voxel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from nnunetv2_hiendmae.intensity import Window
from nnunetv2_hiendmae.weights import atomic_file
from pretraining.visualize.panels import ERROR_HU, HEAT, Gallery
from pretraining.visualize.views import PLANES, Orientation

COLUMN_INCHES = 2.6
TALLEST = 1.4
"""Height of a row over its width, at most."""


def printable(name: str) -> str:
    """A name as matplotlib's font and markup take it."""
    return name.encode("ascii", errors="replace").decode().replace("$", r"\$")


def draw(gallery: Gallery, orientation: Orientation, window: Window, caption: str, file: Path) -> None:
    """Write one row a plane, one column a panel."""
    heights = []
    for plane in PLANES:
        rows, columns = orientation.slices(gallery.panels[0].volumes[0], plane).shape[1:3]
        mm = orientation.pixel(plane)
        heights.append(min(rows * mm[0] / (columns * mm[1]), TALLEST))
    count = len(gallery.panels)
    figure = Figure(
        figsize=(COLUMN_INCHES * count + 0.8, COLUMN_INCHES * sum(heights) + 1.6), layout="constrained", dpi=110
    )
    axes = figure.subplots(3, count, squeeze=False, height_ratios=heights)
    for row, plane in zip(axes, PLANES, strict=True):
        index = orientation.find(gallery.voxel, gallery.shape, plane)[0]
        mm = orientation.pixel(plane)
        for axis, panel in zip(row, gallery.panels, strict=True):
            image = panel.image(orientation, plane, index)
            axis.imshow(image, aspect=mm[0] / mm[1])
            axis.set_xticks([])
            axis.set_yticks([])
            if plane == PLANES[0]:
                axis.set_title(printable(panel.title), fontsize=9)
        row[0].set_ylabel(f"{plane}, slice {index}", fontsize=9)
    add_scales(figure, axes, gallery, window)
    figure.suptitle(printable(caption), fontsize=10)
    with atomic_file(file) as stream:
        figure.savefig(stream, format="png")


def add_scales(figure: Figure, axes: np.ndarray, gallery: Gallery, window: Window) -> None:
    """Colour bars beside the panels."""
    scales = {
        "hu": (Normalize(*window), "gray", "HU"),
        "error": (Normalize(0, ERROR_HU), HEAT, "absolute error, HU"),
        "attention": (Normalize(0, 1), HEAT, "attention / its maximum"),
    }
    for name in gallery.scales:
        norm, cmap, label = scales[name]
        figure.colorbar(ScalarMappable(norm, cmap), ax=axes[:, -1].tolist(), label=label, shrink=0.7, aspect=30)
