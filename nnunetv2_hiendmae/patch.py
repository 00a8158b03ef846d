"""Another patch and batch size for existing plans, with the U-Net topology that nnU-Net would plan for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

# nnU-Net's planners: pooling stops before an edge of the feature map falls below 4; 3D features are capped at 320.
MIN_EDGE = 4
MAX_FEATURES = 320
MAX_EDGE = 1024
# nnU-Net's planner takes the Dice loss of 3d_fullres over the batch where there is a 3d_lowres beside it: where a patch
# holds less than a quarter of the median image, and images for which it does hold that have half the voxels or fewer.
BATCH_DICE_SHARE = 0.25 / 2
UNLIMITED = 999999


def with_patch_size(configuration: dict[str, Any], patch_size: Sequence[int]) -> dict[str, Any]:
    """A 3D configuration of plans like ``configuration`` for patches of ``patch_size`` voxels ``(z, y, x)``.

    The number of stages, strides, kernels and features of the plan's own network follow, so that the plans train
    ``nnUNetTrainer`` too. Stages that are added repeat the blocks of the deepest one there was. ``batch_dice`` follows
    nnU-Net's rule: patches that are small against the images often lack an organ.

    Raises:
        ValueError: a size that this U-Net cannot halve evenly; names the next one that it can.
    """
    if len(patch_size) != len(configuration["spacing"]) or not all(2 * MIN_EDGE <= n <= MAX_EDGE for n in patch_size):
        raise ValueError(f"-patch_size {list(patch_size)} must be three numbers of {2 * MIN_EDGE} to {MAX_EDGE}.")
    _, strides, kernels, fitting, _ = get_pool_and_conv_props(
        configuration["spacing"], list(patch_size), MIN_EDGE, UNLIMITED
    )
    if [int(s) for s in fitting] != list(patch_size):
        raise ValueError(
            f"-patch_size {list(patch_size)} cannot be pooled evenly; the next that nnU-Net's U-Net can is "
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
    share = math.prod(patch_size) / math.prod(configuration["median_image_size_in_voxels"])
    return {
        **configuration,
        "patch_size": list(patch_size),
        "batch_dice": share < BATCH_DICE_SHARE,
        "architecture": {**architecture, "arch_kwargs": new},
    }


def stretched(values: Sequence[int], length: int) -> list[int]:
    """The first ``length`` values, the last one repeated where there are fewer."""
    return [values[min(i, len(values) - 1)] for i in range(length)]
