"""Run folders: configuration, checkpoints, and the exported encoder."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from nnunetv2.paths import nnUNet_preprocessed

from nnunetv2_hiendmae.files import atomic_file, read_json, results_folder
from nnunetv2_hiendmae.weights.file import WEIGHTS_FILE, load_tensors, non_finite, save_weights
from pretraining.config import RunConfig, plain
from pretraining.data.corpus import Corpus
from pretraining.data.fingerprints import fingerprints_of
from pretraining.model import HiEndMAE
from pretraining.prepare.provenance import read_provenance

LATEST = "checkpoint_latest.pth"
FINAL = "checkpoint_final.pth"
MUST_BE_FINITE = ("network_weights", "optimizer_state")
KEYS = {"network_weights", "optimizer_state", "grad_scaler_state", "step", "config"}
ANCESTRY = "ancestry.json"
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


def open_run(folder: Path, resume: bool) -> None:
    """Make the run's folder. ``ValueError`` if there is nothing to continue, or something to lose."""
    exists = any((folder / name).is_file() for name in (LATEST, FINAL))
    if resume and not exists and not any(folder.glob(OLDER.format("*"))):
        raise ValueError(f"--c: {folder} has no checkpoint to continue from. Leave --c out to start the run.")
    if exists and not resume:
        raise ValueError(f"{folder} holds a run already. Continue it with --c, or choose another name with -run.")
    folder.mkdir(parents=True, exist_ok=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically; if that fails, an older one of that name stays.

    Raises:
        OSError: it cannot be written.
        FloatingPointError: weights or optimizer state are not finite; names a tensor.
    """
    bad = non_finite({key: state[key] for key in MUST_BE_FINITE})
    if bad:
        raise FloatingPointError(f"{bad} is not finite after step {state['step']}; {path.name} was not written")
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

    A damaged one, or one that is not finite, is reported and passed over for the one before it.

    Raises:
        ValueError: there is none, or all are damaged or not finite.
    """
    files = [folder / FINAL, folder / LATEST, *sorted(folder.glob(OLDER.format("*")))]
    problems = []
    for file in filter(Path.is_file, files):
        try:
            checkpoint = checked(load_tensors(file), file)
        except ValueError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            print(f"WARNING: {problem} Continuing from {file.name}, step {checkpoint['step']}.", flush=True)
        return checkpoint
    raise ValueError(" ".join([*problems, f"{folder} has no sound checkpoint."]))


def is_checkpoint(content: Any) -> bool:
    """Whether a file's content is that of a pre-training."""
    return isinstance(content, dict) and set(content) >= KEYS


def checked(content: Any, file: Path) -> dict[str, Any]:
    """The content of a checkpoint. ``ValueError`` if it is none, or not finite."""
    if not is_checkpoint(content):
        raise ValueError(f"{file} is no checkpoint of hiendmae_pretrain.")
    bad = non_finite({key: content[key] for key in MUST_BE_FINITE})
    if bad:
        raise ValueError(f"{file} holds values that are not finite ({bad}).")
    return content


def write_ancestry(folder: Path, ancestry: list[dict[str, Any]]) -> None:
    """Keep what a run started from in its folder until the weights are exported, through interruptions."""
    with atomic_file(folder / ANCESTRY) as stream:
        stream.write(json.dumps(ancestry, indent=2).encode())


def read_ancestry(folder: Path, config: RunConfig) -> list[dict[str, Any]]:
    """What the run in a folder started from, nearest first; empty if from random weights."""
    return read_json(folder / ANCESTRY) if config.init is not None else []


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


def positions_of(model: HiEndMAE) -> dict[str, Any]:
    """What the header says of the encoder's position embedding."""
    if model.config.encoder.positions not in model.encoder.state_dict():
        return {"pos_embed": "sincos"}
    return {"pos_embed": "learned", "pos_embed_grid": plain(model.config.grid)}


def weights_name(config: RunConfig, step: int) -> str:
    """Name of the weights file after ``step``: that of a finished run is found by itself, another is not."""
    return WEIGHTS_FILE if step == config.steps else f"encoder_weights_step_{step}.pth"


def with_ancestors(patients: dict[str, list[str]], ancestry: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The cases that the weights saw, by data set: the run's own, and those of what it started from."""
    found = dict(patients)
    for origin in ancestry:
        for name, fingerprints in (origin.pop("patients", None) or {}).items():
            found[name] = sorted({*found.get(name, []), *fingerprints})
    return found


def export_encoder(folder: Path, model: HiEndMAE, config: RunConfig, corpus: Corpus, step: int) -> str:
    """Write the encoder after ``step`` with its header as a weights file; returns the sha256.

    ``encoder_weights.pth`` marks the run finished; the header of another says ``unfinished``.
    """
    ancestry = read_ancestry(folder, config)
    header = {
        "architecture": config.model.encoder.to_dict(),
        **positions_of(model),
        "window_hu": plain(config.window_hu),
        "img_size": plain(config.model.img_size),
        "spacing": {d.name: plain(d.spacing) for d in corpus.datasets},
        "datasets": [{"name": d.name, "cases": d.num_cases} for d in corpus.datasets],
        "steps": step,
        **({"unfinished": f"step {step} of {config.steps}"} if step < config.steps else {}),
        "recipe": {name: getattr(config, name) for name in ("base_lr", "warmup_steps", "weight_init", "recipe")},
        "batch_size": config.batch_size,
        "decoder": config.model.decoder,
        "provenance": [m for m in (provenance_of(d.name) for d in corpus.datasets) if m is not None],
        "patients": with_ancestors(fingerprints_of(corpus, config.window_hu), ancestry),
        "ancestry": ancestry,
        "licence": f"that of the training data{' and of what it started from (ancestry)' * bool(ancestry)}; not stated",
    }
    encoder = {name: tensor.cpu() for name, tensor in model.encoder.state_dict().items()}
    return save_weights(folder / weights_name(config, step), encoder, header)
