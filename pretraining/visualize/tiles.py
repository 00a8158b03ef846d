"""A whole CT in crops of the size that the network was trained on.

Crops lie side by side and nothing is blended between them, so that no seam is hidden; beyond the CT they hold air.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures.vit import ViT
from pretraining.config import Size
from pretraining.corpus import read_padded
from pretraining.masking import patchify, random_shuffle
from pretraining.model import HiEndMAE
from pretraining.preview import reconstruct

AIR = np.zeros(1, np.float32)


def crop_at(volume: np.ndarray, start: Size, size: Size) -> Tensor:
    """``(1, 1, *size)`` of a canonical volume, air beyond its edges."""
    return torch.from_numpy(np.ascontiguousarray(read_padded(volume[None], start, size, AIR)))[None]


def tile_starts(shape: tuple[int, ...], size: Size) -> list[Size]:
    """First voxels of the crops that cover a volume; what they have too much is shared by both ends of an axis."""
    axes = []
    for edge, n in zip(shape, size, strict=True):
        count = -(-edge // n)
        axes.append([i * n - (count * n - edge) // 2 for i in range(count)])
    return [(h, w, d) for h, w, d in product(*axes)]


def paste(target: np.ndarray, crop: np.ndarray, start: Size) -> None:
    """Write the part of a crop ``(H, W, D, …)`` that lies in ``target`` there."""
    inside = [slice(max(s, 0), min(s + n, edge)) for s, n, edge in zip(start, crop.shape, target.shape, strict=False)]
    source = tuple(slice(i.start - s, i.stop - s) for i, s in zip(inside, start, strict=True))
    target[tuple(inside)] = crop[source]


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """A masked and rebuilt CT; volumes are ``(H, W, D)`` canonical."""

    rebuilt: np.ndarray
    """Predictions at hidden patches, the input at visible ones."""
    masked: np.ndarray
    """Bool: hidden from the encoder."""
    flat: np.ndarray
    """Each hidden patch filled with its mean, which the network is given: what the prediction must beat."""


def reconstruct_volume(
    model: HiEndMAE, volume: np.ndarray, seed: int, show: Callable[[list[Size]], Iterator[Size]] = iter
) -> Reconstruction:
    """Mask and rebuild a canonical volume ``(H, W, D)``, one crop after the other; ``seed`` draws the masks."""
    config, rng = model.config, np.random.default_rng(seed)
    device = model.mask_token.device
    result = Reconstruction(
        rebuilt=np.empty_like(volume), masked=np.empty(volume.shape, bool), flat=np.empty_like(volume)
    )
    for start in show(tile_starts(volume.shape, config.img_size)):
        x = crop_at(volume, start, config.img_size).to(device)
        order = torch.from_numpy(random_shuffle(rng, config.num_tokens))[None].to(device)
        seen, rebuilt = (t[0, 0].cpu().numpy() for t in reconstruct(model, x, order))
        hidden = np.isnan(seen)
        paste(result.rebuilt, rebuilt, start)
        paste(result.masked, hidden, start)
        means = patchify(x, config.patch_size).mean(-1).view(config.grid).cpu().numpy()
        crop = x[0, 0].cpu().numpy()
        paste(result.flat, np.where(hidden, enlarge(means, config.patch_size), crop), start)
    return result


def enlarge(tokens: np.ndarray, patch: Size) -> np.ndarray:
    """A value a token ``(gh, gw, gd, …)`` to a value a voxel ``(H, W, D, …)``."""
    for axis, n in enumerate(patch):
        tokens = np.repeat(tokens, n, axis)
    return tokens


@dataclass(frozen=True, kw_only=True)
class TokenMap:
    """Features of all tokens of a CT."""

    starts: list[Size]
    """Crops."""
    tissue: Tensor
    """``(T, L)`` bool: tokens with anything but air."""
    taps: list[Tensor]
    """``(T, L, E)`` float32 of each tapped layer, shallow to deep; the class token is left out."""


@torch.no_grad()
def encode_volume(
    encoder: ViT, volume: np.ndarray, img_size: Size, margin: float, show: Callable[[list[Size]], Iterator[Size]] = iter
) -> TokenMap:
    """Tapped layers of the encoder, which sees every patch, as in fine-tuning. ``margin`` above 0 is tissue."""
    starts = tile_starts(volume.shape, img_size)
    device = encoder.norm.weight.device
    tissue: list[Tensor] = []
    taps: list[list[Tensor]] = []
    for start in show(starts):
        x = crop_at(volume, start, img_size)
        tissue.append((patchify(x, encoder.config.patch_size).amax(-1) > margin)[0])
        skip = 0 if encoder.cls_token is None else 1
        taps.append([tap[0, skip:].float().cpu() for tap in encoder(x.to(device))[0]])
    return TokenMap(
        starts=starts, tissue=torch.stack(tissue), taps=[torch.stack(layer) for layer in zip(*taps, strict=True)]
    )
