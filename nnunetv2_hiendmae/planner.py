"""Experiment planner whose plans match the published pre-training."""

from __future__ import annotations

from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW

PATCH_SIZE = (96, 96, 96)
SPACING_MM = 1.5
UNLIMITED_GB = 1e6


class HiEndMAEPlanner(ExperimentPlanner):
    """1.5 mm isotropic, 96³ patches, CT channels clipped to the HU window -175…250 and scaled to [0, 1].

    ``nnUNetv2_plan_and_preprocess -d 17 -pl HiEndMAEPlanner`` writes ``HiEndMAEPlans`` with 3d_fullres only: the
    network is 3D, and 96³ voxels of 1.5 mm cover 144 mm, so a low-resolution stage is not part of the method.
    The batch size is nnU-Net's rule for its U-Net at this patch size: what ``-gpu_memory_target`` allows, at most 5 %
    of the data set's voxels, at least 2; a target too small for two patches shrinks neither. The rule does not know
    the ViT: edit ``batch_size`` in the plans if it does not fit. ``-overwrite_target_spacing`` is respected (an axis
    more than four times as coarse as the others gets fewer than 96 voxels). The plans train ``nnUNetTrainer`` as
    well, for comparison on the same data.
    """

    UNet_vram_target_GB: float

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "HiEndMAEPlans",
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing or (SPACING_MM,) * 3,
            suppress_transpose,
        )
        self.lowres_creation_threshold = 0.0  # never a low-resolution stage

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self) -> tuple[list[str], list[bool]]:
        schemes, use_mask = super().determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        return ["HUWindowNormalization" if s == "CTNormalization" else s for s in schemes], use_mask

    def get_plans_for_configuration(
        self,
        spacing: Any,
        median_shape: Any,
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[str, Any],
    ) -> dict[str, Any]:
        # nnU-Net never plans a patch larger than the median image, so an image of 96³ yields a U-Net for 96³.
        shape = PATCH_SIZE if len(spacing) == 3 else median_shape
        arguments = (spacing, shape, data_identifier, approximate_n_voxels_dataset, _cache)
        plan = super().get_plans_for_configuration(*arguments)
        if len(spacing) == 3 and tuple(plan["patch_size"]) != PATCH_SIZE:
            memory, self.UNet_vram_target_GB = self.UNet_vram_target_GB, UNLIMITED_GB
            roomy = super().get_plans_for_configuration(*arguments)
            self.UNet_vram_target_GB = memory
            if tuple(roomy["patch_size"]) != tuple(plan["patch_size"]):  # it was the memory target that shrank it
                plan = {**roomy, "batch_size": self.UNet_min_batch_size}
        plan["median_image_size_in_voxels"] = median_shape
        return plan

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Write 3d_fullres only, with the window beside each CT channel's intensity properties.

        Raises:
            ValueError: the data set is 2D.
        """
        if "3d_fullres" not in plans["configurations"]:
            raise ValueError(f"{self.dataset_name} is two-dimensional; HiEndMAEPlanner plans for a 3D network only.")
        plans["configurations"] = {"3d_fullres": plans["configurations"]["3d_fullres"]}
        schemes = plans["configurations"]["3d_fullres"]["normalization_schemes"]
        for channel, scheme in enumerate(schemes):
            if scheme == "HUWindowNormalization":
                properties = plans["foreground_intensity_properties_per_channel"][str(channel)]
                properties["window_lower"], properties["window_upper"] = DEFAULT_WINDOW
        super().save_plans(plans)
