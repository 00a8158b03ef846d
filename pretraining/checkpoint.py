"""Run folders: config, checkpoints, metrics, and the exported encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from nnunetv2_hiendmae.folders import results_folder
from nnunetv2_hiendmae.weights import WEIGHTS_FILE, atomic_file, load_tensors, save_weights
from pretraining.config import RunConfig, plain
from pretraining.corpus import Corpus
from pretraining.model import HiEndMAE

LATEST = "checkpoint_latest.pth"
FINAL = "checkpoint_final.pth"
METRICS = "metrics.jsonl"


def run_folder(dataset: str, plans: str, configuration: str, run: str) -> Path:
    """``nnUNet_results/DatasetXXX_Name/HiEndMAE__<plans>__<configuration>/<run>``."""
    return results_folder() / dataset / f"HiEndMAE__{plans}__{configuration}" / run


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    with atomic_file(path) as file:
        torch.save(state, file)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The run's newest checkpoint, or None. ``ValueError`` if it is damaged."""
    for name in (FINAL, LATEST):
        if (folder / name).is_file():
            return load_tensors(folder / name)
    return None


def refuse_other_config(saved: dict[str, Any], config: RunConfig) -> None:
    """``ValueError`` naming every field in which a continued run would differ."""
    now = config.to_dict()
    flat_now, flat_saved = flatten(now), flatten(saved)
    changed = [
        f"{k}: {flat_saved.get(k)} → {flat_now.get(k)}"
        for k in sorted(flat_now.keys() | flat_saved.keys())
        if flat_now.get(k) != flat_saved.get(k)
    ]
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


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line; a continued run drops what lies beyond its checkpoint."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self.file = folder / METRICS
        self.entries: list[dict[str, Any]] = []
        if start_step and self.file.is_file():
            lines = [json.loads(line) for line in self.file.read_text().splitlines() if line.endswith("}")]
            self.entries = [entry for entry in lines if entry["step"] <= start_step]
        with atomic_file(self.file) as file:
            file.writelines(json.dumps(entry).encode() + b"\n" for entry in self.entries)

    def log(self, **entry: Any) -> None:
        self.entries.append(entry)
        with open(self.file, "a") as file:
            file.write(json.dumps(entry) + "\n")


def export_encoder(folder: Path, model: HiEndMAE, config: RunConfig, corpus: Corpus) -> str:
    """Write the encoder with its header as a weights file; returns the sha256. Its presence marks the run finished."""
    header = {
        "architecture": config.model.encoder.to_dict(),
        "pos_embed": "sincos",
        "window_hu": plain(config.window_hu),
        "img_size": plain(config.model.img_size),
        "spacing": {d.name: plain(d.spacing) for d in corpus.datasets},
        "datasets": [{"name": d.name, "cases": len(d.cases)} for d in corpus.datasets],
        "steps": config.steps,
        "batch_size": config.batch_size,
        "licence": "that of the training data; not stated",
    }
    encoder = {name: tensor.cpu() for name, tensor in model.encoder.state_dict().items()}
    return save_weights(folder / WEIGHTS_FILE, encoder, header)
