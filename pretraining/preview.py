"""Pictures of a run: progress curves and reconstructions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunetv2_hiendmae.probe.linear import MEAN
from pretraining.masking import patchify, take_tokens, unpatchify
from pretraining.model import HiEndMAE


def plot_progress(entries: list[dict[str, Any]], file: Path) -> None:
    """``progress.png`` in nnU-Net's manner: losses with the mean-patch baseline, probe, learning rate, speed."""
    train = [e for e in entries if "loss" in e]
    held_out = [e for e in entries if "val_loss" in e]
    from matplotlib.figure import Figure  # not above: commands answer at once

    probes = [e for e in entries if MEAN in e]
    figure = Figure(figsize=(12, 16 if probes else 12), layout="constrained")
    axes = list(figure.subplots(4 if probes else 3, 1, sharex=True))
    axes[0].plot([e["step"] for e in train], [e["loss"] for e in train], "b-", lw=1, alpha=0.6, label="loss_tr")
    steps = [e["step"] for e in held_out]
    axes[0].plot(steps, [e["val_loss"] for e in held_out], "r-o", ms=3, label="loss_val (held-out cases)")
    axes[0].plot(steps, [e["val_mean_patch_loss"] for e in held_out], "k--", label="predicting each patch's mean")
    axes[0].set_ylabel("patch-normalised squared error")
    if probes:
        plot_probe(probes, axes[1])
    axes[-2].plot([e["step"] for e in train], [e["lr"] for e in train], "b-", label="learning rate")
    axes[-1].plot([e["step"] for e in train], [e["crops_per_s"] for e in train], "b-", label="crops/s")
    axes[-1].set_xlabel("step")
    for axis in axes:
        axis.legend()
        axis.grid(alpha=0.3)
    temporary = file.with_suffix(".tmp.png")
    figure.savefig(temporary)
    temporary.replace(file)


def plot_probe(entries: list[dict[str, Any]], axis: Any) -> None:
    """Dice of each organ and, in black, their mean."""
    steps = [e["step"] for e in entries]
    for name in (name for name in entries[0] if name.startswith(f"{MEAN}/")):
        axis.plot(steps, [e[name] for e in entries], lw=1, alpha=0.6, label=name.removeprefix(f"{MEAN}/"))
    axis.plot(steps, [e[MEAN] for e in entries], "k-o", ms=3, label="probe: mean over organs")
    axis.set_ylabel("Dice of tokens found by a linear map")


def draw_reconstructions(model: HiEndMAE, x: Tensor, ids_shuffle: Tensor, file: Path) -> None:
    """A row for each crop ``(B, C, H, W, D)``, middle slice: crop, visible patches, reconstruction, error."""
    seen, rebuilt = reconstruct(model, x, ids_shuffle)
    from matplotlib.figure import Figure  # not above: commands answer at once

    figure = Figure(figsize=(12, 3 * len(x)), layout="constrained")
    titles = ("held-out crop", "visible", "reconstruction", "absolute error")
    rows = figure.subplots(len(x), 4, squeeze=False)
    for row, images in zip(rows, zip(x, seen, rebuilt, (rebuilt - x).abs(), strict=True), strict=True):
        for axis, image, title in zip(row, images, titles, strict=True):
            axis.imshow(image[0, image.shape[1] // 2].cpu(), cmap="gray", vmin=0, vmax=1)
            axis.set_title(title)
            axis.set_axis_off()
    temporary = file.with_suffix(".tmp.png")
    figure.savefig(temporary)
    temporary.replace(file)


@torch.no_grad()
def reconstruct(model: HiEndMAE, x: Tensor, ids_shuffle: Tensor) -> tuple[Tensor, Tensor]:
    """What the encoder saw and what the decoder made of it.

    Args:
        x: crops ``(B, C, H, W, D)`` canonical.
        ids_shuffle: ``(B, L)``.

    Returns:
        Masked input (masked voxels NaN) and reconstruction with visible patches pasted back, both like ``x``. Each
        predicted patch is given back the mean and the biased standard deviation that its target was normalised with.
    """
    config = model.config
    model.eval()
    pred = model(x, ids_shuffle, return_pred=True).pred[:, model.encoder.num_prefix :].float()
    order = ids_shuffle.argsort(dim=1)  # token → its place in shuffled order
    patches = patchify(x, config.patch_size)
    std = (patches.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    rebuilt = take_tokens(pred, order) * std + patches.mean(-1, keepdim=True)
    masked = (order >= config.num_visible).unsqueeze(-1)
    grid, patch = config.grid, config.patch_size
    seen = torch.where(masked, torch.nan, patches)
    return unpatchify(seen, patch, grid), unpatchify(torch.where(masked, rebuilt, patches), patch, grid)
