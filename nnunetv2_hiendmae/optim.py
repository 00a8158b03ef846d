"""Parameter groups and learning-rate schedules, as plain functions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

# Learned tokens and positions are no weight matrices: like biases and norms they are not decayed.
NO_DECAY = ("cls_token", "mask_token", "pos_embed")


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices and kernels yes; biases, norms, tokens and positions no."""
    return parameter.ndim > 1 and name.rpartition(".")[2] not in NO_DECAY


def decay_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, divided: bool = True, **extra: Any
) -> list[dict[str, Any]]:
    """Two optimizer groups, decayed and not; empty ones are left out. ``extra`` goes into both.

    With ``divided=False`` everything is decayed, as in the published code, whose two groups both have the decay.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named:
        if parameter.requires_grad:
            groups[not divided or is_decayed(name, parameter)].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decayed else 0.0, **extra}
        for decayed, parameters in groups.items()
        if parameters
    ]


def layer_decay_groups(network: nn.Module, depth: int, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups of a ``HiEndMAEUNETR``: the decoder at scale 1, ViT layers at ``layer_decay^(distance to the decoder)``.

    Each group has ``lr_scale`` and ``is_encoder``. Layer 0 is the embedding, i + 1 is block i, depth + 1 the final
    norm. The decoder comes first: nnU-Net logs the learning rate of the first group.
    """
    layers: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in network.named_parameters():
        layers.setdefault(layer_of(name, depth), []).append((name, parameter))
    groups = []
    for layer in sorted(layers, reverse=True):
        scale = layer_decay ** (depth + 2 - layer)
        groups += decay_groups(layers[layer], weight_decay, lr_scale=scale, is_encoder=layer <= depth + 1)
    return groups


def layer_of(name: str, depth: int) -> int:
    """Layer index of a ``HiEndMAEUNETR`` parameter, 0 (embedding) to depth + 2 (decoder)."""
    module = name.split(".")
    if module[0] != "vit":
        return depth + 2
    if module[1] == "blocks":
        return int(module[2]) + 1
    return depth + 1 if module[1] == "norm" else 0


def warmup_cosine(position: float, total: float, warmup: float) -> float:
    """Published pre-training schedule, as a factor on the peak: linear from 0, then half a cosine to 0.

    ``position``, ``total`` and ``warmup`` share any unit: steps, or fractional epochs.
    """
    if position < warmup:
        return position / warmup
    return 0.5 * (1 + math.cos(math.pi * (position - warmup) / (total - warmup)))


def warmup_cosine_epochs(epoch: int, total: int, warmup: int) -> float:
    """Published fine-tuning schedule, as a factor on the peak, for epochs 0 to ``total`` - 1.

    It counts the warm-up from 0 to 1 over ``warmup`` epochs inclusive, so epoch 0 learns nothing and epochs
    ``warmup`` - 1 and ``warmup`` are both at the peak. Our trainer uses ``warmup_poly``; this is for comparison runs.
    """
    return epoch / (warmup - 1) if epoch < warmup else warmup_cosine(epoch, total, warmup)


def warmup_poly(epoch: int, total: int, warmup: int) -> float:
    """nnU-Net's schedule for transformers, as a factor on the peak: linear from 1/warmup, then (1 - t)^0.9."""
    if epoch < warmup:
        return (epoch + 1) / warmup
    return (1 - (epoch - warmup) / (total - warmup)) ** 0.9


@dataclass
class FineTuneSchedule:
    """Sets the learning rate of every group at the start of an epoch; nnU-Net calls ``step(epoch)``."""

    optimizer: Optimizer
    initial_lr: float
    num_epochs: int
    warmup_epochs: int
    frozen_epochs: int

    def step(self, epoch: int) -> None:
        factor = warmup_poly(epoch, self.num_epochs, self.warmup_epochs)
        for group in self.optimizer.param_groups:
            frozen = group["is_encoder"] and epoch < self.frozen_epochs
            group["lr"] = 0.0 if frozen else self.initial_lr * factor * group["lr_scale"]
