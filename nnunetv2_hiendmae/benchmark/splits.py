"""Label budgets the nnU-Net way: further entries of ``splits_final.json`` with fewer training cases.

nnU-Net trains "fold" k with entry k of that list, so a label budget is an entry appended to it: the validation cases
of a fold, and a seeded subset of its training cases. The subsets of one seed are nested (1 in 4 in 16). Which entry is
which is remembered in a file beside it; existing entries are never changed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunetv2_hiendmae.benchmark.grid import ALL_LABELS
from nnunetv2_hiendmae.files import atomic_file, read_json
from nnunetv2_hiendmae.patients import PATIENTS, grouped, patients_of, split_patients

SPLITS_FILE = "splits_final.json"
BUDGETS_FILE = "hiendmae_label_budgets.json"

Split = dict[str, list[str]]
Entry = dict[str, Any]


def write_json(file: Path, data: Any) -> None:
    """Write JSON as nnU-Net does (4 spaces), whole or not at all."""
    with atomic_file(file) as out:
        out.write(json.dumps(data, indent=4).encode())


def read_splits(folder: Path, data_identifier: str) -> list[Split]:
    """The splits of a preprocessed data set; nnU-Net's own five folds are written first where there are none.

    Raises:
        ValueError: the data are not preprocessed, or not all of them.
    """
    file, table = folder / SPLITS_FILE, patients_of(folder.name)
    if not file.is_file():
        data = folder / data_identifier
        if not data.is_dir():
            raise ValueError(f"{data} does not exist. Run 'nnUNetv2_preprocess' for these plans first.")
        cases = sorted(infer_dataset_class(str(data)).get_identifiers(str(data)))
        description = folder / "dataset.json"
        expected = read_json(description).get("numTraining", 0) if description.is_file() else 0
        if len(cases) < expected:
            raise ValueError(f"{data} has {len(cases)} of {expected} cases. Run 'nnUNetv2_preprocess' again first.")
        write_json(file, five_folds(cases, table))
    splits: list[Split] = read_json(file)
    for i, split in enumerate(splits):
        torn = split_patients((split["train"], split["val"]), table)
        if torn:
            raise ValueError(
                f"{file}: entry {i} trains on and validates with cases of the same patient ({', '.join(torn[:5])}; see "
                f"{PATIENTS}). Move the file and the results made with it away; 'hiendmae_benchmark plan' then writes "
                f"folds that keep patients together."
            )
    return splits


def five_folds(cases: list[str], table: dict[str, str]) -> list[Split]:
    """As ``nnUNetTrainer.do_split`` would at the first training; patients with several cases are not split."""
    groups = grouped(cases, table)
    if len(groups) < 5:
        raise ValueError(f"{len(groups)} patients make no five folds; write {SPLITS_FILE} by hand.")
    of_first = {group[0]: group for group in groups}
    folds = generate_crossval_split(list(of_first), seed=12345, n_splits=5)
    return [{part: [c for first in fold[part] for c in of_first[first]] for part in ("train", "val")} for fold in folds]


def number_of_cases(labels: int | str, available: int) -> int:
    """Training cases of a label budget; a percentage is rounded, and is at least one case.

    Where patients.csv tells cases of one patient, what is counted are patients.

    Raises:
        ValueError: more than there are.
    """
    n = labels if isinstance(labels, int) else max(1, round(int(labels.removesuffix("%")) / 100 * available))
    if n > available:
        raise ValueError(f"A label budget of {labels} cases needs more than the {available} training cases there are.")
    return n


def labelled_subset(train: list[str], n: int, seed: int, table: dict[str, str] | None = None) -> list[str]:
    """``n`` of the training cases; those of a smaller ``n`` with the same seed are among them.

    Where ``table`` tells cases of one patient, ``n`` are patients, with all of their cases.
    """
    patients = grouped(sorted(train), table or {})
    order = np.random.default_rng(seed).permutation(len(patients))
    return sorted(case for i in order[:n] for case in patients[i])


def split_index(folder: Path, fold: int, labels: int | str, seed: int) -> int:
    """Entry of ``splits_final.json`` of a label budget that ``add_label_budgets`` wrote; the fold itself for 'all'.

    Raises:
        ValueError: no such fold or budget, or the splits changed since.
    """
    splits, entries = read_json(folder / SPLITS_FILE), read_entries(folder)
    check_entries(folder, splits, entries)
    check_fold(folder, fold, splits, entries)
    if labels == ALL_LABELS:
        return fold
    n = number_of_cases(labels, len(grouped(splits[fold]["train"], patients_of(folder.name))))
    for entry in entries:
        if (entry["fold"], entry["cases"], entry["seed"]) == (fold, n, seed):
            return entry["index"]
    raise ValueError(f"{folder / SPLITS_FILE} has no {labels} labels of fold {fold}; run 'hiendmae_benchmark plan'.")


def check_fold(folder: Path, fold: int, splits: list[Split], entries: list[Entry]) -> None:
    """``ValueError`` for a fold that is not there, or is an entry with fewer labels."""
    if not 0 <= fold < len(splits) or any(fold == e["index"] for e in entries):
        raise ValueError(f"Fold {fold} is not among the folds of {folder / SPLITS_FILE}.")


def read_entries(folder: Path) -> list[Entry]:
    """What ``add_label_budgets`` remembered: index, fold, cases, seed, train and val of each entry."""
    file = folder / BUDGETS_FILE
    return read_json(file) if file.is_file() else []


def check_entries(folder: Path, splits: list[Split], entries: list[Entry]) -> None:
    """``ValueError`` if a remembered entry is no longer what ``splits_final.json`` says."""
    for entry in entries:
        expected = {"train": entry["train"], "val": entry["val"]}
        if entry["index"] >= len(splits) or splits[entry["index"]] != expected:
            raise ValueError(
                f"{folder / SPLITS_FILE} changed: entry {entry['index']} is no longer the {entry['cases']} labelled "
                f"cases of fold {entry['fold']}, seed {entry['seed']}. Restore it from {BUDGETS_FILE}, or remove that "
                f"file and the results of these entries."
            )
        if splits[entry["fold"]]["val"] != entry["val"]:
            raise ValueError(
                f"{folder / SPLITS_FILE} changed: fold {entry['fold']} has other validation cases than when its label "
                f"budgets were made. Restore it, or remove {BUDGETS_FILE} and the results of these entries."
            )


def add_label_budgets(
    folder: Path, data_identifier: str, folds: tuple[int, ...], labels: tuple[int | str, ...], seeds: tuple[int, ...]
) -> int:
    """Append what is missing to ``splits_final.json``; returns how many entries that were.

    Safe to repeat: entries that exist are checked and kept. Two commands must not run at the same time.

    Raises:
        ValueError: no such fold, too few cases, budgets that come to the same number of cases, or splits that changed
            since they were written.
    """
    splits, entries = read_splits(folder, data_identifier), read_entries(folder)
    table = patients_of(folder.name)
    check_entries(folder, splits, entries)
    known = {(e["fold"], e["cases"], e["seed"]) for e in entries}
    before = len(entries)
    for fold in folds:
        check_fold(folder, fold, splits, entries)
        train, val = splits[fold]["train"], splits[fold]["val"]
        budgets: dict[int, int | str] = {}
        for budget in labels:
            if budget == ALL_LABELS:
                continue
            n = number_of_cases(budget, len(grouped(train, table)))
            if budgets.setdefault(n, budget) != budget:
                raise ValueError(
                    f"Label budgets {budgets[n]} and {budget} are both {n} of the {len(train)} training cases of fold "
                    f"{fold} of {folder.name}; leave one out."
                )
            for seed in seeds:
                if (fold, n, seed) in known:
                    continue
                split = {"train": labelled_subset(train, n, seed, table), "val": val}
                entries.append({"index": len(splits), "fold": fold, "cases": n, "seed": seed, **split})
                splits.append(split)
                known.add((fold, n, seed))
    if len(entries) > before:
        # In this order: were the second write lost, the first would only hold entries that nobody uses.
        write_json(folder / SPLITS_FILE, splits)
        write_json(folder / BUDGETS_FILE, entries)
    return len(entries) - before


def check_labels(folder: Path, data_identifier: str) -> None:
    """``ValueError`` if a case of the splits has no label, or the volumes were preprocessed without labels."""
    splits = read_splits(folder, data_identifier)
    cases = sorted({case for split in splits for kind in ("train", "val") for case in split[kind]})
    again = f"run 'nnUNetv2_preprocess -d {folder.name}' for these plans"
    labels, ending = folder / "gt_segmentations", read_json(folder / "dataset.json")["file_ending"]
    lacking = [case for case in cases if not (labels / f"{case}{ending}").is_file()]  # nnU-Net copied them there
    if lacking:
        shown = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        raise ValueError(
            f"{labels} has no label of {shown} ({len(lacking)} of {len(cases)} cases). Put them into labelsTr of "
            f"nnUNet_raw and {again}, or take these cases out of {folder / SPLITS_FILE}."
        )
    properties = folder / data_identifier / f"{cases[0]}.pkl"
    if properties.is_file() and "class_locations" not in load_pickle(str(properties)):
        raise ValueError(f"{properties.parent} was made by hiendmae_plan_and_preprocess, without labels; {again}.")


def split_sha256(split: Split) -> str:
    """Hash of which cases are trained on and which validated, whatever their order."""
    text = json.dumps({kind: sorted(split[kind]) for kind in ("train", "val")})
    return hashlib.sha256(text.encode()).hexdigest()
