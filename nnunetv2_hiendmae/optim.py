"""Parameter groups and learning-rate schedules, as plain functions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nnunetv2_hiendmae.architectures.encoder import EncoderConfig

ENCODER = "vit."
"""Prefix of the encoder's parameters in a segmentation network."""
# Learned tokens and positions are no weight matrices: like biases and norms they are not decayed.
NO_DECAY = ("cls_token", "mask_token", "pos_embed", "register_tokens")


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


def layer_decay_groups(
    network: nn.Module, encoder: EncoderConfig, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Groups of a segmentation network: the decoder at scale 1, encoder layers at ``layer_decay^(distance to it)``.

    Each group has its ``lr_scale``. Layer 0 is the embedding, i + 1 is block i, depth + 1 the final norm. The decoder
    comes first: nnU-Net logs the learning rate of the first group.
    """
    depth = encoder.depth
    layers: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in network.named_parameters():
        layer = encoder.layer_of(name.removeprefix(ENCODER)) if name.startswith(ENCODER) else depth + 2
        layers.setdefault(layer, []).append((name, parameter))
    groups = []
    for layer in sorted(layers, reverse=True):
        scale = layer_decay ** (depth + 2 - layer)
        groups += decay_groups(layers[layer], weight_decay, lr_scale=scale)
    return groups


def warmup_cosine(position: float, total: float, warmup: float) -> float:
    """Published pre-training schedule, as a factor on the peak: linear from 0, then half a cosine to 0.

    ``position``, ``total`` and ``warmup`` share any unit: steps, or fractional epochs.
    """
    if position < warmup:
        return position / warmup
    return 0.5 * (1 + math.cos(math.pi * (position - warmup) / (total - warmup)))


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

    def step(self, epoch: int) -> None:
        factor = warmup_poly(epoch, self.num_epochs, self.warmup_epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.initial_lr * factor * group["lr_scale"]
