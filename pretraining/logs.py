"""What a run leaves to be read while it goes on: metrics.jsonl, progress.png, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nnunetv2_hiendmae.weights import atomic_file
from pretraining.config import RunConfig
from pretraining.model import HiEndMAE
from pretraining.preview import draw_reconstructions, plot_progress
from pretraining.stream import Batch, canonical_crops

METRICS = "metrics.jsonl"
PREVIEWED = 4


class Recorder:
    """What the first rank tells: bar, metrics, pictures."""

    def __init__(self, config: RunConfig, start_step: int, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.log = MetricsLog(folder, start_step, config)
        self.bar = tqdm(total=config.steps, initial=start_step, unit="step", disable=not sys.stderr.isatty())
        self.steps: list[tuple[float, float, float]] = []

    def step(self, step: int, loss: float, lr: float, seconds: float, waited: float) -> None:
        """After each step of so many seconds, the first of which waited for data; a line every ``log_every``."""
        self.steps.append((loss, seconds, waited))
        self.bar.update()
        if step % self.config.log_every and step != self.config.steps:
            return
        losses, times, waits = zip(*self.steps, strict=True)
        entry = {"loss": sum(losses) / len(losses), "lr": lr}
        entry |= {
            "crops_per_s": len(times) * self.config.batch_size / sum(times),
            "data_wait": sum(waits) / sum(times),
        }
        self.log.log(step=step, **entry)
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in entry.items()})
        self.steps = []

    def validation(self, step: int, values: dict[str, float]) -> None:
        """One line at each validation, also where there is no bar."""
        self.log.log(step=step, **values)
        self.log.plot()
        self.bar.write(
            f"step {step}/{self.config.steps}: held-out loss {values['val_loss']:.4f} "
            f"(predicting each patch's mean: {values['val_mean_patch_loss']:.4f})",
            file=sys.stdout,
        )
        sys.stdout.flush()

    def preview(self, step: int, model: HiEndMAE, batch: Batch, device: torch.device) -> None:
        """Picture of a held-out batch's first crops."""
        first = {name: values[:PREVIEWED] for name, values in batch.items()}
        image, ids_shuffle = canonical_crops(first, device), first["ids_shuffle"].to(device)
        file = self.folder / "previews" / f"step_{step:08d}.png"
        file.parent.mkdir(exist_ok=True)
        draw_reconstructions(model, image, ids_shuffle, file)

    def close(self) -> None:
        self.bar.close()
        self.log.close()


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line; a continued run drops what lies beyond its checkpoint.

    The same values go to TensorBoard where it is installed, and to Weights & Biases where nnU-Net's environment
    variables ask for it (``nnUNet_wandb_enabled``, ``nnUNet_wandb_project``, ``nnUNet_wandb_mode``).
    """

    def __init__(self, folder: Path, start_step: int, config: RunConfig) -> None:
        self.folder = folder
        self.entries: list[dict[str, Any]] = []
        file = folder / METRICS
        if start_step and file.is_file():
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            self.entries = [entry for entry in lines if entry["step"] <= start_step]
        with atomic_file(file) as stream:
            stream.writelines(json.dumps(entry).encode() + b"\n" for entry in self.entries)
        self.tensorboard = open_tensorboard(folder, start_step)
        self.wandb = open_wandb(folder, config)

    def log(self, **entry: Any) -> None:
        self.entries.append(entry)
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        values = {k: v for k, v in entry.items() if k != "step"}
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, entry["step"])
        if self.wandb is not None:
            self.wandb.log(values, step=entry["step"])

    def plot(self) -> None:
        """Draw ``progress.png``."""
        plot_progress(self.entries, self.folder / "progress.png")

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def open_tensorboard(folder: Path, start_step: int) -> Any:
    """Event writer in the run folder, or None where TensorBoard is not installed (``pip install tensorboard``)."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)


def open_wandb(folder: Path, config: RunConfig) -> Any:
    """Weights & Biases run under nnU-Net's environment variables, or None.

    Raises:
        ValueError: asked for, but not installed.
    """
    if os.environ.get("nnUNet_wandb_enabled", "0").lower() not in ("1", "true"):
        return None
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("nnUNet_wandb_enabled is set, but wandb is not installed. Run 'pip install wandb'.")
    import wandb

    return wandb.init(
        project=os.environ.get("nnUNet_wandb_project", "nnunet"),
        mode=os.environ.get("nnUNet_wandb_mode", "online"),  # type: ignore[arg-type, unused-ignore]
        name=folder.name,
        dir=str(folder),
        config=config.to_dict(),
    )
