"""Whether cases of a benchmark were in the pre-training: fingerprints in the weights against those of the cases."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_hiendmae.benchmark.grid import Grid
from nnunetv2_hiendmae.benchmark.splits import read_splits
from nnunetv2_hiendmae.files import preprocessed_folder, read_json, read_plans
from nnunetv2_hiendmae.identity import Bits, Known, fingerprint, from_text
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW, plan_intensities
from nnunetv2_hiendmae.patients import patients_of
from nnunetv2_hiendmae.weights.file import load_weights

OVERLAP_FILE = "overlap.json"
State = list[str] | str
"""Cases that were in the pre-training, or why that is not known."""


def case_fingerprints(dataset: str, plans_name: str, configuration: str, cases: Iterable[str]) -> dict[str, Bits] | str:
    """Fingerprint of each preprocessed case; a sentence why not, where the plans do not keep HU."""
    base = preprocessed_folder(dataset)
    manager = PlansManager(read_plans(base / f"{plans_name}.json", ""))
    plan = manager.get_configuration(configuration)
    channel = plan_intensities(manager.plans, plan.configuration, DEFAULT_WINDOW)[0]
    if not channel.is_ct:
        return f"the first channel of {plans_name} has no HU"
    folder = str(base / plan.data_identifier)
    data = infer_dataset_class(folder)(folder)
    low, high = DEFAULT_WINDOW
    found = {}
    for case in cases:
        image = data.load_case(case)[0][0]
        hu = (image[:] * channel.scale + channel.shift) * (high - low) + low
        spacing = plan.spacing if len(plan.spacing) == 3 else (5.0, *plan.spacing)
        found[case] = fingerprint(hu, tuple(spacing))
    return found


def fingerprints_in(file: str) -> list[str] | None:
    """Those that a weights file carries; None for one of nnU-Net's, which an arm of nnU-Net may start from."""
    try:
        return load_weights(file).patients
    except ValueError:
        return None


def in_pretraining(texts: list[str] | None, cases: dict[str, Bits] | str, table: dict[str, str]) -> State:
    """Cases that were in the pre-training of some weights, or of whose patient another case was; else why not known."""
    if texts is None:
        return "the weights carry no fingerprints of their cases"
    if isinstance(cases, str):
        return cases
    known = Known()
    for i, text in enumerate(texts):
        known.add(str(i), from_text(text))
    hit = {case for case, bits in cases.items() if known.find(bits)}
    patients = {table[case] for case in hit if case in table}
    return sorted(case for case in cases if case in hit or table.get(case) in patients)


def find_overlap(grid: Grid, data_identifiers: dict[str, str]) -> dict[str, dict[str, State]]:
    """By weights file and data set: which test cases (validation cases of the grid's folds) were in the pre-training.

    Other cases of a test case's patient are looked for too; the result names the test cases alone.
    """
    files = dict.fromkeys(arm.weights for arm in grid.arms if arm.weights is not None)
    loaded = {file: fingerprints_in(file) for file in files}
    found: dict[str, dict[str, State]] = {str(file): {} for file in files}
    for dataset in grid.datasets if files else ():
        table, tests = patients_of(dataset), test_cases(grid, dataset, data_identifiers[dataset])
        patients = {table[case] for case in tests if case in table}
        cases = sorted(
            {*tests, *(case for case in present(dataset, data_identifiers[dataset]) if table.get(case) in patients)}
        )
        prints: dict[str, Bits] | str = {}
        if any(texts is not None for texts in loaded.values()):
            prints = case_fingerprints(dataset, grid.arms[0].plans, grid.configurations[0], cases)
        for file, texts in loaded.items():
            state = in_pretraining(texts, prints, table)
            found[str(file)][dataset] = state if isinstance(state, str) else [c for c in state if c in tests]
    return found


def test_cases(grid: Grid, dataset: str, data_identifier: str) -> set[str]:
    """Validation cases of the grid's folds. ``ValueError`` as ``read_splits``."""
    splits = read_splits(preprocessed_folder(dataset), data_identifier)
    return {case for fold in grid.folds if fold < len(splits) for case in splits[fold]["val"]}


def present(dataset: str, data_identifier: str) -> list[str]:
    """Preprocessed cases."""
    folder = str(preprocessed_folder(dataset) / data_identifier)
    return infer_dataset_class(folder).get_identifiers(folder)


def check_overlap(grid: Grid, data_identifiers: dict[str, str], allowed: bool) -> dict[str, dict[str, State]]:
    """What reports are to say of the overlap. ``ValueError`` if there is some and it was not allowed."""
    found = find_overlap(grid, data_identifiers)
    for file, states in found.items():
        for dataset, state in states.items():
            if isinstance(state, list) and state and not allowed:
                raise ValueError(
                    f"{len(state)} test case(s) of {dataset} were in the pre-training of {file}: {shown(state)}. "
                    f"Pre-train without them (hiendmae_ingest --exclude_overlap {dataset}), use other folds, or mark "
                    f"it in every report with --allow_overlap."
                )
    return found


def overlap_lines(grid: Grid, folder: Path) -> list[str]:
    """What every report says of the weights and the test cases; one line for each weights file and data set."""
    file = folder / OVERLAP_FILE
    found: dict[str, dict[str, State]] = read_json(file) if file.is_file() else {}
    lines = []
    for weights in dict.fromkeys(arm.weights for arm in grid.arms if arm.weights is not None):
        arms = ", ".join(arm.name for arm in grid.arms if arm.weights == weights)
        for dataset in grid.datasets:
            state = found.get(weights, {}).get(dataset, "not looked for; run 'hiendmae_benchmark plan' again")
            lines.append(f"Test cases of {dataset} in the pre-training of {arms}: {state_text(state)}.")
    return lines


def state_text(state: Any) -> str:
    """``none``, ``N OVERLAPPING: cases``, or ``unknown: reason``."""
    if isinstance(state, str):
        return f"unknown: {state}"
    return f"{len(state)} OVERLAPPING: {shown(state)}" if state else "none"


def shown(cases: list[str]) -> str:
    """The first names of a list."""
    return ", ".join(cases[:5]) + (f" and {len(cases) - 5} more" if len(cases) > 5 else "")
