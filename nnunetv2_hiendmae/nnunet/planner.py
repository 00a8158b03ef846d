"""Experiment planner whose plans match the published pre-training."""

from __future__ import annotations

import os
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import (
    channel_name_to_normalization_mapping,
)

from nnunetv2_hiendmae.channels import Evidence, channel_names, hu_evidence, names_ct, names_other
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW, channel_lines, plan_intensities
from nnunetv2_hiendmae.nnunet.plans import takes_batch_dice

PATCH_SIZE = (96, 96, 96)
SPACING_MM = 1.5
UNLIMITED_GB = 1e6
LOADERS = "nnUNet_n_proc_DA"


CT, NO_CT = "CT", "zscore"
"""Names for which nnU-Net plans its CT normalisation, and its z-score."""


def name_by_values(name: str, statistics: dict[str, Any]) -> str:
    """The channel's name, or CT or NO_CT where its intensity ``statistics`` prove that wrong.

    A name that asks for another of nnU-Net's schemes (``zscore``, ``nonorm`` …) or says another modality is respected.
    """
    evidence, is_ct = hu_evidence(statistics), name.casefold() == "ct"
    if is_ct and evidence is Evidence.NO:
        return NO_CT
    if is_ct or name.casefold() in channel_name_to_normalization_mapping or names_other(name):
        return name
    return CT if evidence is Evidence.SURE or (names_ct(name) and evidence is not Evidence.NO) else name


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
    dataset_json: dict[str, Any]

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
        """nnU-Net goes by the channels' names alone; here their values have a say."""
        described = self.dataset_json
        self.dataset_json = {**described, "channel_names": {str(c): n for c, n in enumerate(self.names_by_values())}}
        try:
            schemes, use_mask = super().determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        finally:
            self.dataset_json = described
        return ["HUWindowNormalization" if s == "CTNormalization" else s for s in schemes], use_mask

    def names_by_values(self) -> list[str]:
        """Names of the channels for nnU-Net to plan by."""
        statistics = self.dataset_fingerprint["foreground_intensity_properties_per_channel"]
        return [name_by_values(name, statistics[str(c)]) for c, name in enumerate(channel_names(self.dataset_json))]

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

    @staticmethod
    def static_estimate_VRAM_usage(*args: Any, **kwargs: Any) -> int:
        """As nnU-Net's, which computes in ``nnUNet_n_proc_DA`` threads and fails at 0, which training accepts."""
        value = os.environ.get(LOADERS)
        if value is None or int(value) > 0:
            return ExperimentPlanner.static_estimate_VRAM_usage(*args, **kwargs)
        os.environ[LOADERS] = "1"
        try:
            return ExperimentPlanner.static_estimate_VRAM_usage(*args, **kwargs)
        finally:
            os.environ[LOADERS] = value

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Write 3d_fullres only, with the window beside each CT channel's intensity properties.

        Raises:
            ValueError: the data set is 2D.
        """
        if "3d_fullres" not in plans["configurations"]:
            raise ValueError(f"{self.dataset_name} is two-dimensional; HiEndMAEPlanner plans for a 3D network only.")
        plan = plans["configurations"]["3d_fullres"]
        plans["configurations"] = {"3d_fullres": plan}
        # nnU-Net decides this by whether it planned a 3d_lowres, which is never asked for here.
        plan["batch_dice"] = takes_batch_dice(plan["patch_size"], plan["spacing"], plan["median_image_size_in_voxels"])
        schemes = plan["normalization_schemes"]
        for channel, scheme in enumerate(schemes):
            if scheme == "HUWindowNormalization":
                properties = plans["foreground_intensity_properties_per_channel"][str(channel)]
                properties["window_lower"], properties["window_upper"] = DEFAULT_WINDOW
        names = channel_names(self.dataset_json)
        for c, (name, planned) in enumerate(zip(names, self.names_by_values(), strict=True)):
            if planned != name:
                what = "CT" if planned == CT else "no CT"
                print(f"channel {c} ({name}): its values are those of {what}, and it is planned as such.")
        channels = plan_intensities(plans, plans["configurations"]["3d_fullres"], DEFAULT_WINDOW, names)
        print(*channel_lines(channels, names), sep="\n")
        super().save_plans(plans)
