"""The README's picture: ``python anatomy.py RUN CT LABELS anatomy.png``.

``RUN`` is a pre-training run's folder. ``LABELS`` lie on the voxels of ``CT``; both have to have the run's spacing.
The picture that is there was made with a run on 116 of the CT of Dataset500, other patients than ``CT``::

    hiendmae_plan_and_preprocess -d 500 -spacing 3 3 3 -p HiEndMAE3mmPlans
    hiendmae_pack -d 500 -p HiEndMAE3mmPlans
    hiendmae_pretrain -packed HiEndMAE_packed_500 -preset tiny -device cpu -crop_size 24 24 24 -vit_patch_size 4 4 4
        -batch_size 8 -steps 1200 -seed 55 -num_workers 1
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import SimpleITK as sitk
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from nnunetv2_hiendmae.command import CommandParser
from pretraining.visualize.cases import read_ct
from pretraining.visualize.panels import gray, hide
from pretraining.visualize.source import open_source
from pretraining.visualize.tiles import reconstruct_volume
from pretraining.visualize.views import Orientation

PLANES = ("coronal", "axial")
OPACITY = 0.6


def organs(canonical: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels in colours over a slice ``(rows, columns)``; RGB uint8."""
    colours = 255 * colormaps["hsv"](labels * 0.618 % 1)[..., :3]  # neighbouring numbers far apart
    share = OPACITY * (labels > 0)[..., None]
    return (gray(canonical) * (1 - share) + colours * share).astype(np.uint8)


def draw(run: Path, ct: Path, labels: Path, out: Path) -> None:
    source = open_source(run, torch.device("cpu"))
    if source.model is None:
        raise ValueError(f"{run} holds no decoder; name the folder of a run.")
    spacing = sitk.ReadImage(str(ct)).GetSpacing()[::-1]
    case = read_ct(ct, spacing, source.window_hu)
    organ = sitk.GetArrayFromImage(sitk.ReadImage(str(labels)))
    rebuilt = reconstruct_volume(source.model, case.volume, seed=0)
    orientation, voxel = Orientation.of(case.frame), case.voxel(None)

    figure = Figure(figsize=(10, 4.7), layout="constrained", dpi=85)
    axes = figure.subplots(2, 4)
    for row, plane in zip(axes, PLANES, strict=True):
        index = orientation.find(voxel, case.volume.shape, plane)[0]
        image, masked, made, organ_here = (
            orientation.slices(v, plane)[index] for v in (case.volume, rebuilt.masked, rebuilt.rebuilt, organ)
        )
        panels = (gray(image), hide(image, masked), gray(made), organs(image, organ_here))
        height, width = orientation.pixel(plane)
        for axis, panel in zip(row, panels, strict=True):
            axis.imshow(panel, aspect=height / width)
            axis.set_axis_off()
    for axis, title in zip(axes[0], ("CT", "what the encoder sees", "reconstruction", "organs (given)"), strict=True):
        axis.set_title(title)
    with TemporaryFile() as whole:
        figure.savefig(whole, format="png")
        Image.open(whole).convert("RGB").quantize(128).save(out, optimize=True)


if __name__ == "__main__":
    p = CommandParser(description=__doc__)
    for name in ("run", "ct", "labels", "out"):
        p.add_argument(name, type=Path)
    args = p.parse_args()
    try:
        draw(args.run, args.ct, args.labels, args.out)
    except ValueError as error:
        p.error(str(error))
