"""Plans made from existing ones: with fine-tuning settings, or other patch and batch sizes and a U-Net for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

from nnunetv2_hiendmae.checks import check_count
from nnunetv2_hiendmae.nnunet.settings import BLOCK, FineTuneSettings

# nnU-Net's planners: pooling stops before an edge of the feature map falls below 4; 3D features are capped at 320.
MIN_EDGE = 4
MAX_FEATURES = 320
MAX_EDGE = 1024
# Of nnU-Net's ExperimentPlanner.plan_experiment, see takes_batch_dice.
LOWRES_SHARE, LOWRES_REDUCTION, SPACING_STEP, ANISOTROPY = 0.25, 2, 1.03, 2
UNLIMITED = 999999


def make_plans(
    source: dict[str, Any],
    plans_name: str,
    settings: dict[str, Any],
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
    batch_dice: bool = False,
) -> dict[str, Any]:
    """Plans like ``source`` under another name, with ``settings`` in the block of every 3D configuration.

    The preprocessed data stay those of the source: each configuration keeps its ``data_identifier``.
    ``patch_size`` (voxels, ``(z, y, x)``) and ``batch_size`` replace those of every 3D configuration; ``batch_dice``
    lets their Dice loss run over the batch, whatever nnU-Net's rule says.

    Raises:
        ValueError: impossible name, settings or sizes.
    """
    if "__" in plans_name or not plans_name:
        raise ValueError(f"plans_name={plans_name!r} must not be empty or contain '__' (nnU-Net splits folders there).")
    if batch_size is not None:
        check_count("batch_size", batch_size)
    configurations = {}
    for name, configuration in source["configurations"].items():
        block = {**configuration.get(BLOCK, {}), **settings}
        FineTuneSettings.from_configuration({BLOCK: block})
        if name != "2d":
            configuration = {**configuration, BLOCK: block}
            if patch_size is not None and list(patch_size) != configuration.get("patch_size", list(patch_size)):
                configuration = with_patch_size(configuration, patch_size)
            if batch_size is not None and "batch_size" in configuration:
                configuration["batch_size"] = batch_size
            if batch_dice:
                configuration["batch_dice"] = True
        configurations[name] = configuration
    return {**source, "plans_name": plans_name, "configurations": configurations}


def with_patch_size(configuration: dict[str, Any], patch_size: Sequence[int]) -> dict[str, Any]:
    """A 3D configuration of plans like ``configuration`` for patches of ``patch_size`` voxels ``(z, y, x)``.

    The number of stages, strides, kernels and features of the plan's own network follow, so that the plans train
    ``nnUNetTrainer`` too. Stages that are added repeat the blocks of the deepest one there was. ``batch_dice`` follows
    nnU-Net's rule: patches that are small against the images often lack an organ.

    Raises:
        ValueError: a size that this U-Net cannot halve evenly; names the next one that it can.
    """
    if len(patch_size) != len(configuration["spacing"]) or not all(2 * MIN_EDGE <= n <= MAX_EDGE for n in patch_size):
        raise ValueError(f"patch_size={list(patch_size)} must be three numbers of {2 * MIN_EDGE} to {MAX_EDGE}.")
    _, strides, kernels, fitting, _ = get_pool_and_conv_props(
        configuration["spacing"], list(patch_size), MIN_EDGE, UNLIMITED
    )
    if [int(s) for s in fitting] != list(patch_size):
        raise ValueError(
            f"patch_size={list(patch_size)} cannot be pooled evenly; the next that nnU-Net's U-Net can is "
            f"{[int(s) for s in fitting]}."
        )
    architecture = configuration["architecture"]
    old, stages = architecture["arch_kwargs"], len(strides)
    first = old["features_per_stage"][0]
    new = {
        **old,
        "n_stages": stages,
        "features_per_stage": [min(MAX_FEATURES, first * 2**i) for i in range(stages)],
        "strides": [list(map(int, s)) for s in strides],
        "kernel_sizes": [list(map(int, k)) for k in kernels],
        "n_conv_per_stage_decoder": stretched(old["n_conv_per_stage_decoder"], stages - 1),
    }
    for name in ("n_conv_per_stage", "n_blocks_per_stage"):  # of the plain and of the residual U-Net
        if name in old:
            new[name] = stretched(old[name], stages)
    return {
        **configuration,
        "patch_size": list(patch_size),
        "batch_dice": takes_batch_dice(
            patch_size, configuration["spacing"], configuration["median_image_size_in_voxels"]
        ),
        "architecture": {**architecture, "arch_kwargs": new},
    }


def takes_batch_dice(patch_size: Sequence[int], spacing: Sequence[float], median_shape: Sequence[float]) -> bool:
    """nnU-Net's rule for ``batch_dice`` of 3d_fullres: the Dice loss runs over the batch where a patch misses organs.

    That is, where nnU-Net would plan a 3d_lowres beside it: it coarsens the voxels (mm, finest axes first where they
    differ twofold) until a patch holds a quarter of the median image, and asks whether that halved the image's voxels.
    """
    lowres, fullres, image = (np.array(values, float) for values in (spacing, spacing, median_shape))
    voxels = image.prod()
    while np.prod(patch_size) / voxels < LOWRES_SHARE:
        finer = lowres.max() / lowres > ANISOTROPY
        lowres[finer if finer.any() else slice(None)] *= SPACING_STEP
        voxels = (fullres / lowres * image).prod()
    return bool(image.prod() / voxels >= LOWRES_REDUCTION)


def stretched(values: Sequence[int], length: int) -> list[int]:
    """The first ``length`` values, the last one repeated where there are fewer."""
    return [values[min(i, len(values) - 1)] for i in range(length)]
