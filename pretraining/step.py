"""One optimizer step, on one rank: what changes, gradients, what the ranks agree on, and the update."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from nnunetv2_hiendmae.optim import decay_groups
from pretraining import distributed
from pretraining.config import RunConfig, Runtime
from pretraining.data.stream import Batch, stored_crops
from pretraining.device import Fetch, Reading, on_device
from pretraining.model import HiEndMAE
from pretraining.precision import autocast
from pretraining.recipe import start_small


@dataclass
class TrainState:
    """All that changes while training. Crops and masks follow from the step, so no generator state is part of it."""

    model: HiEndMAE
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sound: torch.Tensor
    """Scalar on the device: 1, or NaN once a step was not finite. No step is taken then."""
    step: int = 0

    @classmethod
    def create(cls, config: RunConfig, device: torch.device) -> TrainState:
        """Fresh weights from the config's seed."""
        torch.manual_seed(config.seed)
        model = HiEndMAE(config.model)
        if config.weight_init == "small":
            start_small(model)
        model.to(device)
        groups = decay_groups(model.named_parameters(), config.weight_decay, divided=not config.decay_all)
        # beta2 = 0.95 as published (and in MAE): gradients of masked crops change too fast for a memory of 1,000 steps.
        optimizer = torch.optim.AdamW(groups, config.base_lr, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu"))
        scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        return cls(model, optimizer, scaler, torch.ones((), device=device))

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


@dataclass
class Step:
    """A step whose numbers are read when the next one is queued, so that the device never waits for the reader."""

    number: int
    """Steps taken with it."""
    batches: list[Batch]
    lr: float
    fetch: Fetch
    """Of its data."""
    reading: Reading
    """Of what ``agree`` returns."""
    is_recorded: bool = False

    def is_sound(self) -> bool:
        """Whether loss and gradient are finite, or the loss scale of fp16 explains the gradient; waits for them."""
        loss, grad_norm, _, scale = self.reading.get()
        return math.isfinite(loss) and (math.isfinite(grad_norm) or scale > 1)


def prepare_network(model: HiEndMAE, runtime: Runtime, device: torch.device) -> nn.Module:
    """The model as it is trained: with activation checkpointing, compiled, and averaged over ranks, as asked for."""
    if runtime.activation_checkpointing:
        blocks = {*model.encoder.blocks, *model.decoder.blocks, *model.decoder.cross_attention_blocks}
        apply_activation_checkpointing(model, check_fn=lambda m: m in blocks)
    network = torch.compile(model) if runtime.compile else model
    return distributed.parallel(network, device)  # type: ignore[arg-type]


def backward(
    state: TrainState, network: nn.Module, batches: list[Batch], config: RunConfig, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a step's micro-batches, clipped.

    Returns:
        Mean loss and the gradients' norm before the clip: scalars on the device, not waited for. The norm is that of
        the mean over the ranks, so every rank has the same.
    """
    network.train()
    total = torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        (image, intensity), ids = stored_crops(batch, device), on_device(batch["ids_shuffle"], device)
        last_micro_batch = i == len(batches) - 1  # gradients add up; the ranks exchange their sum, once
        with nullcontext() if last_micro_batch else distributed.without_sync(network):
            with autocast(config, device):
                loss = network(image, ids, intensity=intensity).loss * state.sound / len(batches)
            state.scaler.scale(loss).backward()
        total += loss.detach()
    state.scaler.unscale_(state.optimizer)  # fp16 gradients carry the loss scale, which a norm must not see
    grad_norm = nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
    if config.grad_clip:
        nn.utils.clip_grads_with_norm_(state.model.parameters(), config.grad_clip, grad_norm)
    return total, grad_norm


def agree(state: TrainState, loss: torch.Tensor, grad_norm: torch.Tensor, stop: bool) -> torch.Tensor:
    """What the ranks share of a step: loss, gradient norm, share of ranks that ask for an early end, loss scale, (4,).

    One reduction carries all: a signal may reach some ranks only, or reach them at different steps, and all must leave
    the loop at the same one. If loss or gradient is not finite, this step and all after it are not taken: the device
    decides, so that weights stay sound until the numbers are read. A loss scale above 1 explains such a gradient: the
    scaler skips that step alone and lowers the scale.
    """
    one = torch.ones_like(loss)
    shared = distributed.mean(torch.stack([loss, grad_norm, one * stop, state.scaler.scale(one)]))
    loss, grad_norm, _, scale = shared.unbind()
    sound = loss.isfinite() & (grad_norm.isfinite() | (scale > 1))
    state.sound = state.sound.masked_fill(~sound, math.nan)
    return shared


def update(state: TrainState, lr: float, shared: torch.Tensor) -> None:
    """One optimizer step with the gradients at hand, unless what ``agree`` returned is not finite."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    if not state.scaler.is_enabled():  # with fp16 the scaler finds this out by itself
        # As torch's scaler tells fused optimizers, which look at it on the device.
        state.optimizer.found_inf = (~shared[:2].isfinite().all()).float()  # type: ignore[attr-defined]
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
