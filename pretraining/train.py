"""The pre-training loop, in plain sight."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from nnunetv2_hiendmae.architectures.blocks import Block, CrossAttentionBlock
from nnunetv2_hiendmae.optim import decay_groups, warmup_cosine
from pretraining import distributed
from pretraining.checkpoint import (
    FINAL,
    export_encoder,
    load_checkpoint,
    refuse_other_config,
    remove_intermediate,
    save_checkpoint,
    save_latest,
)
from pretraining.config import RunConfig, Runtime
from pretraining.corpus import Corpus
from pretraining.logs import Recorder
from pretraining.model import HiEndMAE
from pretraining.stream import (
    HELD_OUT,
    Batch,
    CropStream,
    MicroBatches,
    canonical_crops,
    held_out_batches,
    split_cases,
    steps_of_epochs,
    train_loader,
)

HELD_OUT_CROPS, HELD_OUT_BATCH = 64, 16
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass
class TrainState:
    """All that changes while training. Crops and masks follow from the step, so no generator state is part of it."""

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
        optimizer = torch.optim.AdamW(groups, config.base_lr, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu"))
        return cls(model, optimizer, torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"))

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


def train(
    config: RunConfig, runtime: Runtime, corpus: Corpus, folder: Path, device: torch.device, resume: bool
) -> str | None:
    """Pre-train, or continue, in a run folder, as one rank of the process group.

    Returns:
        The sha256 of the encoder that the first rank exported; None on the other ranks, and if a scheduler's signal
        asked for an early end, after a checkpoint.

    Raises:
        ValueError: continued with another config, or all checkpoints are damaged.
        FloatingPointError: the loss is not finite; names the step, cases and crop positions.
        KeyboardInterrupt: Ctrl-C, after a checkpoint.
    """
    state = begin_or_continue(config, folder, device, resume)
    network = prepare_network(state.model, runtime, device)
    train_cases, held_out_cases = split_cases(corpus, config.seed)
    batches = train_batches(config, runtime, CropStream(corpus, config, train_cases), state.step, device)
    held_out_size = min(runtime.micro_batch(config.batch_size, distributed.world_size()), HELD_OUT_BATCH)
    held_out = held_out_batches(CropStream(corpus, config, held_out_cases, HELD_OUT), HELD_OUT_CROPS, held_out_size)
    preview_every = steps_of_epochs(config.preview_epochs, len(train_cases), config.batch_size, config.crops_per_case)
    record = Recorder(config, state.step, folder) if distributed.rank() == 0 else None

    with stop_signals() as stop:
        while state.step < config.steps:
            started = time.perf_counter()
            step_batches = [next(batches) for _ in range(runtime.accumulate)]
            waited = time.perf_counter() - started

            lr = config.base_lr * warmup_cosine(state.step, config.steps, config.warmup_fraction * config.steps)
            loss = backward(state, network, step_batches, config, device)
            loss, stopped = distributed.mean(torch.stack([loss, loss.new_tensor(bool(stop))])).tolist()
            if not math.isfinite(loss):
                raise FloatingPointError(report_non_finite(state, step_batches, config, corpus, folder, device))
            update(state, lr, config)

            if record:
                record.step(state.step, loss, lr, time.perf_counter() - started, waited)
            if state.step % config.val_every == 0 or state.step == config.steps:
                values = evaluate(state.model, held_out, config, device)
                if record:
                    record.validation(state.step, values)
                    save_latest(folder, state.to_dict(config), runtime.keep_checkpoints)
            if record and config.preview_epochs and (state.step % preview_every == 0 or state.step == config.steps):
                record.preview(state.step, state.model, held_out[0], device)
            if stopped and state.step < config.steps:
                if record:
                    save_latest(folder, state.to_dict(config), runtime.keep_checkpoints)
                    record.close()
                    print(f"Stopped after step {state.step}; checkpoint written. The same command with --c continues.")
                    sys.stdout.flush()
                if stop.signal == signal.SIGINT:
                    raise KeyboardInterrupt
                return None
    if record is None:
        return None
    record.close()
    save_checkpoint(folder / FINAL, state.to_dict(config))
    remove_intermediate(folder)
    return export_encoder(folder, state.model, config, corpus)


def begin_or_continue(config: RunConfig, folder: Path, device: torch.device, resume: bool) -> TrainState:
    """Fresh weights, or those of the run's latest checkpoint. ``ValueError`` if that has another config."""
    state = TrainState.create(config, device)
    if resume:
        checkpoint = load_checkpoint(folder)
        refuse_other_config(checkpoint["config"], config)
        state.restore(checkpoint)
    return state


def train_batches(
    config: RunConfig, runtime: Runtime, stream: CropStream, step: int, device: torch.device
) -> Iterator[Batch]:
    """This rank's micro-batches of the steps after ``step``."""
    place = (runtime.accumulate, distributed.rank(), distributed.world_size())
    sampler = MicroBatches(step, config.steps, config.batch_size, *place)
    return iter(train_loader(stream, sampler, runtime.num_workers, device.type == "cuda"))


def prepare_network(model: HiEndMAE, runtime: Runtime, device: torch.device) -> nn.Module:
    """The model as it is trained: with activation checkpointing, compiled, and averaged over ranks, as asked for."""
    if runtime.activation_checkpointing:
        apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, (Block, CrossAttentionBlock)))
    network = torch.compile(model) if runtime.compile else model
    return distributed.parallel(network, device)  # type: ignore[arg-type]


def autocast(config: RunConfig, device: torch.device) -> Any:
    """Context of the forward pass."""
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, AUTOCAST[config.precision])


def backward(
    state: TrainState, network: nn.Module, batches: list[Batch], config: RunConfig, device: torch.device
) -> torch.Tensor:
    """Gradients of a step's micro-batches; returns their mean loss (scalar, detached), not waited for."""
    network.train()
    total = torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        image, ids = canonical_crops(batch, device), batch["ids_shuffle"].to(device, non_blocking=True)
        with nullcontext() if i == len(batches) - 1 else distributed.without_sync(network):
            with autocast(config, device):
                loss = network(image, ids).loss / len(batches)
            state.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def update(state: TrainState, lr: float, config: RunConfig) -> None:
    """One optimizer step with the gradients at hand."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    if config.grad_clip:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), config.grad_clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1


@torch.no_grad()
def evaluate(model: HiEndMAE, batches: list[Batch], config: RunConfig, device: torch.device) -> dict[str, float]:
    """Held-out loss, and that of predicting each patch's mean, which is below 1 where patches are constant.

    The ranks share the batches.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    for batch in batches[distributed.rank() :: distributed.world_size()]:
        image, ids = canonical_crops(batch, device), batch["ids_shuffle"].to(device)
        with autocast(config, device):
            loss = model(image, ids).loss
        sums += torch.stack([loss, model.mean_patch_loss(image, ids), torch.ones_like(loss)]) * len(image)
    loss_sum, mean_sum, count = distributed.mean(sums).tolist()
    return {"val_loss": loss_sum / count, "val_mean_patch_loss": mean_sum / count}


class Stop:
    """Whether a signal asked for an early end, and which."""

    signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def request(self, number: int, _: FrameType | None) -> None:
        """Handler; a second Ctrl-C does not wait for the step."""
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """While open, SIGTERM, SIGUSR1 (schedulers) and Ctrl-C end the run after the step at hand."""
    stop = Stop()
    before = {number: signal.signal(number, stop.request) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report_non_finite(
    state: TrainState, batches: list[Batch], config: RunConfig, corpus: Corpus, folder: Path, device: torch.device
) -> str:
    """What a user needs to find the crop behind a non-finite loss, and a file to repeat it with."""
    bad = []
    with torch.no_grad(), autocast(config, device):
        for batch in batches:
            for i, (case, start) in enumerate(zip(batch["case"].tolist(), batch["start"].tolist(), strict=True)):
                one = {name: values[i : i + 1] for name, values in batch.items()}
                if not state.model(canonical_crops(one, device), one["ids_shuffle"].to(device)).loss.isfinite():
                    box = [f"{s}:{s + n}" for s, n in zip(start, config.model.img_size, strict=True)]
                    bad.append(f"{corpus.name(case)} [{', '.join(box)}]")
    dump = folder / f"non_finite_step_{state.step + 1}_rank_{distributed.rank()}.pth"
    save_checkpoint(dump, {**state.to_dict(config), "batches": batches})
    where = f"Crops with a non-finite loss: {'; '.join(bad)}." if bad else "No crop of this process alone explains it."
    return (
        f"The loss is not finite at step {state.step + 1}; the step was not taken, earlier checkpoints are kept. "
        f"{where} Weights and crops are in {dump}."
    )
