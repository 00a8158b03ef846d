"""Learning rate, warm-up and initialisation that follow the sizes of a run.

Published sizes train as published. Other sizes follow a rule found by measurement (docs/experiments.md): Adam moves
every weight by about the learning rate a step, whatever the gradient. Weights that see a nearly constant input all move
alike, so a rate × width that is reached in too few steps turns the encoder's output into one constant vector, and the
loss stays at that of predicting each patch's mean. Three things keep it from that: a warm-up counted in steps, a rate
that falls with the width, and a start in which residual branches and predictions are small.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch

from nnunetv2_hiendmae.architectures.blocks import MLP, Attention
from pretraining.config import PRESETS, ModelConfig
from pretraining.model import HiEndMAE

RATE, AT_WIDTH = 5e-4, 192
"""Peak rate at this width; it falls with 1 / width."""
HIGHEST_RATE = 1.5e-3
WARMUP_STEPS = 100
LONGEST_WARMUP = 0.2
"""Of a run's steps: a run of fewer than 500 steps warms up for less than ``WARMUP_STEPS``."""
HEAD_START = 0.1
PUBLISHED_RATE, PUBLISHED_WARMUP = 1e-4, 0.01


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run does unless the user says otherwise, and why."""

    base_lr: float
    warmup_steps: float
    weight_init: str
    reason: str


def choose_recipe(model: ModelConfig, preset: str, batch_size: int, steps: int) -> Recipe:
    """The published recipe for a published preset at its published sizes, else that of the rule above."""
    published = PRESETS[preset]
    same_sizes = (published.crop_size, published.encoder.patch_size) == (model.img_size, model.patch_size)
    if published.is_published and same_sizes and batch_size >= published.batch_size:  # that of one GPU, or of several
        return Recipe(
            base_lr=PUBLISHED_RATE,
            warmup_steps=PUBLISHED_WARMUP * steps,
            weight_init="published",
            reason=f"as published for {preset}",
        )
    rate = min(HIGHEST_RATE, RATE * AT_WIDTH / model.embed_dim)
    warmup = min(WARMUP_STEPS, int(LONGEST_WARMUP * steps))
    short = "" if warmup == WARMUP_STEPS else f"; a longer run would warm up for {WARMUP_STEPS} steps and learn better"
    reason = f"{RATE:g} × {AT_WIDTH} / width {model.embed_dim}, at most {HIGHEST_RATE:g}{short}"
    return Recipe(base_lr=rate, warmup_steps=warmup, weight_init="small", reason=reason)


@torch.no_grad()
def start_small(model: HiEndMAE) -> None:
    """Let the residual branches, and the voxels that are predicted, start small. In place.

    What a branch adds is divided by √(2 · blocks), encoder and decoder each counting their own: GPT-2's rule (Radford
    et al. 2019, section 2.3). The head's weights are scaled by ``HEAD_START``: the first steps then need not unlearn
    large random voxels.
    """
    for blocks in ([*model.encoder.blocks], [*model.decoder.blocks, *model.decoder.cross_attention_blocks]):
        factor = 1 / sqrt(2 * len(blocks))
        for module in (m for block in blocks for m in block.modules()):
            if isinstance(module, Attention):
                module.proj.weight.mul_(factor)
            elif isinstance(module, MLP):
                module.fc2.weight.mul_(factor)
    model.decoder.head.weight.mul_(HEAD_START)
