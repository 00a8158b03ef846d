"""A linear map from an encoder's tapped tokens to organs: fitted in closed form, judged on other patients.

The loss of pre-training says little about segmentation; how much of it is already there to be read says more.
Shapes: n crops, C channels, L tokens of a crop, N = n · L, F = taps · embed_dim, O organs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures.encoder import Encoder
from nnunetv2_hiendmae.checks import Size
from nnunetv2_hiendmae.probe.labelled import Crops, Labelled, read_crops

CROPS_AT_ONCE = 8
RIDGE = 0.01
"""Penalty of the map, as a share of the number of tokens: features have variance 1."""
MEAN = "probe_dice"
"""Name of the mean over organs; ``probe_dice/liver`` is one of them."""


class Probe:
    """A labelled data set in crops of one size, read once.

    Args:
        labelled: the data set.
        crop: ``(H, W, D)`` that the encoder was pre-trained with; less than a token at the far ends is left out.
        patch: its tokens.

    Raises:
        ValueError: a file is damaged, or no organ is both in what is fitted and in what is judged.
    """

    def __init__(self, labelled: Labelled, crop: Size, patch: Size) -> None:
        h, w, d = (n // p * p for n, p in zip(crop, patch, strict=True))
        self.fit, self.judge = (
            read_crops(labelled, cases, (h, w, d), patch) for cases in (labelled.fit, labelled.judge)
        )
        both = [crops.organs[crops.known].any(0) for crops in (self.fit, self.judge)]
        self.organs = {name: i for i, name in enumerate(labelled.organs) if both[0][i] and both[1][i]}
        if not self.organs:
            raise ValueError(
                f"{labelled.name} cannot be probed: no organ is in cases to fit and in cases to judge. Labels are "
                f"preprocessed by nnUNetv2_plan_and_preprocess; hiendmae_plan_and_preprocess leaves them out."
            )

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """Dice of each organ and their mean; the encoder is left in evaluation mode, nothing else of it changes."""
        columns = list(self.organs.values())
        (x, in_fit), (y, truth) = (
            (tapped_tokens(encoder, crops)[torch.from_numpy(crops.known)], crops.organs[crops.known][:, columns])
            for crops in (self.fit, self.judge)
        )
        scores, shown = fit_map(x, torch.from_numpy(in_fit), y)
        found = shown >= best_thresholds(scores, torch.from_numpy(in_fit))
        values = dice(found, torch.from_numpy(truth)).tolist()
        organs = {f"{MEAN}/{name}": value for name, value in zip(self.organs, values, strict=True)}
        return {MEAN: float(np.mean(values)), **organs}


@torch.no_grad()
def tapped_tokens(encoder: Encoder, crops: Crops) -> Tensor:
    """``(N, F)`` float32: the outputs of all taps side by side; the encoder sees every patch, in full precision.

    Raises:
        FloatingPointError: they are not finite.
    """
    encoder.eval()
    device = encoder.stem.weight.device
    tokens = []
    for images in torch.from_numpy(crops.images).split(CROPS_AT_ONCE):
        taps, _ = encoder(images.to(device).float() / 255)
        tokens.append(torch.cat([tap[:, encoder.num_prefix :] for tap in taps], -1).flatten(0, 1))
    found = torch.cat(tokens).float()
    if not found.isfinite().all():
        raise FloatingPointError("The encoder's tokens are not finite on the crops of the probe.")
    return found


def fit_map(x: Tensor, organs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression of ``organs`` ``(N, O)`` bool on standardised tokens ``x`` ``(N, F)``, with an intercept.

    Returns:
        What it makes of ``x`` and of other tokens ``y``, ``(…, O)`` float64 on the CPU.
    """
    mean, deviation = x.mean(0), x.std(0, correction=0) + 1e-6
    where = x.device if x.device.type != "mps" else torch.device("cpu")  # which has no double precision
    a, b = (((t - mean) / deviation).to(where).double() for t in (x, y))
    target = organs.to(where).double()
    gram = a.T @ a + RIDGE * len(a) * torch.eye(a.shape[1], dtype=a.dtype, device=where)
    weights = torch.linalg.solve(gram, a.T @ (target - target.mean(0)))
    return (a @ weights + target.mean(0)).cpu(), (b @ weights + target.mean(0)).cpu()


def best_thresholds(scores: Tensor, organs: Tensor) -> Tensor:
    """``(O,)``: the score from which on the tokens that the map was fitted to have the best Dice."""
    ranked, order = scores.sort(0, descending=True)
    hits = organs.gather(0, order).double().cumsum(0)
    found = torch.arange(1, len(scores) + 1).unsqueeze(1)
    return ranked.gather(0, (2 * hits / (found + organs.sum(0))).argmax(0, keepdim=True))[0]


def dice(found: Tensor, organs: Tensor) -> Tensor:
    """``(O,)`` Dice of ``(N, O)`` tokens found and tokens that are of the organ, which is somewhere."""
    return 2 * (found & organs).sum(0).double() / (found.sum(0) + organs.sum(0))
