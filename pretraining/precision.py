"""Numbers: the precision of a forward pass, and what to say when a number is not finite."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from pretraining.config import RunConfig
from pretraining.data.stream import Batch, stored_crops
from pretraining.device import on_device
from pretraining.model import HiEndMAE

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(config: RunConfig, device: torch.device) -> Any:
    """Context of the forward pass."""
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, AUTOCAST[config.precision])


def is_finite_crop(model: HiEndMAE, crop: Batch, config: RunConfig, device: torch.device) -> bool:
    """Whether the loss of a batch of one crop and its gradient are finite; the model keeps its gradients."""
    with autocast(config, device):
        (image, intensity), ids = stored_crops(crop, device), on_device(crop["ids_shuffle"], device)
        loss = model(image, ids, intensity=intensity).loss
    if not loss.isfinite():
        return False
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)  # calls no hooks of the ranks
    return all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)
