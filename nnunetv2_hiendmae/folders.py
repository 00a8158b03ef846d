"""nnU-Net's folders, with a user's mistake told in one sentence."""

from __future__ import annotations

from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name


def preprocessed_folder(dataset: str) -> Path:
    """``nnUNet_preprocessed/DatasetXXX_Name`` of a data set named or numbered.

    Raises:
        ValueError: nnU-Net knows no such data set, or ``nnUNet_preprocessed`` is not set.
    """
    if not nnUNet_preprocessed.is_set():
        raise ValueError("The environment variable nnUNet_preprocessed is not set; it names the preprocessed data.")
    try:
        # nnU-Net may return a numpy string, which a checkpoint of plain data must not hold.
        name = str(maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset))
    except RuntimeError as error:
        raise ValueError(f"-d {dataset}: {error}") from None
    return Path(str(nnUNet_preprocessed)) / name


def results_folder() -> Path:
    """``nnUNet_results``. ``ValueError`` if it is not set."""
    if not nnUNet_results.is_set():
        raise ValueError("The environment variable nnUNet_results is not set; it names the folder for results.")
    return Path(str(nnUNet_results))


def raw_folder(dataset: str) -> Path:
    """``nnUNet_raw/DatasetXXX_Name`` of a data set named or numbered.

    Raises:
        ValueError: nnU-Net knows no such data set, or ``nnUNet_raw`` is not set.
    """
    if not nnUNet_raw.is_set():
        raise ValueError("The environment variable nnUNet_raw is not set; it names the raw data.")
    try:
        name = str(maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset))
    except RuntimeError as error:
        raise ValueError(f"-d {dataset}: {error}") from None
    return Path(str(nnUNet_raw)) / name
