"""One data set: raw, planned, preprocessed; and the weights that fine-tuning on it would start from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_hiendmae.benchmark.overlap import case_fingerprints, in_pretraining, present, state_text
from nnunetv2_hiendmae.channels import channel_names
from nnunetv2_hiendmae.files import preprocessed_folder, read_json, read_plans
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW, channel_lines, clip_warning, plan_intensities
from nnunetv2_hiendmae.nnunet.settings import FineTuneSettings
from nnunetv2_hiendmae.patients import patients_of
from nnunetv2_hiendmae.weights.file import Weights, load_weights
from nnunetv2_hiendmae.weights.find import find_weights
from pretraining.data.b2nd import default_plans
from pretraining.doctor.finding import Finding
from pretraining.prepare.geometry import Refused
from pretraining.prepare.raw import RawDataSet
from pretraining.prepare.read import check_file

SHOWN = 5
"""Files named of those that are wrong."""
SPACING_RATIO = 1.5
"""Between plan and pre-training, above which organs have another size in tokens."""


def check_dataset(dataset: str, plans: str | None, configuration: str) -> Iterator[Finding]:
    """Raw data, plans and volumes; then the weights against the plans."""
    try:
        folder, plans_name = preprocessed_folder(dataset), plans or default_plans([dataset])
    except ValueError as error:
        remedy = "look into nnUNet_raw; hiendmae_ingest makes a data set from a heap of scans"
        yield Finding("problem", str(error), remedy)
        return
    try:
        raw = RawDataSet.open(dataset)
        cases, labelled = len(raw.images), raw.is_labelled
        yield from check_raw(raw)
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
    yield from check_channels(folder, manager.plans, plan, labelled)
    if labelled:
        yield from check_weights(dataset, manager.plans, plan, configuration)


def check_raw(raw: RawDataSet) -> Iterator[Finding]:
    """Channels and labels that are missing, and headers that no command would accept."""
    name, cases = raw.folder.name, len(raw.images) + len(raw.incomplete)
    wrong = [f"{failure.file}: {failure.reason}" for failure in raw.incomplete]
    for files in raw.images.values():
        for file in files:
            try:
                size = check_file(file, whole=False)
            except Refused as refusal:
                wrong.append(f"{file}: {refusal}")
                continue
            if size is not None and min(size) < 2:
                wrong.append(f"{file}: a single slice ({' × '.join(map(str, size))} voxels): the network is 3D")
    if wrong:
        what = f"{name}: {len(wrong)} images of {cases} raw cases cannot be used: {shorten(wrong, '; ')}"
        yield Finding("problem", what, "fix or remove these cases in nnUNet_raw; the others are not affected")
    if raw.is_labelled and raw.without_label:
        lacking = raw.without_label
        what = f"{name}: {len(lacking)} of {cases} raw cases lack a label: {shorten(lacking, ', ')}"
        remedy = "add it, or remove the case's images (hiendmae_plan_and_preprocess needs no labels, nnU-Net needs all)"
        yield Finding("problem", what, remedy)
    elif not wrong:
        yield Finding("ok", f"{name}: {cases} raw cases, {'with' if raw.is_labelled else 'without'} labels")


def shorten(items: list[str], separator: str) -> str:
    """The first few, and how many more."""
    more = f"{separator}and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return separator.join(items[:SHOWN]) + more


def check_volumes(folder: Path, cases: int, prepare: str) -> Iterator[Finding]:
    """Whether every raw case was preprocessed."""
    done = len(nnUNetDatasetBlosc2.get_identifiers(str(folder))) if folder.is_dir() else 0
    if not done:
        yield Finding("problem", f"{folder} holds no preprocessed volumes.", prepare)
    elif done < cases:
        yield Finding("warning", f"{folder}: {done} of {cases} cases are preprocessed.", prepare)
    else:
        yield Finding("ok", f"{folder}: {done} cases preprocessed")


def check_channels(folder: Path, plans: dict[str, Any], plan: dict[str, Any], labelled: bool) -> Iterator[Finding]:
    """What the encoder gets of each channel; pre-training, all that unlabelled data can be for, takes HU only."""
    description = folder / "dataset.json"
    names = channel_names(read_json(description)) if description.is_file() else []
    channels = plan_intensities(plans, plan, DEFAULT_WINDOW, names)
    for channel, line in zip(channels, channel_lines(channels, names), strict=True):
        refused = not labelled and not channel.is_ct
        level = "problem" if refused else "warning" if channel.is_doubtful else "ok"
        yield Finding(level, line.removeprefix("WARNING: "))


def check_weights(dataset: str, plans: dict[str, Any], plan: dict[str, Any], configuration: str) -> Iterator[Finding]:
    """The weights that a fine-tuning would take: where from, made of what, and whether the plans suit them."""
    name = f"{plans['plans_name']}, {configuration}"
    try:
        settings = FineTuneSettings.from_configuration(plan)
        path, reason = find_weights(settings.weights)
        weights = load_weights(path)
    except ValueError as error:
        what, _, remedy = str(error).partition(". ")
        remedy = remedy or "hiendmae_pretrain -d DATASET, or train with -tr nnUNetTrainerHiEndMAE_scratch"
        yield Finding("problem", what.rstrip(".") + ".", remedy)
        return
    data = (
        ", ".join(f"{d['name']} ({d['cases']} cases)" for d in weights.header.get("datasets", [])) or "data not stated"
    )
    yield Finding("ok", f"weights: {path} ({reason}), sha256 {weights.sha256[:12]}…, pre-trained on {data}")
    yield from check_overlap(dataset, plans["plans_name"], configuration, weights)
    token = weights.architecture.patch_size
    try:
        encoder = settings.resolved(weights.architecture, weights.window_hu).encoder
        token = encoder.patch_size if encoder is not None else token
    except ValueError as error:
        yield Finding("problem", str(error), f"hiendmae_plan -d {dataset} writes plans without it")
    yield from compare_spacing(dataset, plan["spacing"], weights.header.get("spacing") or {})
    cut = clip_warning(plan_intensities(plans, plan, weights.window_hu), weights.window_hu, name)
    if cut:
        keeps = weights.window_hu == DEFAULT_WINDOW  # as HiEndMAEPlanner plans; no command plans a wider window
        command = f"nnUNetv2_plan_and_preprocess -d {dataset} -pl HiEndMAEPlanner -c 3d_fullres"
        yield Finding("warning", cut, command if keeps else "widen the intensity bounds in the plans, preprocess again")
    else:
        yield Finding("ok", f"HU window {weights.window_hu[0]:g}…{weights.window_hu[1]:g} is inside what {name} keep")
    patch = plan["patch_size"]
    lost = math.prod(-(-n // t) * t / n for n, t in zip(patch, token, strict=True)) - 1
    size = " × ".join(map(str, patch))
    padded = f"patch {size} is padded to whole tokens of {' × '.join(map(str, token))}: {lost:.0%} more voxels"
    good = " ".join(str(max(round(n / t), 1) * t) for n, t in zip(patch, token, strict=True))
    remedy = f"hiendmae_plan -d {dataset} -patch_size {good}" if lost > 0.2 else ""
    yield Finding("warning" if lost > 0.2 else "ok", padded, remedy)


def check_overlap(dataset: str, plans_name: str, configuration: str, weights: Weights) -> Iterator[Finding]:
    """Whether cases of the data set were in the pre-training; a test case among them would be no test."""
    folder = preprocessed_folder(dataset)
    identifier = PlansManager(read_plans(folder / f"{plans_name}.json", "")).get_configuration(configuration)
    cases: dict[str, Any] | str = {}
    if weights.patients is not None:
        names = present(dataset, identifier.data_identifier)
        cases = case_fingerprints(dataset, plans_name, configuration, names)
    state = in_pretraining(weights.patients, cases, patients_of(folder.name))
    text = f"cases of {folder.name} in the pre-training: {state_text(state)}"
    remedy = "" if state == [] else "test on other cases, or pre-train with data from hiendmae_ingest --exclude_overlap"
    yield Finding("ok" if state == [] else "warning", text, remedy)


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
