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
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunetv2_hiendmae.benchmark.grid import ALL_LABELS
from nnunetv2_hiendmae.folders import read_json
from nnunetv2_hiendmae.weights import atomic_file

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
    file = folder / SPLITS_FILE
    if not file.is_file():
        data = folder / data_identifier
        if not data.is_dir():
            raise ValueError(f"{data} does not exist. Run 'nnUNetv2_preprocess' for these plans first.")
        cases = sorted(infer_dataset_class(str(data)).get_identifiers(str(data)))
        description = folder / "dataset.json"
        expected = read_json(description).get("numTraining", 0) if description.is_file() else 0
        if len(cases) < expected:
            raise ValueError(f"{data} has {len(cases)} of {expected} cases. Run 'nnUNetv2_preprocess' again first.")
        # as nnUNetTrainer.do_split would at the first training
        write_json(file, generate_crossval_split(cases, seed=12345, n_splits=5))
    return read_json(file)


def number_of_cases(labels: int | str, available: int) -> int:
    """Training cases of a label budget; a percentage is rounded, and is at least one case.

    Raises:
        ValueError: more than there are.
    """
    n = labels if isinstance(labels, int) else max(1, round(int(labels.removesuffix("%")) / 100 * available))
    if n > available:
        raise ValueError(f"A label budget of {labels} cases needs more than the {available} training cases there are.")
    return n


def labelled_subset(train: list[str], n: int, seed: int) -> list[str]:
    """``n`` of the training cases; those of a smaller ``n`` with the same seed are among them."""
    order = np.random.default_rng(seed).permutation(len(train))
    names = sorted(train)
    return sorted(names[i] for i in order[:n])


def split_index(folder: Path, fold: int, labels: int | str, seed: int) -> int:
    """Entry of ``splits_final.json`` of a label budget that ``add_label_budgets`` wrote; the fold itself for 'all'.

    Raises:
        ValueError: there is none, or the splits changed since.
    """
    if labels == ALL_LABELS:
        return fold
    splits, entries = read_json(folder / SPLITS_FILE), read_entries(folder)
    check_entries(folder, splits, entries)
    n = number_of_cases(labels, len(splits[fold]["train"]))
    for entry in entries:
        if (entry["fold"], entry["cases"], entry["seed"]) == (fold, n, seed):
            return entry["index"]
    raise ValueError(f"{folder / SPLITS_FILE} has no {labels} labels of fold {fold}; run 'hiendmae_benchmark plan'.")


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
    check_entries(folder, splits, entries)
    known = {(e["fold"], e["cases"], e["seed"]) for e in entries}
    before = len(entries)
    for fold in folds:
        if not 0 <= fold < len(splits) or any(fold == e["index"] for e in entries):
            raise ValueError(f"Fold {fold} is not among the folds of {folder / SPLITS_FILE}.")
        train, val = splits[fold]["train"], splits[fold]["val"]
        budgets: dict[int, int | str] = {}
        for budget in labels:
            if budget == ALL_LABELS:
                continue
            n = number_of_cases(budget, len(train))
            if budgets.setdefault(n, budget) != budget:
                raise ValueError(
                    f"Label budgets {budgets[n]} and {budget} are both {n} of the {len(train)} training cases of fold "
                    f"{fold} of {folder.name}; leave one out."
                )
            for seed in seeds:
                if (fold, n, seed) in known:
                    continue
                split = {"train": labelled_subset(train, n, seed), "val": val}
                entries.append({"index": len(splits), "fold": fold, "cases": n, "seed": seed, **split})
                splits.append(split)
                known.add((fold, n, seed))
    if len(entries) > before:
        # In this order: were the second write lost, the first would only hold entries that nobody uses.
        write_json(folder / SPLITS_FILE, splits)
        write_json(folder / BUDGETS_FILE, entries)
    return len(entries) - before


def split_sha256(split: Split) -> str:
    """Hash of which cases are trained on and which validated, whatever their order."""
    text = json.dumps({kind: sorted(split[kind]) for kind in ("train", "val")})
    return hashlib.sha256(text.encode()).hexdigest()
