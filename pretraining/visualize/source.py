"""What is looked at: the model of a run, or only the encoder of a weights file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnunetv2_hiendmae.architectures.encoder import Encoder
from nnunetv2_hiendmae.checks import Size
from nnunetv2_hiendmae.intensity import Window
from nnunetv2_hiendmae.weights.file import WEIGHTS_FILE, build_encoder, check_keys, load_weights
from pretraining.checkpoint import load_checkpoint
from pretraining.config import RunConfig
from pretraining.data.packed import PACKED
from pretraining.model import HiEndMAE

Spacing = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A pre-trained network and the data it knows."""

    name: str
    encoder: Encoder
    model: HiEndMAE | None
    """None for a weights file, which holds no decoder."""
    img_size: Size
    """Crop ``(H, W, D)`` of the pre-training."""
    window_hu: Window
    spacings: tuple[Spacing, ...]
    """Distinct spacings of its data sets in mm, in the axis order of the volumes; none if not recorded."""
    plans: tuple[str, str] | None = None
    """Plans and configuration of the run; None for a weights file, and for a run on packed data."""
    steps: int | None = None


def open_source(path: Path, device: torch.device) -> Source:
    """A run's folder or a weights file, ready on a device.

    Raises:
        ValueError: neither, damaged, or of images of several channels.
    """
    if not path.exists():
        raise ValueError(f"-run {path} does not exist; name the folder of a pre-training run or a weights file.")
    if path.name.startswith("checkpoint_"):
        raise ValueError(f"-run {path} is a checkpoint; name its folder: -run {path.parent}")
    source = open_run(path) if path.is_dir() else open_weights(path)
    channels = source.encoder.config.in_channels
    if channels != 1:
        raise ValueError(f"-run {path} takes images of {channels} channels; pictures are made of one-channel CT only.")
    for network in (source.encoder, source.model):
        if network is not None:
            network.to(device).eval().requires_grad_(False)
    return source


def open_run(folder: Path) -> Source:
    """The model of a run's newest checkpoint. ``ValueError`` if there is none that fits."""
    try:
        checkpoint = load_checkpoint(folder)
    except ValueError as error:
        raise ValueError(f"-run {folder}: {error} Name the folder that holds a run's checkpoint_final.pth.") from None
    config = RunConfig.from_dict(checkpoint["config"])
    model = HiEndMAE(config.model)
    check_keys(checkpoint["network_weights"], model.state_dict(), str(folder))
    model.load_state_dict(checkpoint["network_weights"])
    exported = folder / WEIGHTS_FILE
    return Source(
        name=folder.resolve().name,
        encoder=model.encoder,
        model=model,
        img_size=config.model.img_size,
        window_hu=config.window_hu,
        spacings=distinct_spacings(load_weights(exported).header) if exported.is_file() else (),
        plans=None if config.plans == PACKED else (config.plans, config.configuration),
        steps=checkpoint["step"],
    )


def open_weights(file: Path) -> Source:
    """The encoder of a weights file. ``ValueError`` if it is none, or damaged."""
    weights = load_weights(file)
    h, w, d = weights.header["img_size"]
    return Source(
        name=file.name,
        encoder=build_encoder(weights),
        model=None,
        img_size=(h, w, d),
        window_hu=weights.window_hu,
        spacings=distinct_spacings(weights.header),
        steps=weights.header.get("steps"),
    )


def distinct_spacings(header: dict[str, Any]) -> tuple[Spacing, ...]:
    """Spacings recorded in a weights header, each once."""
    return tuple(dict.fromkeys((float(h), float(w), float(d)) for h, w, d in header.get("spacing", {}).values()))
