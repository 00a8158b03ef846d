"""Surface metrics of a run's predictions: surface Dice at a tolerance (NSD) and HD95, and Dice once more as a check.

Distances are in mm, from DeepMind's ``surface-distance``. Every organ of every case has a score, by the rule of the
BraTS challenges: where the reference has it and the prediction lacks it, or the reverse, Dice and NSD are 0 and HD95 is
the diagonal of the image, the worst distance possible; where both lack it, Dice and NSD are 1 and HD95 is 0. So nothing
is gained by missing or inventing an organ, and all arms are scored on the same organs. (nnU-Net's ``summary.json``
leaves organs out of its means that both lack.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
from nnunetv2_hiendmae.files import read_json

SURFACE_FILE = "hiendmae_surface.json"

FOUND, ONE_SIDED, ABSENT = "found", "missed or invented", "absent"

Measured = dict[str, dict[str, float | None]]
"""Label (nnU-Net's key in summary.json) → metric → value, None where undefined."""
Scores = dict[str, dict[str, Any]]
"""Label → ``dice``, ``nsd``, ``hd95`` (mm), all numbers, and ``outcome``, one of the three words above."""


@dataclass(kw_only=True)
class Diagonals:
    """How far it is from corner to corner of the references' images, in mm, by the sha256 of the file."""

    known: dict[str, float] = field(default_factory=dict)
    """From an earlier report: what is left where references were removed."""
    used: dict[str, float] = field(default_factory=dict)
    """Those that were asked for."""

    def of(self, sha256: str, reference: Path, reader: Any) -> float:
        """That of one reference.

        Raises:
            ValueError: it is not known, and the reference is not there to measure it.
        """
        if sha256 in self.known:
            self.used[sha256] = self.known[sha256]
        elif sha256 not in self.used:
            if not reference.is_file() or file_sha256(reference) != sha256:
                raise ValueError(f"HD95 of a missed organ needs the size of the image: put {reference} back as it was")
            image, header = reader.read_seg(str(reference))
            self.used[sha256] = float(np.linalg.norm(np.multiply(image[0].shape, header["spacing"])))
        return self.used[sha256]


def by_rule(measured: dict[str, float | None], diagonal: Callable[[], float]) -> dict[str, Any]:
    """The scores of an organ, see above; ``diagonal`` is asked only where it is needed."""
    if measured["dice"] is None:
        return {"dice": 1.0, "nsd": 1.0, "hd95": 0.0, "outcome": ABSENT}
    if measured["hd95"] is None:
        return {"dice": 0.0, "nsd": 0.0, "hd95": diagonal(), "outcome": ONE_SIDED}
    return {**measured, "outcome": FOUND}


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
    fold: Path, cases: list[str], labels: list[str], references: Path, tolerance_mm: float, diagonals: Diagonals
) -> dict[str, Scores]:
    """Scores of every validation case of a fold's folder by the rule above, ``Scores`` by case.

    Args:
        fold: nnU-Net's folder of the run.
        cases: case names.
        labels: keys of summary.json: '3', or '(1, 2)' for a region.
        references: folder of the reference segmentations.
        tolerance_mm: of the NSD.
        diagonals: of the references' images; gets those that are needed.

    Raises:
        ValueError: only scores of another tolerance were kept.
        FileNotFoundError: a prediction or reference is missing; names it.
    """
    reader, ending, _ = reading(fold)
    measured = measurements(fold, cases, labels, references, tolerance_mm)

    def scores(case: str) -> Scores:
        sha256, organs = measured[case]["sha256"][0], measured[case]["labels"]
        reference = references / f"{case}{ending}"
        return {key: by_rule(organs[key], lambda: diagonals.of(sha256, reference, reader)) for key in labels}

    return {case: scores(case) for case in cases}


def reading(fold: Path) -> tuple[Any, str, int | None]:
    """nnU-Net's reader of a run's files, their ending, and the label that is not evaluated."""
    plans, dataset = PlansManager(str(fold.parent / "plans.json")), read_json(fold.parent / "dataset.json")
    ignore = plans.get_label_manager(dataset).ignore_label
    return plans.image_reader_writer_class(), dataset["file_ending"], ignore


def measurements(
    fold: Path, cases: list[str], labels: list[str], references: Path, tolerance_mm: float
) -> dict[str, Any]:
    """What was measured of every case, kept in the fold's folder until a file or the tolerance changes.

    Where no prediction is left at all (``is_archived``), what was kept is all there is.

    Returns:
        case → ``sha256`` (of reference and prediction), ``labels`` (``Measured``).
    """
    file = fold / SURFACE_FILE
    kept: dict[str, Any] = read_json(file) if file.is_file() else {}
    known = kept.get("cases", {}) if kept.get("tolerance_mm") == tolerance_mm else {}
    if is_archived(fold):
        if not known:
            raise ValueError(
                f"without predictions there are only the scores at {kept.get('tolerance_mm')} mm, not at {tolerance_mm}"
            )
        return known
    reader, ending, ignore = reading(fold)
    found: dict[str, Any] = {}
    for case in cases:
        paths = [folder / f"{case}{ending}" for folder in (references, fold / "validation")]
        hashes = [file_sha256(path) for path in paths]
        if known.get(case, {}).get("sha256") != hashes or set(known[case]["labels"]) != set(labels):
            (reference, header), (prediction, _) = (reader.read_seg(str(path)) for path in paths)
            use = reference[0] != ignore if ignore is not None else np.ones(reference[0].shape, bool)
            organs: Measured = {}
            for key in labels:
                label = key_to_label_or_region(key)
                truth, guess = (region_or_label_to_mask(image[0], label) & use for image in (reference, prediction))
                organs[key] = organ_scores(truth, guess, tuple(map(float, header["spacing"])), tolerance_mm)
            found[case] = {"sha256": hashes, "labels": organs}
        else:
            found[case] = known[case]
    if found != known:
        write_json(file, {"tolerance_mm": tolerance_mm, "cases": found})
    return found


def is_archived(fold: Path) -> bool:
    """Whether a run was kept without its predictions: of ``validation`` only the summary is left."""
    return not any(file.suffix != ".json" for file in (fold / "validation").iterdir())
