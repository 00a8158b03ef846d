"""What went into a data set: one line a case while preprocessing, a manifest at the end, its summary in the weights."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed

from nnunetv2_hiendmae import __version__
from nnunetv2_hiendmae.files import atomic_file, read_json

MANIFEST = "hiendmae_manifest.json"
EXCLUDED_CASES = "hiendmae_excluded.json"
CASES = "hiendmae_cases_{}.jsonl"
"""One file a part (-part_id), so that the nodes of a cluster do not write into one file."""


def record_case(folder: Path, part_id: int, entry: dict[str, Any]) -> None:
    """Append a case's name, content hash and spacing."""
    with open(folder / CASES.format(part_id), "a", encoding="utf-8") as stream:
        stream.write("\n" + json.dumps({**entry, "time": time.time()}) + "\n")  # also behind half a line


def recorded_cases(folder: Path) -> list[dict[str, Any]]:
    """What ``record_case`` wrote, for all parts; of a case that was done twice the newer one last."""
    entries = []
    for file in sorted(folder.glob(CASES.format("*"))):
        for line in file.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a full disk may leave half a line
                entry = json.loads(line)
                if isinstance(entry, dict) and "case" in entry:
                    entries.append(entry)
    return sorted(entries, key=lambda entry: entry.get("time", 0))  # an earlier version noted none


def write_manifest(plans_file: Path, raw: Path, description: dict[str, Any], cases: set[str], part_id: int) -> None:
    """Summary of the cases preprocessed so far: counts, a hash over all content hashes, spacings, licence, source."""
    folder = plans_file.parent
    entries = {entry["case"]: entry for entry in recorded_cases(folder) if entry["case"] in cases}
    digest = hashlib.sha256("\n".join(sorted(e["sha256"] for e in entries.values())).encode()).hexdigest()
    spacings = np.array([e["spacing"] for e in entries.values()])
    settings = raw / "ingest_settings.json"
    manifest = {
        "dataset": folder.name,
        "cases": len(entries),
        "content_sha256": digest,
        "spacing_min": spacings.min(0).tolist() if len(spacings) else None,
        "spacing_median": np.median(spacings, 0).tolist() if len(spacings) else None,
        "spacing_max": spacings.max(0).tolist() if len(spacings) else None,
        "plans": plans_file.stem,
        "licence": description.get("licence", "not stated"),
        "reference": description.get("reference", "not stated"),
        "excluded_overlap": read_json(settings)["exclude_overlap"] if settings.is_file() else [],
        "version": __version__,
    }
    with atomic_file(folder / MANIFEST, f".{part_id}.tmp") as stream:  # other parts may end at the same moment
        stream.write(json.dumps(manifest, indent=2).encode())


def mark_excluded(dataset: str, cases: set[str]) -> list[str]:
    """Note beside a data set's preprocessed volumes which cases must not be used; returns what to tell the user."""
    folder = Path(str(nnUNet_preprocessed)) / dataset if nnUNet_preprocessed.is_set() else None
    if folder is None or not folder.is_dir() or not (cases or (folder / EXCLUDED_CASES).is_file()):
        return []
    with atomic_file(folder / EXCLUDED_CASES) as stream:
        stream.write(json.dumps(sorted(cases), indent=2).encode())
    made = sorted(case for case in cases if any(folder.glob(f"*/{case}.b2nd")))
    if not made:
        return []
    return [
        f"WARNING: {len(made)} case(s) that are refused now are preprocessed already and will not be trained on: "
        f"{', '.join(made)}. 'hiendmae_plan_and_preprocess -d {dataset}' removes them; "
        "what was packed from them must be packed again."
    ]


def excluded_cases(folder: Path) -> set[str]:
    """Cases of a preprocessed data set that ingest refuses by now: to be kept out, or changed."""
    file = folder / EXCLUDED_CASES
    return set(read_json(file)) if file.is_file() else set()


def remove_excluded(volumes: Path) -> None:
    """Delete the preprocessed volumes of excluded cases; their images are kept in the raw data set."""
    for case in excluded_cases(volumes.parent):
        remove_case(volumes, case)


def remove_case(volumes: Path, case: str) -> None:
    """Delete a case's preprocessed volumes."""
    for end in (".b2nd", "_seg.b2nd", ".pkl"):
        (volumes / f"{case}{end}").unlink(missing_ok=True)


def refuse_excluded(dataset: str, cases: Iterable[str], remedy: str) -> None:
    """``ValueError`` if cases that a run would use were excluded meanwhile."""
    if not nnUNet_preprocessed.is_set():
        return
    bad = sorted(excluded_cases(Path(str(nnUNet_preprocessed)) / dataset).intersection(cases))
    if bad:
        raise ValueError(
            f"{dataset}: hiendmae_ingest refuses by now {', '.join(bad[:5])}"
            f"{f' and {len(bad) - 5} more' if len(bad) > 5 else ''}, but the data hold them still. {remedy}"
        )


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """The manifest of a preprocessed data set, or None where nnU-Net preprocessed it."""
    file = folder / MANIFEST
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
