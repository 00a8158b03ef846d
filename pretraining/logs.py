"""What a run leaves to be read while it goes on: metrics.jsonl, progress.png, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nnunetv2_hiendmae.files import atomic_file
from nnunetv2_hiendmae.probe.linear import MEAN
from pretraining.config import RunConfig
from pretraining.data.stream import Batch, canonical_crops
from pretraining.model import HiEndMAE
from pretraining.preview import draw_reconstructions, plot_progress

METRICS = "metrics.jsonl"
PREVIEWED = 4


class Recorder:
    """What the first rank tells: bar, metrics, pictures."""

    def __init__(self, config: RunConfig, start_step: int, folder: Path, crop_seconds: float | None) -> None:
        """``crop_seconds``: that all GPUs would need for a crop at the speed of a matrix product; None on the CPU."""
        self.config, self.folder, self.crop_seconds = config, folder, crop_seconds
        self.first, self.started = start_step, time.perf_counter()
        self.log = MetricsLog(folder, start_step, config)
        self.bar = tqdm(total=config.steps, initial=start_step, unit="step", disable=not sys.stderr.isatty())
        self.steps: list[tuple[float, float, float, float]] = []
        self.go_on()

    def go_on(self) -> None:
        """What was done since the last step, such as a validation, is not part of the next one's time."""
        self.clock = time.perf_counter()

    def step(self, step: int, loss: float, grad_norm: float, lr: float, waited: float) -> None:
        """After each step, for which the device ``waited`` so many seconds for data; a line every ``log_every``.

        A norm that is not finite stands for a step that fp16's loss scaling skipped; such steps are counted.
        """
        self.steps.append((loss, grad_norm, time.perf_counter() - self.clock, waited))
        self.go_on()
        self.bar.update()
        if step % self.config.log_every and step != self.config.steps:
            return
        losses, norms, times, waits = zip(*self.steps, strict=True)
        finite = [norm for norm in norms if math.isfinite(norm)]
        entry = {"loss": sum(losses) / len(losses), "lr": lr}
        entry |= {"grad_norm": sum(finite) / len(finite)} if finite else {}
        entry |= {"skipped_steps": len(norms) - len(finite)} if len(finite) < len(norms) else {}
        entry |= {
            "crops_per_s": len(times) * self.config.batch_size / sum(times),
            "data_wait": sum(waits) / sum(times),
        }
        entry |= {"of_matrix_product": entry["crops_per_s"] * self.crop_seconds} if self.crop_seconds else {}
        seconds_a_step = (time.perf_counter() - self.started) / (step - self.first)  # with all that is done between
        entry["hours_left"] = seconds_a_step * (self.config.steps - step) / 3600
        self.log.log(step=step, **entry)
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in entry.items()})
        self.steps = []

    def validation(self, step: int, values: dict[str, float]) -> None:
        """One line at each validation, also where there is no bar."""
        self.log.log(step=step, **values)
        self.log.plot_now_and_then()
        self.bar.write(
            f"step {step}/{self.config.steps}: held-out loss {values['val_loss']:.4f} "
            f"(predicting each patch's mean: {values['val_mean_patch_loss']:.4f})",
            file=sys.stdout,
        )
        sys.stdout.flush()
        self.go_on()

    def probe(self, step: int, values: dict[str, float]) -> None:
        """One line at each probe, with the first of the run beside it."""
        self.log.log(step=step, **values)
        self.log.plot_now_and_then()
        first = next(entry for entry in self.log.entries if MEAN in entry)
        self.bar.write(
            f"step {step}/{self.config.steps}: probe {values[MEAN]:.3f}, mean Dice of {len(values) - 1} organs "
            f"(step {first['step']}: {first[MEAN]:.3f})",
            file=sys.stdout,
        )
        sys.stdout.flush()
        self.go_on()

    def warn(self, problem: str) -> None:
        """A line that must not be overlooked."""
        self.bar.write(f"WARNING: {problem}", file=sys.stdout)
        sys.stdout.flush()

    def preview(self, step: int, model: HiEndMAE, batch: Batch, device: torch.device) -> None:
        """Picture of a held-out batch's first crops."""
        first = {name: values[:PREVIEWED] for name, values in batch.items()}
        image, ids_shuffle = canonical_crops(first, device), first["ids_shuffle"].to(device)
        file = self.folder / "previews" / f"step_{step:08d}.png"
        file.parent.mkdir(exist_ok=True)
        draw_reconstructions(model, image, ids_shuffle, file)
        self.go_on()

    def close(self) -> None:
        self.bar.close()
        self.log.plot()
        self.log.close()


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line; a continued run drops what lies beyond its checkpoint.

    The same values go to TensorBoard where it is installed, and to Weights & Biases where nnU-Net's environment
    variables ask for it (``nnUNet_wandb_enabled``, ``nnUNet_wandb_project``, ``nnUNet_wandb_mode``).
    """

    def __init__(self, folder: Path, start_step: int, config: RunConfig) -> None:
        self.folder = folder
        self.entries: list[dict[str, Any]] = []
        self.plotted = self.plot_seconds = 0.0
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

    def plot_now_and_then(self) -> None:
        """Draw ``progress.png``, in at most 1 % of the time, however long a run grows."""
        if time.monotonic() - self.plotted >= 100 * self.plot_seconds:
            self.plot()

    def plot(self) -> None:
        """Draw ``progress.png``."""
        started = time.monotonic()
        plot_progress(self.entries, self.folder / "progress.png")
        self.plotted = time.monotonic()
        self.plot_seconds = self.plotted - started

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
