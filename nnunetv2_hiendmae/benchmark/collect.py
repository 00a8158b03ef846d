"""From run folders to scores: nnU-Net's ``summary.json`` of every run, checked before it is believed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.benchmark.arms import fold_folder
from nnunetv2_hiendmae.benchmark.grid import Grid, Run
from nnunetv2_hiendmae.benchmark.record import RECORD_FILE, SUMMARY, RunRecord, file_sha256, read_record
from nnunetv2_hiendmae.benchmark.run import expected_record, stale, state_of, trained_otherwise
from nnunetv2_hiendmae.benchmark.splits import SPLITS_FILE, split_index
from nnunetv2_hiendmae.benchmark.surface import ABSENT, SURFACE_FILE, Diagonals, is_archived, surface_scores
from nnunetv2_hiendmae.files import preprocessed_folder, read_json

METRICS = ("dice", "nsd", "hd95")
ROUNDING = 1e-6
"""Two ways to the same Dice may differ by this."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One organ of one case."""

    case: str
    organ: str
    dice: float
    nsd: float
    hd95: float
    """mm"""
    outcome: str
    """Of ``surface``: found, missed or invented, or absent from reference and prediction."""


@dataclass(kw_only=True)
class Result:
    """What was found of one run."""

    run: Run
    folder: Path
    train_cases: int
    status: str = "finished"
    """``finished``, ``missing``, or ``changed``: there, but not what nnU-Net wrote for this grid. Only finished
    runs count."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    record: RunRecord | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    """Of the files that were read, by their name in the folder."""


def collect(
    grid: Grid, run: Run, tolerance_mm: float, earlier: dict[str, str], last: dict[str, str], diagonals: Diagonals
) -> Result:
    """Read and check one run.

    Args:
        grid, run: which.
        tolerance_mm: of the surface Dice.
        earlier: ``Result.sha256`` of the first report that saw the run; empty if there was none.
        last: that of the last report.
        diagonals: of the references' images.
    """
    folder, data = fold_folder(grid, run), preprocessed_folder(run.dataset)
    split = read_json(data / SPLITS_FILE)[split_index(data, run.fold, run.labels, run.seed)]
    result = Result(run=run, folder=folder, train_cases=len(split["train"]))
    state = state_of(folder)
    if state != "finished":
        was_there = str(SUMMARY) in earlier or (folder / SUMMARY).is_file()
        words = {"new": "not started", "continue": "training not finished", "validate": "no summary.json"}[state]
        result.status = "missing"
        result.problems.append(words + (", though an earlier report or run had one" if was_there else ""))
        return result
    try:
        check_record(grid, result, earlier)
        check_budget(grid, result)
        check_archive(result, earlier)
        summary = read_json(folder / SUMMARY)
        check_summary(summary, split["val"], result)
        add_scores(summary, split["val"], data, tolerance_mm, last, diagonals, result)
    except (ValueError, KeyError, TypeError, OSError) as error:
        result.problems.append(f"unreadable: {error!r}")
    if result.problems:
        result.status = "changed"
    for name in (RECORD_FILE, str(SUMMARY), "debug.json", SURFACE_FILE):
        if (folder / name).is_file():
            result.sha256[name] = file_sha256(folder / name)
    return result


def check_record(grid: Grid, result: Result, earlier: dict[str, str]) -> None:
    """Compare the summary's hash with the one taken when the run finished, or by the first report."""
    result.record = record = read_record(result.folder)
    now = file_sha256(result.folder / SUMMARY)
    if record is None or record.summary_sha256 is None:
        result.notes.append("not recorded by 'hiendmae_benchmark run'")
        if earlier.get(str(SUMMARY), now) != now:
            result.problems.append("summary.json CHANGED since the first report")
    elif record.summary_sha256 != now:
        result.problems.append("summary.json CHANGED since its run finished")
    run = result.run
    reason = trained_otherwise(grid, run) if record is None else stale(record, expected_record(grid, run))
    if reason:
        result.problems.append(reason)


def check_budget(grid: Grid, result: Result) -> None:
    """The trainer must have used the grid's epochs and iterations, as far as nnU-Net's ``debug.json`` tells."""
    file = result.folder / "debug.json"
    debug = read_json(file) if file.is_file() else {}
    for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch"):
        wanted = grid.budget_of(result.run.arm).get(name)
        if wanted is not None and str(debug.get(name, wanted)) != str(wanted):
            result.problems.append(f"it was made with {name}={debug[name]}, the grid has {wanted}")


def check_archive(result: Result, earlier: dict[str, str]) -> None:
    """Without predictions the kept surface scores cannot be measured again: they must be those of an earlier report."""
    if not is_archived(result.folder):
        return
    result.notes.append("kept without predictions: scores as measured when they were there")
    now = file_sha256(result.folder / SURFACE_FILE)
    if earlier.get(SURFACE_FILE, now) != now:
        result.problems.append(f"{SURFACE_FILE} CHANGED since an earlier report")


def check_summary(summary: dict[str, Any], val: list[str], result: Result) -> None:
    """Cases must be those of the split, and the means must be the means of the cases."""
    ending = read_json(result.folder.parent / "dataset.json")["file_ending"]
    cases = sorted(case_name(entry, ending) for entry in summary["metric_per_case"])
    if cases != sorted(val):
        odd = sorted(set(cases) ^ set(val))
        result.problems.append(f"summary.json has other cases than the split: {', '.join(odd) or 'some twice'}")
    for key, mean in summary["mean"].items():
        values = [entry["metrics"][key]["Dice"] for entry in summary["metric_per_case"]]
        if not same(mean["Dice"], mean_of(values)):
            result.problems.append(f"summary.json: the mean Dice of label {key} is not the mean of its cases")


def add_scores(
    summary: dict[str, Any],
    val: list[str],
    data: Path,
    tolerance_mm: float,
    last: dict[str, str],
    diagonals: Diagonals,
    result: Result,
) -> None:
    """Fill in the scores; the Dice of summary.json must be that of the predictions."""
    dataset = read_json(result.folder.parent / "dataset.json")
    names = organ_names(dataset)
    labels = sorted(summary["mean"], key=list(names).index)
    file = result.folder / SURFACE_FILE
    if not is_archived(result.folder) and file.is_file() and last.get(SURFACE_FILE, now := file_sha256(file)) != now:
        file.unlink()  # not as the last report left it; the predictions are there to measure again
    references = data / "gt_segmentations"
    surface = surface_scores(result.folder, sorted(val), labels, references, tolerance_mm, diagonals)
    for entry in summary["metric_per_case"]:
        case = case_name(entry, dataset["file_ending"])
        for key in labels:
            dice, scores = defined(entry["metrics"][key]["Dice"]), surface.get(case, {}).get(key)
            if scores is None:
                continue  # a case of another split, which check_summary has reported
            if not same(dice, None if scores["outcome"] == ABSENT else scores["dice"]):
                result.problems.append(f"the Dice of {case}, label {key} in summary.json is not that of its prediction")
            result.scores.append(Score(case=case, organ=names[key], **scores))


def organ_names(dataset: dict[str, Any]) -> dict[str, str]:
    """Name of each label or region, by nnU-Net's key in summary.json."""
    return {str(tuple(v) if isinstance(v, list) else v): name for name, v in dataset["labels"].items()}


def case_name(entry: dict[str, Any], ending: str) -> str:
    """Case of an entry of ``metric_per_case``."""
    return Path(entry["prediction_file"]).name.removesuffix(ending)


def defined(value: Any) -> float | None:
    """None for the NaN that nnU-Net writes where a metric is undefined."""
    return None if value is None or math.isnan(float(value)) else float(value)


def mean_of(values: list[Any]) -> float | None:
    """Mean of the defined values; None if there is none."""
    there = [v for v in map(defined, values) if v is not None]
    return sum(there) / len(there) if there else None


def same(a: Any, b: Any) -> bool:
    """Whether two values, either of which may be undefined, agree."""
    a, b = defined(a), defined(b)
    return a is b if a is None or b is None else abs(a - b) <= ROUNDING
