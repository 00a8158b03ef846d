"""One data set: raw, planned, preprocessed; and the weights that fine-tuning on it would start from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_hiendmae.folders import preprocessed_folder, read_plans
from nnunetv2_hiendmae.intensity import clip_warning, plan_intensities
from nnunetv2_hiendmae.settings import FineTuneSettings
from nnunetv2_hiendmae.weights import find_weights, load_weights
from pretraining.doctor.finding import Finding
from pretraining.preprocess import RawDataSet
from pretraining.preprocessed import default_plans

SPACING_RATIO = 1.5
"""Between plan and pre-training, above which organs have another size in tokens."""


def check_dataset(dataset: str, plans: str | None, configuration: str) -> Iterator[Finding]:
    """Raw data, plans and volumes; then the weights against the plans."""
    try:
        folder, plans_name = preprocessed_folder(dataset), plans or default_plans([dataset])
    except ValueError as error:
        mend = "look into nnUNet_raw; hiendmae_ingest makes a data set from a heap of scans"
        yield Finding("problem", str(error), mend)
        return
    try:
        raw = RawDataSet.open(dataset)
        cases, labelled = len(raw.images), raw.is_labelled
        yield Finding("ok", f"{raw.folder.name}: {cases} raw cases, {'with' if labelled else 'without'} labels")
    except ValueError as error:
        cases, labelled = 0, (folder / "gt_segmentations").is_dir()
        yield Finding("warning", f"{error} Nothing can be preprocessed.", "see nnU-Net's data set format")
    plans_file = folder / f"{plans_name}.json"
    prepare = (
        f"nnUNetv2_plan_and_preprocess -d {dataset} -pl HiEndMAEPlanner -c 3d_fullres"
        if labelled
        else f"hiendmae_plan_and_preprocess -d {dataset}"
    )
    try:
        manager = PlansManager(read_plans(plans_file, ""))
    except ValueError as error:
        yield Finding("problem", str(error).strip(), prepare)
        return
    if configuration not in manager.available_configurations:
        known = ", ".join(manager.available_configurations)
        yield Finding(
            "problem", f"{plans_file} has no configuration {configuration}; it has {known}.", "-c CONFIGURATION"
        )
        return
    plan = manager.get_configuration(configuration).configuration
    again = (
        f"nnUNetv2_preprocess -d {dataset} -plans_name {plans_name} -c {configuration}"
        if labelled
        else f"hiendmae_plan_and_preprocess -d {dataset} -p {plans_name}"
    )
    yield from check_volumes(folder / plan["data_identifier"], cases, again)
    if labelled:
        yield from check_weights(dataset, manager.plans, plan, f"{plans_name}, {configuration}")


def check_volumes(folder: Path, cases: int, prepare: str) -> Iterator[Finding]:
    """Whether every raw case was preprocessed."""
    done = len(nnUNetDatasetBlosc2.get_identifiers(str(folder))) if folder.is_dir() else 0
    if not done:
        yield Finding("problem", f"{folder} holds no preprocessed volumes.", prepare)
    elif done < cases:
        yield Finding("warning", f"{folder}: {done} of {cases} cases are preprocessed.", prepare)
    else:
        yield Finding("ok", f"{folder}: {done} cases preprocessed")


def check_weights(dataset: str, plans: dict[str, Any], plan: dict[str, Any], name: str) -> Iterator[Finding]:
    """The weights that a fine-tuning would take: where from, made of what, and whether the plans suit them."""
    try:
        settings = FineTuneSettings.from_configuration(plan)
        path, reason = find_weights(settings.weights)
        weights = load_weights(path)
    except ValueError as error:
        mend = "hiendmae_pretrain -d DATASET, or train with -tr nnUNetTrainerHiEndMAE_scratch"
        yield Finding("problem", str(error).split(". ")[0].rstrip(".") + ".", mend)
        return
    data = (
        ", ".join(f"{d['name']} ({d['cases']} cases)" for d in weights.header.get("datasets", [])) or "data not stated"
    )
    yield Finding("ok", f"weights: {path} ({reason}), sha256 {weights.sha256[:12]}…, pre-trained on {data}")
    try:
        settings.resolved(weights.architecture, weights.window_hu)
    except ValueError as error:
        yield Finding("problem", str(error), f"hiendmae_plan -d {dataset} writes plans without it")
    yield from compare_spacing(dataset, plan["spacing"], weights.header.get("spacing") or {})
    cut = clip_warning(plan_intensities(plans, plan, weights.window_hu), weights.window_hu, name)
    if cut:
        yield Finding("warning", cut, f"nnUNetv2_plan_and_preprocess -d {dataset} -pl HiEndMAEPlanner -c 3d_fullres")
    else:
        yield Finding("ok", f"HU window {weights.window_hu[0]:g}…{weights.window_hu[1]:g} is inside what {name} keep")
    patch, token = plan["patch_size"], weights.architecture.patch_size
    lost = math.prod(-(-n // t) * t / n for n, t in zip(patch, token, strict=True)) - 1
    size = " × ".join(map(str, patch))
    padded = f"patch {size} is padded to whole tokens of {' × '.join(map(str, token))}: {lost:.0%} more voxels"
    good = " ".join(str(max(round(n / t), 1) * t) for n, t in zip(patch, token, strict=True))
    mend = f"hiendmae_plan -d {dataset} -patch_size {good}" if lost > 0.2 else ""
    yield Finding("warning" if lost > 0.2 else "ok", padded, mend)


def compare_spacing(target: str, plan: list[float], trained: dict[str, list[float]]) -> Iterator[Finding]:
    """Voxel sizes in fine-tuning and in pre-training."""
    here = " × ".join(f"{mm:.3g}" for mm in plan)
    for dataset, spacing in trained.items():
        there = " × ".join(f"{mm:.3g}" for mm in spacing)
        ratio = max(max(a / b, b / a) for a, b in zip(sorted(plan), sorted(spacing), strict=True))
        if ratio > SPACING_RATIO:
            yield Finding(
                "warning",
                f"plans have {here} mm, pre-training had {there} ({dataset}): the encoder knows organs of another size",
                f"nnUNetv2_plan_and_preprocess -d {target} -pl HiEndMAEPlanner -c 3d_fullres -overwrite_target_spacing "
                + " ".join(f"{mm:g}" for mm in spacing),
            )
        else:
            yield Finding("ok", f"spacing {here} mm, pre-trained at {there} mm ({dataset})")
