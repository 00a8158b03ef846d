"""Run folders: configuration, checkpoints, and the exported encoder."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from nnunetv2.paths import nnUNet_preprocessed

from nnunetv2_hiendmae.folders import results_folder
from nnunetv2_hiendmae.weights import WEIGHTS_FILE, atomic_file, load_tensors, save_weights
from pretraining.config import RunConfig, plain
from pretraining.corpus import Corpus
from pretraining.model import HiEndMAE
from pretraining.provenance import read_provenance

LATEST = "checkpoint_latest.pth"
FINAL = "checkpoint_final.pth"
KEYS = {"network_weights", "optimizer_state", "grad_scaler_state", "step", "config"}
OLDER = "checkpoint_older_{}.pth"
"""1 is the one before the latest."""


def run_folder(dataset: str, plans: str, configuration: str, run: str) -> Path:
    """``nnUNet_results/DatasetXXX_Name/HiEndMAE__<plans>__<configuration>/<run>``.

    Raises:
        ValueError: ``run`` is no plain name, or ``nnUNet_results`` is not set.
    """
    if run in (".", "..") or Path(run).name != run:
        raise ValueError(f"-run '{run}' must be a name, not a path.")
    return results_folder() / dataset / f"HiEndMAE__{plans}__{configuration}" / run


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically. ``OSError`` if it cannot be written; an older one of that name then stays."""
    try:
        with atomic_file(path) as file:
            torch.save(state, file)
    except RuntimeError as error:
        if "DataLoader worker" in str(error.__context__):  # one died meanwhile, which interrupted the writing
            raise RuntimeError(str(error.__context__)) from None
        # torch's way to say that the disk is full
        raise OSError(f"{path} could not be written ({str(error).splitlines()[0]}); is the disk full?") from None


def save_latest(folder: Path, state: dict[str, Any], keep: int) -> None:
    """Write the latest checkpoint; the ``keep - 1`` before it move back one place."""
    fresh = folder / "checkpoint_new.pth"
    save_checkpoint(fresh, state)
    names = [LATEST, *(OLDER.format(i) for i in range(1, keep))]
    for newer, older in reversed(list(pairwise(names))):
        if (folder / newer).is_file():
            os.replace(folder / newer, folder / older)
    os.replace(fresh, folder / LATEST)


def remove_intermediate(folder: Path) -> None:
    """Once the final checkpoint is written, those before it are no longer needed."""
    for file in (folder / LATEST, *folder.glob(OLDER.format("*"))):
        file.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The run's newest checkpoint that can be read.

    A damaged one is reported and passed over for the one before it.

    Raises:
        ValueError: there is none, or all are damaged.
    """
    files = [folder / FINAL, folder / LATEST, *sorted(folder.glob(OLDER.format("*")))]
    problems = []
    for file in filter(Path.is_file, files):
        try:
            checkpoint = load_tensors(file)
            if not isinstance(checkpoint, dict) or not set(checkpoint) >= KEYS:
                raise ValueError(f"{file} is no checkpoint of hiendmae_pretrain.")
        except ValueError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            print(f"WARNING: {problem} Continuing from {file.name}, step {checkpoint['step']}.", flush=True)
        return checkpoint
    raise ValueError(" ".join(problems) or f"{folder} has no checkpoint.")


def refuse_other_config(saved: dict[str, Any], config: RunConfig) -> None:
    """``ValueError`` naming every field in which a continued run would differ."""
    flat_now, flat_saved = flatten(config.to_dict()), flatten(RunConfig.from_dict(saved).to_dict())
    changed = [f"{k}: {flat_saved[k]} → {flat_now[k]}" for k in sorted(flat_now) if flat_now[k] != flat_saved[k]]
    if changed:
        raise ValueError(
            f"--c continues a run as it was started, but these settings differ: {'; '.join(changed)}. "
            f"Repeat the original flags, or start another run with -run NAME."
        )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def provenance_of(dataset: str) -> dict[str, Any] | None:
    """The manifest of a data set that hiendmae_plan_and_preprocess made, if it is at hand."""
    return read_provenance(Path(str(nnUNet_preprocessed)) / dataset) if nnUNet_preprocessed.is_set() else None


def export_encoder(folder: Path, model: HiEndMAE, config: RunConfig, corpus: Corpus) -> str:
    """Write the encoder with its header as a weights file; returns the sha256. Its presence marks the run finished."""
    header = {
        "architecture": config.model.encoder.to_dict(),
        "pos_embed": "sincos",
        "window_hu": plain(config.window_hu),
        "img_size": plain(config.model.img_size),
        "spacing": {d.name: plain(d.spacing) for d in corpus.datasets},
        "datasets": [{"name": d.name, "cases": d.num_cases} for d in corpus.datasets],
        "steps": config.steps,
        "batch_size": config.batch_size,
        "decoder": config.model.decoder,
        "provenance": [m for m in (provenance_of(d.name) for d in corpus.datasets) if m is not None],
        "licence": "that of the training data; not stated",
    }
    encoder = {name: tensor.cpu() for name, tensor in model.encoder.state_dict().items()}
    return save_weights(folder / WEIGHTS_FILE, encoder, header)
