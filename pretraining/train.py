"""The pre-training loop, in plain sight."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nnunetv2_hiendmae.optim import decay_groups, warmup_cosine
from pretraining.checkpoint import (
    FINAL,
    LATEST,
    MetricsLog,
    export_encoder,
    load_checkpoint,
    refuse_other_config,
    save_checkpoint,
)
from pretraining.config import RunConfig
from pretraining.corpus import Corpus
from pretraining.model import HiEndMAE
from pretraining.preview import plot_progress
from pretraining.stream import HELD_OUT, CropStream, held_out_batches, split_cases, train_loader

HELD_OUT_CROPS = 64
LOG_EVERY = 10


@dataclass
class TrainState:
    """All that changes while training."""

    model: HiEndMAE
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0

    @classmethod
    def create(cls, config: RunConfig, device: torch.device) -> TrainState:
        """Fresh weights from the config's seed."""
        torch.manual_seed(config.seed)
        model = HiEndMAE(config.model).to(device)
        groups = decay_groups(model.named_parameters(), config.weight_decay, divided=not config.decay_all)
        optimizer = torch.optim.AdamW(groups, config.base_lr, betas=(0.9, 0.95), fused=device.type == "cuda")
        return cls(model, optimizer, torch.amp.GradScaler(device.type, enabled=device.type == "cuda"))

    def to_dict(self, config: RunConfig) -> dict[str, Any]:
        """Plain data and tensors."""
        return {
            "network_weights": self.model.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.scaler.state_dict(),
            "step": self.step,
            "config": config.to_dict(),
        }

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Inverse of ``to_dict``."""
        self.model.load_state_dict(checkpoint["network_weights"])
        self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        self.scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self.step = checkpoint["step"]


def train(config: RunConfig, corpus: Corpus, folder: Path, device: torch.device, num_workers: int, resume: bool) -> str:
    """Pre-train, or continue, in a run folder; returns the sha256 of the exported encoder.

    Raises:
        ValueError: continued with another config, or a checkpoint is damaged.
        FloatingPointError: the loss is not finite; names the step, cases and crop positions.
    """
    state = TrainState.create(config, device)
    checkpoint = load_checkpoint(folder) if resume else None
    if checkpoint is not None:
        refuse_other_config(checkpoint["config"], config)
        state.restore(checkpoint)
    train_cases, held_out_cases = split_cases(corpus, config.seed)
    loader = train_loader(CropStream(corpus, config, train_cases), state.step, num_workers, device.type == "cuda")
    held_out = held_out_batches(CropStream(corpus, config, held_out_cases, HELD_OUT), HELD_OUT_CROPS)
    log = MetricsLog(folder, state.step)

    batches = iter(loader)
    bar = tqdm(total=config.steps, initial=state.step, unit="step", disable=not sys.stderr.isatty())
    window_start, waited, losses = time.perf_counter(), 0.0, []
    while state.step < config.steps:
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked

        lr = config.base_lr * warmup_cosine(state.step, config.steps, config.warmup_fraction * config.steps)
        loss = train_step(state, batch, lr, device)
        if not loss.isfinite():
            raise FloatingPointError(describe_batch(corpus, batch, state.step, loss))
        state.step += 1
        losses.append(loss.item())
        bar.update()

        if state.step % LOG_EVERY == 0 or state.step == config.steps:
            seconds = time.perf_counter() - window_start
            entry = {"loss": sum(losses) / len(losses), "lr": lr}
            entry |= {"crops_per_s": len(losses) * config.batch_size / seconds, "data_wait": waited / seconds}
            log.log(step=state.step, **entry)
            bar.set_postfix({k: f"{v:.3g}" for k, v in entry.items()})
            window_start, waited, losses = time.perf_counter(), 0.0, []
        if state.step % config.val_every == 0 or state.step == config.steps:
            log.log(step=state.step, **evaluate(state.model, held_out, device))
            plot_progress(log.entries, folder / "progress.png")
            save_checkpoint(folder / LATEST, state.to_dict(config))
            report_progress(bar, log.entries[-1], config)
            window_start = time.perf_counter()
    bar.close()
    save_checkpoint(folder / FINAL, state.to_dict(config))
    (folder / LATEST).unlink(missing_ok=True)
    return export_encoder(folder, state.model, config, corpus)


def train_step(state: TrainState, batch: dict[str, Any], lr: float, device: torch.device) -> Tensor:
    """One optimizer step; returns the loss (scalar, detached). A non-finite loss changes nothing."""
    image = batch["image"].to(device, non_blocking=True)
    ids_shuffle = batch["ids_shuffle"].to(device, non_blocking=True)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.model.train()
    with torch.autocast(device.type, enabled=device.type == "cuda"):
        loss = state.model(image, ids_shuffle).loss
    if loss.isfinite():
        state.optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
    return loss.detach()


@torch.no_grad()
def evaluate(model: HiEndMAE, batches: list[dict[str, Any]], device: torch.device) -> dict[str, float]:
    """Held-out loss, and that of predicting each patch's mean, which is below 1 where patches are constant."""
    model.eval()
    losses, means, count = 0.0, 0.0, 0
    for batch in batches:
        image, ids = batch["image"].to(device), batch["ids_shuffle"].to(device)
        with torch.autocast(device.type, enabled=device.type == "cuda"):
            losses += model(image, ids).loss.item() * len(image)
        means += model.mean_patch_loss(image, ids).item() * len(image)
        count += len(image)
    return {"val_loss": losses / count, "val_mean_patch_loss": means / count}


def report_progress(bar: tqdm, entry: dict[str, Any], config: RunConfig) -> None:
    """One line at each validation, also where there is no bar."""
    bar.write(
        f"step {entry['step']}/{config.steps}: held-out loss {entry['val_loss']:.4f} "
        f"(predicting each patch's mean: {entry['val_mean_patch_loss']:.4f})",
        file=sys.stdout,
    )


def describe_batch(corpus: Corpus, batch: dict[str, Any], step: int, loss: Tensor) -> str:
    """What a user needs to find the crop behind a non-finite loss."""
    pairs = zip(batch["case"].tolist(), batch["start"].tolist(), strict=True)
    crops = ", ".join(f"{corpus.name(case)} at {start}" for case, start in pairs)
    return f"The loss is {loss.item()} at step {step + 1}; no step was taken. Crops (case at first voxel): {crops}."
