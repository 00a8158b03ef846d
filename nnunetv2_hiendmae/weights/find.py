"""Which weights file a training starts from when the user names one, and when nobody does."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_results

from nnunetv2_hiendmae.weights.file import WEIGHTS_FILE, load_tensors

PUBLISHED_DECODER = "hierarchical"
"""Pre-trainings with another decoder are controls."""
CHOOSE = (
    "Choose one with the environment variable HIENDMAE_WEIGHTS=FILE or with 'hiendmae_plan -d DATASET --weights FILE'"
)


def find_weights(named: str | None, by: str = "the plans") -> tuple[Path, str]:
    """The weights file to start from and why.

    The environment variable comes first, then the file ``named`` ``by`` the plans or something else, then the only
    finished pre-training under ``nnUNet_results``. Controls are never taken unless they are named.

    Raises:
        ValueError: none or several found, or the one named does not exist.
    """
    variable = os.environ.get("HIENDMAE_WEIGHTS")
    for source, name in (("the environment variable HIENDMAE_WEIGHTS", variable), (by, named)):
        if name:
            if not Path(name).is_file():
                raise ValueError(f"The weights file {name}, named by {source}, does not exist.")
            return Path(name), f"named by {source}"
    headers = {file: header_of(file) for file in finished_runs()}
    controls = {f: h for f, h in headers.items() if h.get("decoder", PUBLISHED_DECODER) != PUBLISHED_DECODER}
    others = {f: h for f, h in headers.items() if f not in controls}
    # Copies of one file are no choice. What has no readable header stands for itself.
    different = {header.get("sha256") or str(file): file for file, header in others.items()}
    if len(different) == 1:
        return next(iter(others)), "the only finished pre-training under nnUNet_results"
    if different:
        raise ValueError(f"Several finished pre-trainings under nnUNet_results: {listed(others)}. {CHOOSE}.")
    if controls:
        raise ValueError(f"All finished pre-trainings under nnUNet_results are controls: {listed(controls)}. {CHOOSE}.")
    raise ValueError(
        "No Hi-End-MAE weights found. Pre-train with 'hiendmae_pretrain -d DATASET', or convert the authors' "
        "checkpoint with 'hiendmae_import_weights official.pth -o weights.pth' and name it in the environment "
        "variable HIENDMAE_WEIGHTS or with 'hiendmae_plan -d DATASET --weights weights.pth'. To train without "
        "pre-trained weights choose -tr nnUNetTrainerHiEndMAE_scratch."
    )


def finished_runs() -> list[Path]:
    """The weights files of all pre-trainings under ``nnUNet_results``."""
    results = nnUNet_results.get()
    return sorted(Path(results).glob(f"Dataset*/HiEndMAE__*__*/*/{WEIGHTS_FILE}")) if results else []


def header_of(file: Path) -> dict[str, Any]:
    """A weights file's header, not checked against its tensors; empty if it cannot be read."""
    try:
        data = load_tensors(file)
    except ValueError:
        return {}
    header = data.get("header") if isinstance(data, dict) else None
    return header if isinstance(header, dict) else {}


def listed(headers: dict[Path, dict[str, Any]]) -> str:
    """Files with what tells them apart: data sets, steps, decoder, date."""
    return "; ".join(
        f"{file} ({', '.join(str(d.get('name')) for d in header.get('datasets', [])) or 'data sets not stated'}, "
        f"{header.get('steps', '?')} steps, decoder {header.get('decoder', PUBLISHED_DECODER)}, "
        f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(file.stat().st_mtime))})"
        for file, header in headers.items()
    )
