"""Surface metrics of a run's predictions: surface Dice at a tolerance (NSD) and HD95, and Dice once more as a check.

Distances are in mm, from DeepMind's ``surface-distance``. Where both prediction and reference lack an organ, all are
undefined (as nnU-Net's Dice). Where one of them lacks it, Dice and NSD are 0 and HD95 is undefined.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import (
    compute_tp_fp_fn_tn,
    key_to_label_or_region,
    region_or_label_to_mask,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from surface_distance import (
    compute_robust_hausdorff,
    compute_surface_dice_at_tolerance,
    compute_surface_distances,
)

from nnunetv2_hiendmae.benchmark.record import file_sha256
from nnunetv2_hiendmae.benchmark.splits import write_json
from nnunetv2_hiendmae.folders import read_json

SURFACE_FILE = "hiendmae_surface.json"

Scores = dict[str, dict[str, float | None]]
"""Label (nnU-Net's key in summary.json) → metric → value, None where undefined."""


def organ_scores(
    reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...], tolerance_mm: float
) -> dict[str, float | None]:
    """``dice``, ``nsd`` and ``hd95`` (mm) of two boolean masks of one shape; None where undefined."""
    tp, fp, fn, _ = compute_tp_fp_fn_tn(reference, prediction)
    if tp + fp + fn == 0:
        return {"dice": None, "nsd": None, "hd95": None}
    dice = float(2 * tp / (2 * tp + fp + fn))
    if not reference.any() or not prediction.any():
        return {"dice": dice, "nsd": 0.0, "hd95": None}
    distances = compute_surface_distances(reference, prediction, spacing)
    nsd = float(compute_surface_dice_at_tolerance(distances, tolerance_mm))
    return {"dice": dice, "nsd": nsd, "hd95": float(compute_robust_hausdorff(distances, 95))}


def surface_scores(
    fold: Path, cases: list[str], labels: list[str], references: Path, tolerance_mm: float
) -> dict[str, Scores]:
    """Scores of every validation case of a fold's folder, kept there until a file or the tolerance changes.

    Where no prediction is left at all (``is_archived``), the kept scores are all there is.

    Args:
        fold: nnU-Net's folder of the run.
        cases: case names.
        labels: keys of summary.json: '3', or '(1, 2)' for a region.
        references: folder of the reference segmentations.
        tolerance_mm: of the NSD.

    Raises:
        ValueError: only scores of another tolerance were kept.
        FileNotFoundError: a prediction or reference is missing; names it.
    """
    file = fold / SURFACE_FILE
    kept: dict[str, Any] = read_json(file) if file.is_file() else {}
    known = kept.get("cases", {}) if kept.get("tolerance_mm") == tolerance_mm else {}
    if is_archived(fold):
        if not known:
            raise ValueError(
                f"without predictions there are only the scores at {kept.get('tolerance_mm')} mm, not at {tolerance_mm}"
            )
        return {case: known[case]["labels"] for case in cases}
    plans, dataset = PlansManager(str(fold.parent / "plans.json")), read_json(fold.parent / "dataset.json")
    ignore = plans.get_label_manager(dataset).ignore_label
    reader, ending = plans.image_reader_writer_class(), dataset["file_ending"]
    found: dict[str, Any] = {}
    for case in cases:
        paths = [folder / f"{case}{ending}" for folder in (references, fold / "validation")]
        hashes = [file_sha256(path) for path in paths]
        if known.get(case, {}).get("sha256") != hashes or set(known[case]["labels"]) != set(labels):
            (reference, header), (prediction, _) = (reader.read_seg(str(path)) for path in paths)
            use = reference[0] != ignore if ignore is not None else np.ones(reference[0].shape, bool)
            scores: Scores = {}
            for key in labels:
                label = key_to_label_or_region(key)
                truth, guess = (region_or_label_to_mask(image[0], label) & use for image in (reference, prediction))
                scores[key] = organ_scores(truth, guess, tuple(map(float, header["spacing"])), tolerance_mm)
            found[case] = {"sha256": hashes, "labels": scores}
        else:
            found[case] = known[case]
    if found != known:
        write_json(file, {"tolerance_mm": tolerance_mm, "cases": found})
    return {case: entry["labels"] for case, entry in found.items()}


def is_archived(fold: Path) -> bool:
    """Whether a run was kept without its predictions: of ``validation`` only the summary is left."""
    return not any(file.suffix != ".json" for file in (fold / "validation").iterdir())
