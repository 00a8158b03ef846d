"""How much Dice finished networks lose on changed scans: test cases are changed, predicted by nnU-Net, and scored."""

from __future__ import annotations

import hashlib
import io
import tempfile
import zlib
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.evaluation.evaluate_predictions import (
    compute_tp_fp_fn_tn,
    key_to_label_or_region,
    region_or_label_to_mask,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_hiendmae.benchmark.arms import fold_folder
from nnunetv2_hiendmae.benchmark.collect import Result, check_record, organ_names
from nnunetv2_hiendmae.benchmark.grid import Grid, Run
from nnunetv2_hiendmae.benchmark.plan import write_text
from nnunetv2_hiendmae.benchmark.record import FINAL, SUMMARY, file_sha256
from nnunetv2_hiendmae.benchmark.report import csv_text
from nnunetv2_hiendmae.benchmark.shifts import SHIFTS, UNCHANGED, Scan, Shift
from nnunetv2_hiendmae.benchmark.splits import SPLITS_FILE, split_index, write_json
from nnunetv2_hiendmae.benchmark.statistics import bootstrap_interval
from nnunetv2_hiendmae.benchmark.surface import reading
from nnunetv2_hiendmae.benchmark.tables import Cell, cells, number, signed
from nnunetv2_hiendmae.channels import channel_names, holds_hu
from nnunetv2_hiendmae.files import preprocessed_folder, raw_folder, read_json

FOLDER = "robustness"
"""In the benchmark's folder: what was measured, a file a run."""

Files = dict[str, dict[str, Any]]
"""Case → ``images`` (a file a channel) and ``label``, as nnU-Net lists them."""
Dice = dict[str, dict[str, dict[str, float]]]
"""Shift → case → organ → Dice; 1 where reference and prediction both lack it."""

NOTE = (
    "Dice of the unchanged scans, and what is added to it when they are changed: mean over cases, paired by case over "
    "label subsets and folds, with the 95 % interval of the report. The reference is changed with the scan."
)


def robustness(grid: Grid, folder: Path) -> list[str]:
    """Predict what is not yet predicted, and write ``robustness.md``, ``.csv`` and ``robustness_cases.csv``.

    Args:
        grid: of a benchmark whose runs are finished and have their checkpoints.
        folder: of the benchmark.

    Returns:
        One line for each run that cannot be predicted.

    Raises:
        ValueError: raw data that are missing or no volumes, a cascade, no such device.
    """
    if grid.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("The grid's device is cuda, and torch finds none. Plan again with -device cpu.")
    failures: list[str] = []
    found: dict[str, Dice] = {}
    for run in grid.runs():
        problems = unfit(grid, run)
        if problems:
            failures.append(f"{run.name}: {'; '.join(problems)}")
        else:
            found[run.name] = measure(run, fold_folder(grid, run), torch.device(grid.device), folder / FOLDER)
    header, rows = table(grid, found)
    lines = [f"# Robustness: {grid.name}", "", NOTE, "", *(f"- MISSING {line}" for line in failures), ""]
    lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    write_text(folder / "robustness.md", "\n".join([*lines, ""]))
    write_text(folder / "robustness.csv", csv_text(header, rows))
    cases = [
        [run.dataset, run.configuration, str(run.fold), str(run.labels), str(run.seed), run.arm.name, *score]
        for run in grid.runs()
        for score in scores_of(found.get(run.name, {}))
    ]
    names = ["data set", "configuration", "fold", "labels", "seed", "arm", "change", "case", "organ", "dice"]
    write_text(folder / "robustness_cases.csv", csv_text(names, cases))
    return failures


def unfit(grid: Grid, run: Run) -> list[str]:
    """Why a run's network cannot be predicted with, or is not the one the grid asks for."""
    fold = fold_folder(grid, run)
    if not (fold / SUMMARY).is_file():
        return [f"not finished; run 'hiendmae_benchmark run' ({fold})"]
    if not (fold / FINAL).is_file():
        return [f"{fold / FINAL} was removed; without it nothing can be predicted"]
    result = Result(run=run, folder=fold, train_cases=0)
    check_record(grid, result, {})
    return result.problems


def measure(run: Run, fold: Path, device: torch.device, kept: Path) -> Dice:
    """Dice of a run's test cases under every shift; what was measured of the same network and files is kept."""
    data = preprocessed_folder(run.dataset)
    cases = read_json(data / SPLITS_FILE)[split_index(data, run.fold, run.labels, run.seed)]["val"]
    dataset = read_json(fold.parent / "dataset.json")
    raw = get_filenames_of_train_images_and_targets(str(raw_folder(run.dataset)), dataset)
    files: Files = {case: raw[case] for case in cases if case in raw}
    lacking = [case for case in cases if case not in files or not Path(files[case]["label"]).is_file()]
    if lacking:
        raise ValueError(f"{raw_folder(run.dataset)} lacks image or label of {', '.join(lacking)}. Put them back.")
    file = kept / f"{run.name.replace('/', '_').replace(' ', '_')}.json"
    digest = digest_of(fold / FINAL, files)
    before = read_json(file, "Remove it.") if file.is_file() else {}
    dice: Dice = before["dice"] if before.get("digest") == digest else {}
    is_ct = channels_in_hu(fold, dataset)
    names, (_, ending, ignore) = organ_names(dataset), reading(fold)
    organs = {names[key]: key_to_label_or_region(key) for key in read_json(fold / SUMMARY)["mean"] if key != "0"}
    todo = [shift for shift in SHIFTS if shift.name not in dice and (any(is_ct) or not shift.needs_ct)]
    if todo:
        kept.mkdir(parents=True, exist_ok=True)
        predictor = predictor_of(fold, device)
        for shift in todo:
            dice[shift.name] = {}
            for case in cases:
                scan = shift.apply(replace(read_scan(files[case], is_ct), seed=zlib.crc32(case.encode())))
                prediction = predict(predictor, scan, case, ending)
                dice[shift.name][case] = dice_by_organ(prediction, scan.reference, organs, ignore)
            write_json(file, {"digest": digest, "dice": dice})
            mean = fmean(fmean(scores.values()) for scores in dice[shift.name].values())
            print(f"{run.name}, {shift.name}: Dice {mean:.3f}", flush=True)
    return dice


def digest_of(checkpoint: Path, files: Files) -> str:
    """sha256 of the network and of all it is to predict."""
    parts = [checkpoint, *(Path(p) for case in sorted(files) for p in (*files[case]["images"], files[case]["label"]))]
    return hashlib.sha256("".join(map(file_sha256, parts)).encode()).hexdigest()


def channels_in_hu(fold: Path, dataset: dict[str, Any]) -> tuple[bool, ...]:
    """Which image channels are in HU, by name and values, as for the intensities of the network's input."""
    plans = read_json(fold.parent / "plans.json")
    statistics = plans.get("foreground_intensity_properties_per_channel", {})
    return tuple(holds_hu(name, statistics.get(str(i), {})) for i, name in enumerate(channel_names(dataset)))


def predictor_of(fold: Path, device: torch.device) -> nnUNetPredictor:
    """nnU-Net's own predictor, mirroring as in its final validation. ``ValueError`` for a cascade."""
    predictor = nnUNetPredictor(
        device=device, perform_everything_on_device=device.type == "cuda", allow_tqdm=False, verbose=False
    )
    with redirect_stdout(io.StringIO()):
        predictor.initialize_from_trained_model_folder(str(fold.parent), (int(fold.name.split("_")[1]),), FINAL)
    if predictor.configuration_manager.previous_stage_name is not None:
        raise ValueError(f"{fold}: robustness predicts scans, and a cascade needs predictions of its first stage too.")
    return predictor


def predict(predictor: nnUNetPredictor, scan: Scan, case: str, ending: str) -> sitk.Image:
    """The segmentation of one changed case, from files as a user's would be."""
    with tempfile.TemporaryDirectory() as temporary:
        images = [str(Path(temporary) / f"{case}_{i:04d}{ending}") for i in range(len(scan.channels))]
        for image, name in zip(scan.channels, images, strict=True):
            sitk.WriteImage(image, name)
        with redirect_stdout(io.StringIO()):
            predictor.predict_from_files_sequential([images], [str(Path(temporary) / case)])
        return sitk.ReadImage(str(Path(temporary) / f"{case}{ending}"))


def read_scan(files: dict[str, Any], is_ct: tuple[bool, ...]) -> Scan:
    """A case from its files. ``ValueError`` if they are no volumes of one shape."""
    try:
        channels = tuple(sitk.ReadImage(str(file)) for file in files["images"])
        reference = sitk.ReadImage(str(files["label"]))
    except RuntimeError as error:
        raise ValueError(f"{files['images'][0]}: SimpleITK cannot read the case ({error}).") from None
    if len({image.GetSize() for image in (*channels, reference)}) > 1 or reference.GetDimension() != 3:
        raise ValueError(f"{files['label']}: robustness needs volumes, and label and channels of one shape.")
    reference.CopyInformation(channels[0])
    return Scan(channels=channels, is_ct=is_ct, reference=reference)


def dice_by_organ(
    prediction: sitk.Image, reference: sitk.Image, organs: dict[str, int | tuple[int, ...]], ignore: int | None
) -> dict[str, float]:
    """On the reference's grid, by the rule of ``surface``: 1 where both lack the organ."""
    prediction = sitk.Resample(prediction, reference, sitk.Transform(), sitk.sitkNearestNeighbor)
    guess, truth = (sitk.GetArrayFromImage(image) for image in (prediction, reference))
    use = truth != ignore if ignore is not None else np.ones(truth.shape, bool)
    dice = {}
    for organ, label in organs.items():
        masks = [region_or_label_to_mask(image, label) & use for image in (truth, guess)]
        tp, fp, fn, _ = compute_tp_fp_fn_tn(*masks)
        dice[organ] = float(2 * tp / (2 * tp + fp + fn)) if tp + fp + fn else 1.0
    return dice


def scores_of(dice: Dice) -> list[list[str]]:
    """Rows of change, case, organ, Dice."""
    return [
        [shift, case, organ, repr(value)]
        for shift, of_case in dice.items()
        for case, organs in of_case.items()
        for organ, value in organs.items()
    ]


def case_dice(runs: list[Dice], shift: str) -> dict[str, float]:
    """Mean Dice of each case over its organs, then over the runs that have it."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for case, organs in run[shift].items():
            found.setdefault(case, []).append(fmean(organs.values()))
    return {case: fmean(values) for case, values in found.items()}


def table(grid: Grid, found: dict[str, Dice]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: cells × shifts, an arm a column."""

    def text(cell: Cell, arm: str, shift: Shift) -> str:
        mine = [r for r in grid.runs() if (r.dataset, r.configuration, r.labels) == cell and r.arm.name == arm]
        runs = [found[r.name] for r in mine if r.name in found]
        if not runs:
            return "missing"
        if shift.name not in runs[0]:
            return "no channel in HU"
        partly = f", {len(runs)}/{len(mine)} runs" if len(runs) < len(mine) else ""
        plain, changed = case_dice(runs, UNCHANGED.name), case_dice(runs, shift.name)
        if shift is UNCHANGED:
            return number(fmean(plain.values()), "dice") + partly
        added = [changed[case] - plain[case] for case in plain]
        interval = bootstrap_interval(added)
        spread = f" ({' … '.join(signed(v, 'dice') for v in interval)})" if interval else ""
        return signed(fmean(added), "dice") + spread + partly

    header = ["data set", "configuration", "labels", "change", *(arm.name for arm in grid.arms)]
    rows = [
        [cell[0], cell[1], str(cell[2]), shift.name, *(text(cell, arm.name, shift) for arm in grid.arms)]
        for cell in cells(grid)
        for shift in SHIFTS
    ]
    return header, rows
