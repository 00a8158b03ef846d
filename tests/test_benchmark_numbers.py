"""One rule for missed, invented and absent organs, and one unit: the tables of a report agree with each other."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_hiendmae.benchmark.as_run import MISSING, as_run_tables, short
from nnunetv2_hiendmae.benchmark.collect import METRICS, Result, Score
from nnunetv2_hiendmae.benchmark.grid import Arm, Grid
from nnunetv2_hiendmae.benchmark.statistics import holm
from nnunetv2_hiendmae.benchmark.surface import (
    ABSENT,
    FOUND,
    ONE_SIDED,
    SURFACE_FILE,
    Diagonals,
    Scores,
    surface_scores,
)
from nnunetv2_hiendmae.benchmark.tables import comparison_table, comparisons, cost_table, metric_table, middle

DIAGONAL = float(np.hypot(np.hypot(8 * 3.0, 10), 2 * 12))
"""Of the images below: 12 × 10 × 8 voxels of 2 × 1 × 3 mm."""


def write_run(fold: Path, references: Path) -> None:
    """Three cases of two organs. Prediction: all right, organ 2 missed, organ 2 invented; case 2 lacks organ 1."""
    (fold / "validation").mkdir(parents=True)
    references.mkdir()
    plans = {"image_reader_writer": "SimpleITKIO", "label_manager": "LabelManager"}
    dataset = {"labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz", "channel_names": {"0": "CT"}}
    (fold.parent / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    (fold.parent / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    both = np.zeros((8, 10, 12), np.uint8)
    both[2:5, 2:5, 2:5], both[6, 6:9, 6:9] = 1, 2
    first, nothing = np.where(both == 1, both, 0), np.zeros_like(both)
    for i, (truth, guess) in enumerate([(both, both), (both, first), (nothing, np.where(both == 2, both, 0))]):
        for folder, array in ((references, truth), (fold / "validation", guess)):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing((2.0, 1.0, 3.0))
            sitk.WriteImage(image, str(folder / f"c{i}.nii.gz"))


def scores(fold: Path, references: Path, diagonals: Diagonals) -> dict[str, Scores]:
    return surface_scores(fold, ["c0", "c1", "c2"], ["1", "2"], references, 2.0, diagonals)


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # surface-distance of scipy
def test_every_organ_has_a_score(tmp_path: Path) -> None:
    fold, references = tmp_path / "model" / "fold_0", tmp_path / "references"
    write_run(fold, references)
    perfect = {"dice": 1.0, "nsd": 1.0, "hd95": 0.0}
    worst = {"dice": 0.0, "nsd": 0.0, "hd95": pytest.approx(DIAGONAL), "outcome": ONE_SIDED}
    expected = {
        "c0": {"1": {**perfect, "outcome": FOUND}, "2": {**perfect, "outcome": FOUND}},
        "c1": {"1": {**perfect, "outcome": FOUND}, "2": worst},
        "c2": {"1": {**perfect, "outcome": ABSENT}, "2": worst},
    }
    diagonals = Diagonals()
    assert scores(fold, references, diagonals) == expected
    assert list(diagonals.used.values()) == pytest.approx([DIAGONAL] * 2)
    assert scores(fold, references, Diagonals()) == expected  # from what was kept

    for file in (fold / "validation").iterdir():
        file.unlink()
    (fold / "validation" / "summary.json").touch()  # now it is kept without predictions
    assert scores(fold, references, Diagonals()) == expected
    (references / "c1.nii.gz").write_bytes((references / "c0.nii.gz").read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"HD95 of a missed organ needs the size of the image: put .*c1\.nii\.gz back"):
        scores(fold, references, Diagonals())
    for file in references.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"put .*c1\.nii\.gz back as it was"):
        scores(fold, references, Diagonals())
    again = Diagonals(known=diagonals.used)
    assert scores(fold, references, again) == expected and again.used == diagonals.used
    assert json.loads((fold / SURFACE_FILE).read_text())["cases"]["c1"]["labels"]["2"]["hd95"] is None  # as measured


ARMS = tuple(Arm(name=name, trainer="nnUNetTrainer") for name in ("first", "other", "same"))
GRID = Grid(name="g", datasets=("Dataset001_A",), arms=ARMS, folds=(0, 1), labels=(1, "all"), seeds=(0, 1, 2))
CASES = {0: ["a", "b", "c", "d", "e"], 1: ["f", "e"]}
"""Of the folds: not as many, and one of them twice."""


def made_up(miss: str | None = None) -> list[Result]:
    """Runs with random scores; arm ``other`` misses ``miss``'s organ 2 in every run, ``same`` differs by noise."""
    random = np.random.default_rng(0)
    results: list[Result] = []
    for run in GRID.runs():
        result = Result(run=run, folder=Path(), train_cases=1)
        for case in CASES[run.fold]:
            for organ in ("1", "2"):
                values = dict(zip(METRICS, random.uniform(0.2, 0.9, 3), strict=True))
                if run.arm.name == "same":
                    before = next(s for r in results[-2:] for s in r.scores if (s.case, s.organ) == (case, organ))
                    values = {m: getattr(before, m) + 1e-17 + 1e-13 * random.uniform() for m in METRICS}
                outcome = FOUND
                if run.arm.name == "other" and (case, organ) == (miss, "2"):
                    values, outcome = {"dice": 0.0, "nsd": 0.0, "hd95": 500.0}, ONE_SIDED
                result.scores.append(Score(case=case, organ=organ, outcome=outcome, **values))
        results.append(result)
    return results


def leading(text: str) -> float:
    return float(text.split(" ")[0].split(",")[0])


@pytest.mark.parametrize("metric", METRICS)
def test_tables_agree(metric: str) -> None:
    """Folds of other sizes, a case in two folds, and budgets with one and with three subsets."""
    results = made_up(miss="b")
    digit = 0.11 if metric == "hd95" else 0.0011
    rows = {(r[2], r[3]): [leading(v) for v in r[4:]] for r in metric_table(GRID, results, metric, 2.0).rows}
    compared = [r for r in comparison_table(GRID, comparisons(GRID, results)).rows if r[3] == metric]
    assert len(compared) == 4
    for labels in ("1", "all"):
        first, other, _ = rows[labels, "mean"]
        row = next(r for r in compared if (r[2], r[4]) == (labels, "other"))
        assert float(row[6]) == pytest.approx(other - first, abs=digit)
        assert row[5] == "6"  # cases a to f
        assert np.mean([rows[labels, o][1] for o in ("1", "2")]) == pytest.approx(other, abs=digit)
    if metric == "dice":
        costs = {r[2]: leading(r[4]) for r in cost_table(GRID, results).rows}
        assert costs["other"] == pytest.approx((rows["1", "mean"][1] + rows["all", "mean"][1]) / 2, abs=digit)


def test_a_case_is_one_patient_however_often_it_is_tested() -> None:
    """By hand: the mean over organs, then over its runs, then over cases."""
    results = [r for r in made_up() if r.run.labels == 1]
    of_case: dict[str, list[float]] = {}
    for r in results:
        if r.run.arm.name == "first":
            for case in CASES[r.run.fold]:
                of_case.setdefault(case, []).append(fmean(s.dice for s in r.scores if s.case == case))
    assert [len(of_case[c]) for c in "abcdef"] == [3, 3, 3, 3, 6, 3]
    row = metric_table(GRID, results, "dice", 2.0).rows[0]
    assert leading(row[4]) == pytest.approx(fmean(map(fmean, of_case.values())), abs=0.0006)


def test_missing_an_organ_is_never_cheaper() -> None:
    """The distances of the other organs and cases are the same; only the missed one is added."""
    for miss in "abcdef":
        there, missed = (comparisons(GRID, made_up(m)) for m in (None, miss))
        for a, b in zip(there, missed, strict=True):
            assert len(a.differences) == len(b.differences) == 6
            if a.arm == "other":
                assert a.difference is not None and b.difference is not None
                assert (b.difference > a.difference + 30) if a.metric == "hd95" else (b.difference < a.difference)
    text = metric_table(GRID, made_up("b"), "hd95", 2.0).rows[2][5]
    assert text.endswith(", 3 of 21 missed or invented")


def test_noise_is_no_difference() -> None:
    rows = [r for r in comparison_table(GRID, comparisons(GRID, made_up())).rows if r[4] == "same"]
    assert len(rows) == 6
    for row in rows:
        assert row[6:9] == ["+0.0" if row[3] == "hd95" else "+0.000", "all cases alike", "1"]


def test_one_family_a_metric() -> None:
    """Holm's correction counts all arms and label budgets of a metric and nothing else."""
    made = comparisons(GRID, made_up("a"))
    for metric in METRICS:
        corrected = holm([c.p for c in made if c.metric == metric])
        assert len(corrected) == 4 and [c.p_holm for c in made if c.metric == metric] == corrected


def test_what_is_missing_is_told() -> None:
    results = made_up()
    for r in results:
        if r.run.arm.name == "other" and (r.run.labels == "all" or r.run.seed == 2):
            r.status = "missing"
    rows = {r[2]: r for r in comparison_table(GRID, comparisons(GRID, results)).rows if r[3:5] == ["dice", "other"]}
    assert rows["1"][5] == "6, 4/6 runs" and rows["all"][5:7] == ["0, 0/2 runs", "missing"]
    assert cost_table(GRID, results).rows[1][4].endswith(", 1/2 budgets")


def test_medians_and_what_is_said_of_trainers() -> None:
    """Two runs have a median between them; GPUs of one maker are told apart, of objects only the class is said."""
    assert middle([0.1, None, 0.9], ".3f") == "0.500" and middle([0.3, 0.1, 0.9], ".1f") == "0.3"
    assert short("NVIDIA A100-SXM4-40GB") != short("NVIDIA H200") == "NVIDIA H200"
    assert [short(text) for text in ("0.01", "SGD (\nlr: 0.01)", "<nnunetv2.lr.PolyLRScheduler object at 0x7f>")] == [
        "0.01", "SGD", "PolyLRScheduler",
    ]  # fmt: skip


def test_an_arm_without_a_run_differs_from_nobody() -> None:
    """As-run verdicts: "same" and "differs" are said of runs, not of their absence."""
    results = made_up()
    for r in results:
        r.status = "missing"
    (table,) = as_run_tables(GRID, results)
    assert {row[-1] for row in table.rows} == {"–"} and {word for row in table.rows for word in row[1:-1]} == {MISSING}
