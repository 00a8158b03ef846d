"""Label budgets: nested, same validation cases, original folds untouched, safe to repeat."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from conftest import DATASET, World

from nnunetv2_hiendmae.benchmark.splits import (
    BUDGETS_FILE,
    SPLITS_FILE,
    add_label_budgets,
    check_labels,
    labelled_subset,
    number_of_cases,
    split_index,
)

DATA = "nnUNetPlans_3d_fullres"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty training cases in fold 0, ten in fold 1."""
    splits = [
        {"train": [f"c{i:02d}" for i in range(20)], "val": ["v0", "v1"]},
        {"train": [f"c{i:02d}" for i in range(10)], "val": ["c18", "c19"]},
    ]
    (tmp_path / SPLITS_FILE).write_text(json.dumps(splits))
    return tmp_path


def splits_of(folder: Path) -> list[dict]:
    return json.loads((folder / SPLITS_FILE).read_text(encoding="utf-8"))


def test_budgets_are_nested_and_keep_the_validation_cases(folder: Path) -> None:
    before = splits_of(folder)
    assert add_label_budgets(folder, DATA, (0, 1), (1, 4, "50%", "all"), (0, 1)) == 12
    after = splits_of(folder)
    assert after[:2] == before
    for fold in (0, 1):
        for seed in (0, 1):
            one, four, half = (after[split_index(folder, fold, n, seed)] for n in (1, 4, "50%"))
            assert set(one["train"]) < set(four["train"]) < set(half["train"]) < set(before[fold]["train"])
            assert [len(s["train"]) for s in (one, four, half)] == [1, 4, len(before[fold]["train"]) // 2]
            assert all(s["val"] == before[fold]["val"] for s in (one, four, half))
    assert after[split_index(folder, 0, 4, 0)] != after[split_index(folder, 0, 4, 1)]
    assert split_index(folder, 1, "all", 0) == 1
    for no_fold in (-1, 2, len(after)):  # the second is an entry with one label
        with pytest.raises(ValueError, match=f"Fold {no_fold} is not among the folds"):
            split_index(folder, no_fold, "all", 0)


def test_twice_changes_nothing_and_more_is_appended(folder: Path) -> None:
    add_label_budgets(folder, DATA, (0,), (4,), (0,))
    first = (folder / SPLITS_FILE).read_bytes()
    assert add_label_budgets(folder, DATA, (0,), (4,), (0,)) == 0
    assert (folder / SPLITS_FILE).read_bytes() == first
    assert add_label_budgets(folder, DATA, (0,), (1, 4), (0,)) == 1
    assert splits_of(folder)[: len(json.loads(first))] == json.loads(first)


def test_missing_labels_are_named(folder: Path) -> None:
    """One that is not there, then volumes that were preprocessed without any."""
    (folder / "dataset.json").write_text('{"file_ending": ".nrrd"}')
    (folder / "gt_segmentations").mkdir()
    cases = {case for split in splits_of(folder) for part in split.values() for case in part}
    for case in cases - {"c07"}:
        (folder / "gt_segmentations" / f"{case}.nrrd").touch()
    with pytest.raises(ValueError, match=r"has no label of c07 \(1 of 22 cases\)"):
        check_labels(folder, DATA)
    (folder / "gt_segmentations" / "c07.nrrd").touch()
    (folder / DATA).mkdir()
    (folder / DATA / "c00.pkl").write_bytes(pickle.dumps({"class_locations": {}}))
    check_labels(folder, DATA)
    (folder / DATA / "c00.pkl").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="without labels; run 'nnUNetv2_preprocess"):
        check_labels(folder, DATA)


def test_changed_splits_are_noticed(folder: Path) -> None:
    add_label_budgets(folder, DATA, (0,), (4,), (0,))
    good = splits_of(folder)
    for index, kind, message in ((2, "train", "entry 2 is no longer"), (0, "val", "other validation cases")):
        splits = json.loads(json.dumps(good))
        splits[index][kind] = splits[index][kind][1:]
        (folder / SPLITS_FILE).write_text(json.dumps(splits))
        for call in (
            lambda: split_index(folder, 0, 4, 0),
            lambda: add_label_budgets(folder, DATA, (0,), (4,), (0,)),
        ):
            with pytest.raises(ValueError, match=message):
                call()
    (folder / SPLITS_FILE).write_text(json.dumps(good[:2]))
    with pytest.raises(ValueError, match=f"Restore it from {BUDGETS_FILE}"):
        split_index(folder, 0, 4, 0)


@pytest.mark.parametrize(
    ("fold", "labels", "message"),
    [
        (0, (21,), "needs more than the 20 training cases"),
        (2, (4,), "Fold 2 is not among the folds"),
        (0, ("1%", "5%"), "Label budgets 1% and 5% are both 1 of the 20 training cases of fold 0"),
        (0, (2, "10%"), "Label budgets 2 and 10% are both 2"),
    ],
)
def test_refused(folder: Path, fold: int, labels: tuple[int | str, ...], message: str) -> None:
    before = (folder / SPLITS_FILE).read_bytes()
    with pytest.raises(ValueError, match=message):
        add_label_budgets(folder, DATA, (fold,), labels, (0,))
    assert (folder / SPLITS_FILE).read_bytes() == before
    with pytest.raises(ValueError, match="has no 3 labels of fold 0"):
        split_index(folder, 0, 3, 0)


def test_subset_does_not_depend_on_the_order_of_the_file() -> None:
    cases = [f"c{i}" for i in range(9)]
    assert labelled_subset(cases, 3, 7) == labelled_subset(cases[::-1], 3, 7)
    assert (number_of_cases("1%", 45), number_of_cases("10%", 45), number_of_cases(45, 45)) == (1, 4, 45)


def test_folds_are_not_made_of_half_a_data_set(world: World, tmp_path: Path) -> None:
    """A preprocessing that was stopped must not decide which cases are tested on."""
    source = world.root / "preprocessed" / DATASET
    shutil.copytree(source / DATA, tmp_path / DATA)
    shutil.copy(source / "dataset.json", tmp_path)
    for file in (tmp_path / DATA).glob("phantom_003*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"has 5 of 6 cases\. Run 'nnUNetv2_preprocess' again first"):
        add_label_budgets(tmp_path, DATA, (0,), (1,), (0,))
    assert not (tmp_path / SPLITS_FILE).is_file()


@pytest.mark.slow
def test_without_a_split_file_nnunets_own_folds_are_made(world: World, tmp_path: Path) -> None:
    """They equal what nnU-Net wrote at its own first training."""
    source = world.root / "preprocessed" / DATASET
    (tmp_path / DATA).mkdir()
    for file in (source / DATA).iterdir():
        shutil.copy(file, tmp_path / DATA)
    add_label_budgets(tmp_path, DATA, (0,), (1,), (0,))
    if not (source / SPLITS_FILE).is_file():
        world.run("hiendmae_plan -d 901 -plans_name tiny --epochs 1 --num_iterations_per_epoch 1 --feature_size 4")
        world.run("nnUNetv2_train 901 3d_fullres 0 -tr nnUNetTrainerHiEndMAE_scratch -p tiny -device cpu")
    assert splits_of(tmp_path)[:5] == json.loads((source / SPLITS_FILE).read_text(encoding="utf-8"))[:5]


def test_patients_are_not_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases of each of ten patients: in nnU-Net's folds, in label budgets, and in folds made by others."""
    from nnunetv2_hiendmae.benchmark.splits import five_folds, labelled_subset, read_splits
    from nnunetv2_hiendmae.patients import read_patients, split_patients

    cases = [f"p{i}_{phase}" for i in range(10) for phase in "ab"]
    folder = tmp_path / "Dataset905_Phases"
    folder.mkdir()
    (folder / "patients.csv").write_text("case,patient\n" + "".join(f"{case},{case[:-2]}\n" for case in cases))
    table = read_patients(folder)
    folds = five_folds(cases, table)
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(cases)
    assert not any(split_patients((fold["train"], fold["val"]), table) for fold in folds)
    few, more = (labelled_subset(folds[0]["train"], n, 0, table) for n in (1, 3))
    assert set(few) < set(more) and len({case[:-2] for case in more}) == 3 and len(more) == 6
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    (folder / SPLITS_FILE).write_text(json.dumps([{"train": ["p0_a", "p1_a"], "val": ["p0_b"]}]))
    with pytest.raises(ValueError, match="of the same patient"):
        read_splits(folder, DATA)
    (folder / "patients.csv").write_text("case,patient\np0_a,P\np0_a,Q\n")
    with pytest.raises(ValueError, match="line 3"):
        read_patients(folder)
