"""Dataset505: labels are drawn from the cases of Dataset501, and the test cases are those of Dataset504.

Links the raw files, writes the one split, and prints the preprocessed folder. Safe to repeat.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from nnunetv2_hiendmae.benchmark.splits import write_json

LABELLED, TEST, STUDY = "Dataset501_OpenKBP", "Dataset504_OpenKBPTest", "Dataset505_OpenKBPStudy"


def main() -> None:
    raw, preprocessed = (Path(os.environ[name]).absolute() for name in ("nnUNet_raw", "nnUNet_preprocessed"))
    cases: dict[str, list[str]] = {}
    for source in (LABELLED, TEST):
        for kind in ("imagesTr", "labelsTr"):
            (raw / STUDY / kind).mkdir(parents=True, exist_ok=True)
            for file in sorted((raw / source / kind).glob("*.nii.gz")):
                link = raw / STUDY / kind / file.name
                if not link.exists():
                    link.symlink_to(file)
        cases[source] = sorted(f.name.removesuffix(".nii.gz") for f in (raw / source / "labelsTr").glob("*.nii.gz"))
        if not cases[source]:
            sys.exit(f"study_data.py: {raw / source} has no labelsTr/*.nii.gz; copy the data set there.")
    description = json.loads((raw / LABELLED / "dataset.json").read_text(encoding="utf-8"))
    description["numTraining"] = sum(map(len, cases.values()))
    (preprocessed / STUDY).mkdir(parents=True, exist_ok=True)
    for folder in (raw / STUDY, preprocessed / STUDY):
        write_json(folder / "dataset.json", description)
    splits = preprocessed / STUDY / "splits_final.json"
    if not splits.exists():  # the benchmark appends label budgets
        write_json(splits, [{"train": cases[LABELLED], "val": cases[TEST]}])
    print(preprocessed / STUDY)


if __name__ == "__main__":
    main()
