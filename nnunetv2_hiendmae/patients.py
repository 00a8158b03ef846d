"""Which cases of a data set are of one patient: ``patients.csv`` in its raw folder, columns case and patient."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from nnunetv2_hiendmae.files import preprocessed_root, raw_root

PATIENTS = "patients.csv"


def read_patients(folder: Path) -> dict[str, str]:
    """Case to patient, for the cases that the table names; empty where there is none.

    Raises:
        ValueError: no such columns, an empty value, or a case with two patients; names file and line.
    """
    file, table = folder / PATIENTS, dict[str, str]()
    if not file.is_file():
        return {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream, skipinitialspace=True)
            for row in rows:
                case, patient = (str(row[name] or "").strip() for name in ("case", "patient"))
                if not case or not patient or table.setdefault(case, patient) != patient:
                    raise ValueError(f"line {rows.line_num}: '{case}' and '{patient}'")
    except (KeyError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError(
            f"{file} must have the columns case,patient, with one patient for each case ({error})."
        ) from None
    return table


def patients_of(dataset: str) -> dict[str, str]:
    """The table of ``DatasetXXX_Name``: that of its raw folder, else a copy beside the preprocessed data."""
    for root in (raw_root, preprocessed_root):
        try:
            folder = root() / dataset
        except ValueError:  # a machine for training may have no raw data
            continue
        if (folder / PATIENTS).is_file():
            return read_patients(folder)
    return {}


def split_patients(parts: Iterable[Iterable[str]], table: dict[str, str]) -> list[str]:
    """Patients with cases in more than one part, sorted."""
    seen: dict[str, set[int]] = {}
    for i, cases in enumerate(parts):
        for case in cases:
            if case in table:
                seen.setdefault(table[case], set()).add(i)
    return sorted(patient for patient, places in seen.items() if len(places) > 1)


def grouped(cases: Iterable[str], table: dict[str, str]) -> list[list[str]]:
    """Cases by patient, those of one patient together, in the order of their first; a case that the table does not
    name is a patient of its own."""
    groups: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        groups.setdefault(("patient", table[case]) if case in table else ("case", case), []).append(case)
    return list(groups.values())
