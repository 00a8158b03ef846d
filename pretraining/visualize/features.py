"""Features as colours: the three main directions in which tokens differ become red, green and blue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_hiendmae.checks import Size
from pretraining.visualize.tiles import TokenMap, enlarge, paste


@dataclass(frozen=True, kw_only=True)
class FeatureColours:
    """One tapped layer of one encoder."""

    layer: int
    """0-based encoder block."""
    rgb: np.ndarray
    """``(H, W, D, 3)`` uint8; black where there is only air."""
    place: float
    """Share of the tokens' variance that their place in the crop and the crop explain; it is taken out."""
    explained: tuple[float, ...]
    """Share of the rest in red, green and blue."""


def colours(
    tokens: TokenMap, taps: tuple[int, ...], shape: tuple[int, ...], img_size: Size, patch: Size
) -> list[FeatureColours]:
    """Colours of every tapped layer, each with one basis for the whole CT."""
    h, w, d = (n // p for n, p in zip(img_size, patch, strict=True))
    in_crop = torch.cartesian_prod(torch.arange(h), torch.arange(w), torch.arange(d)).expand(len(tokens.starts), -1, 3)
    crop = torch.arange(len(tokens.starts)).view(-1, 1, 1).expand(-1, h * w * d, 1)
    places = torch.cat([in_crop, crop], -1)
    results = []
    for layer, features in zip(taps, tokens.taps, strict=True):
        content, place = without_place(features[tokens.tissue], places[tokens.tissue])
        values, explained = principal_colours(content)
        rgb = torch.zeros(*tokens.tissue.shape, 3, dtype=torch.uint8)
        rgb[tokens.tissue] = (1 + values * 254).round().byte()  # 0 is air
        volume = np.zeros((*shape, 3), np.uint8)
        for start, crop in zip(tokens.starts, rgb, strict=True):
            paste(volume, enlarge(crop.view(h, w, d, 3).numpy(), patch), start)
        results.append(FeatureColours(layer=layer, rgb=volume, place=place, explained=explained))
    return results


def without_place(features: Tensor, places: Tensor) -> tuple[Tensor, float]:
    """Features less what a token's row, column and slice in its crop and the crop itself explain, each by itself.

    Position and surroundings are most of what tells tokens apart; left in, the colours would show the crops' borders.

    Args:
        features: ``(N, E)``.
        places: ``(N, 4)`` int64: row, column and slice of each token in its crop, and which crop.

    Returns:
        ``(N, E)`` float64, and the share of the variance that was taken out.
    """
    if not len(features):
        return features, 0.0
    centred = (features - features.mean(0)).double()
    known = torch.cat([F.one_hot(column).double() for column in places.T], 1)  # (N, gh + gw + gd + crops)
    rest = centred - known @ (torch.linalg.pinv(known.T @ known, hermitian=True) @ (known.T @ centred))
    total = float(centred.square().sum())
    return rest, 1 - float(rest.square().sum()) / total if total else 0.0


def principal_colours(features: Tensor) -> tuple[Tensor, tuple[float, ...]]:
    """First three principal components of ``(N, E)``, 1st to 99th percentile scaled to [0, 1]: ``(N, 3)``; shares."""
    if len(features) < 2:
        return torch.full((len(features), 3), 0.5), (0.0, 0.0, 0.0)
    centred = (features - features.mean(0)).double()
    variance, basis = torch.linalg.eigh(centred.T @ centred)  # ascending
    basis = basis[:, -3:].flip(1)
    # An eigenvector's sign is arbitrary; make its largest entry positive, so that colours do not depend on the machine.
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    scores = centred @ basis
    low, high = torch.tensor(np.percentile(scores.numpy(), (1, 99), axis=0))
    scaled = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float()
    total = float(variance.clamp_min(0).sum())
    return scaled, tuple(float(v) / total if total else 0.0 for v in variance[-3:].flip(0))
