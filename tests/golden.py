"""Where the numbers computed with the authors' code are, and the model they belong to.

The full set (several MB of weights, inputs, outputs, gradients per configuration) is not part of the repository. It
is looked for in the folder named by ``HIENDMAE_SHARED``, else in ``shared`` beside the repository; tests that need it
are skipped without it. ``fixtures/`` holds the part that is.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunetv2_hiendmae.weights.official import convert_official
from pretraining import HiEndMAE, ModelConfig

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(os.environ.get("HIENDMAE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
FOLDER = SHARED / "reference" / "golden"
NAMES = ("p12", "p16")

needs_golden = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"the authors' numbers are not in {FOLDER}; name their folder in HIENDMAE_SHARED"
)


@cache
def arrays(file: str) -> dict[str, np.ndarray]:
    """All arrays of one npz file."""
    with np.load(FOLDER / file) as data:
        return {name: data[name] for name in data.files}


@cache
def checkpoint(name: str) -> dict[str, Any]:
    """The authors' checkpoint of a configuration."""
    return torch.load(FOLDER / f"{name}_ckpt.pth", weights_only=True)


def settings(name: str) -> dict[str, Any]:
    """The configuration in the authors' words."""
    return json.loads((FOLDER / f"{name}_meta.json").read_text(encoding="utf-8"))["cfg"]


def model_config(name: str) -> ModelConfig:
    """The configuration in ours."""
    cfg = settings(name)
    return ModelConfig(
        img_size=(cfg["img_size"],) * 3,
        patch_size=(cfg["patch"],) * 3,
        in_channels=1,
        embed_dim=cfg["enc"]["embed_dim"],
        depth=cfg["enc"]["depth"],
        num_heads=cfg["enc"]["num_heads"],
        mlp_ratio=4.0,
        taps=(3, 6, 9),
        mask_ratio=cfg["mask_ratio"],
        decoder_embed_dim=cfg["dec"]["embed_dim"],
        decoder_num_heads=cfg["dec"]["num_heads"],
        decoder_self_depth=cfg["dec"]["self_depth"],
    )


def model(name: str) -> HiEndMAE:
    """Our model with the authors' weights."""
    mae = HiEndMAE(model_config(name))
    mae.load_state_dict(convert_official(checkpoint(name)), strict=True)
    return mae
