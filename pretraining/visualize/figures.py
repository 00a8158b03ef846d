"""Galleries as PNG: three planes through one voxel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

from nnunetv2_hiendmae.files import atomic_file
from nnunetv2_hiendmae.intensity import Window
from pretraining.visualize.panels import ERROR_HU, FULL_COLOUR, HEAT, Gallery
from pretraining.visualize.views import PLANES, Orientation

COLUMN_INCHES = 2.6
TALLEST = 1.4
"""Height of a row over its width, at most."""


def printable(name: str) -> str:
    """A name as matplotlib's font and markup take it."""
    return name.encode("latin-1", errors="replace").decode("latin-1").replace("$", r"\$")


def draw(gallery: Gallery, orientation: Orientation, window: Window, caption: str, file: Path) -> None:
    """Write one row a plane, one column a panel."""
    ratios = []
    for plane in PLANES:
        rows, columns = orientation.slices(gallery.panels[0].volumes[0], plane).shape[1:3]
        height, width = orientation.pixel(plane)
        ratios.append(min(rows * height / (columns * width), TALLEST))
    count = len(gallery.panels)
    size = (COLUMN_INCHES * count, COLUMN_INCHES * sum(ratios) + 1.2 + 0.7 * bool(gallery.scales))
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    axes = figure.subplots(3, count, squeeze=False, height_ratios=ratios)
    for row, plane in zip(axes, PLANES, strict=True):
        index = orientation.find(gallery.voxel, gallery.shape, plane)[0]
        height, width = orientation.pixel(plane)
        for axis, panel in zip(row, gallery.panels, strict=True):
            axis.imshow(panel.image(orientation, plane, index), aspect=height / width)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(f"{plane}, slice {index}", fontsize=9)
    for axis, panel in zip(axes[0], gallery.panels, strict=True):
        axis.set_title(panel.title, fontsize=9)
    add_scales(figure, axes, gallery, window)
    figure.suptitle(printable(caption) + "\n", fontsize=10)  # the empty line keeps titles of two lines below it
    with atomic_file(file) as stream:
        figure.savefig(stream, format="png")


def add_scales(figure: Figure, axes: np.ndarray, gallery: Gallery, window: Window) -> None:
    """Colour bars below the panels."""
    if "hu" in gallery.scales:
        columns = axes[:, :-1].ravel().tolist()
        add_scale(figure, columns, Normalize(*window), "gray", f"HU (width {window[1] - window[0]:g})")
    if "error" in gallery.scales:
        add_scale(figure, axes[:, -1].tolist(), Normalize(0, ERROR_HU), HEAT, "HU")
    if "attention" in gallery.scales:
        label = f"attention / {FULL_COLOUR}th percentile of the map"
        add_scale(figure, axes.ravel().tolist(), Normalize(0, 1), HEAT, label)


def add_scale(figure: Figure, axes: list[Axes], norm: Normalize, cmap: str | Colormap, label: str) -> None:
    """One colour bar."""
    figure.colorbar(ScalarMappable(norm, cmap), ax=axes, label=label, location="bottom", shrink=0.6, aspect=40)
