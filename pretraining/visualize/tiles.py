"""A whole CT in crops of the size that the network was trained on.

Crops lie side by side and nothing is blended between them, so that no seam is hidden; beyond the CT they hold air.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures.encoder import Encoder
from nnunetv2_hiendmae.checks import Size
from nnunetv2_hiendmae.crops import read_padded
from pretraining.masking import patchify, random_shuffle, unpatchify
from pretraining.model import HiEndMAE
from pretraining.preview import reconstruct

AIR = np.zeros(1, np.float32)
CROPS_AT_ONCE = 8
Show = Callable[[list[Any]], Iterator[Any]]
"""Goes through a list, showing how far it is."""


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


def batches(items: list[Any]) -> list[list[Any]]:
    """Items in groups that the network takes at once."""
    return [items[i : i + CROPS_AT_ONCE] for i in range(0, len(items), CROPS_AT_ONCE)]


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


def reconstruct_volume(model: HiEndMAE, volume: np.ndarray, seed: int, show: Show = iter) -> Reconstruction:
    """Mask and rebuild a canonical volume ``(H, W, D)`` crop by crop; ``seed`` draws the masks."""
    config, rng = model.config, np.random.default_rng(seed)
    device = model.mask_token.device
    result = Reconstruction(
        rebuilt=np.empty_like(volume), masked=np.empty(volume.shape, bool), flat=np.empty_like(volume)
    )
    for starts in show(batches(tile_starts(volume.shape, config.img_size))):
        x = torch.cat([crop_at(volume, start, config.img_size) for start in starts]).to(device)
        orders = torch.from_numpy(np.stack([random_shuffle(rng, config.num_tokens) for _ in starts])).to(device)
        seen, rebuilt = (t[:, 0].cpu().numpy() for t in reconstruct(model, x, orders))
        patches = patchify(x, config.patch_size)
        means = patches.mean(-1, keepdim=True).expand_as(patches)
        flat = unpatchify(means, config.patch_size, config.grid)[:, 0].cpu().numpy()
        for k, start in enumerate(starts):
            hidden = np.isnan(seen[k])
            paste(result.rebuilt, rebuilt[k], start)
            paste(result.masked, hidden, start)
            paste(result.flat, np.where(hidden, flat[k], rebuilt[k]), start)
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
def encode_volume(encoder: Encoder, volume: np.ndarray, img_size: Size, margin: float, show: Show = iter) -> TokenMap:
    """Tapped layers of the encoder, which sees every patch, as in fine-tuning. ``margin`` above 0 is tissue."""
    device = encoder.stem.weight.device
    skip = encoder.num_prefix
    tissue: list[Tensor] = []
    taps: list[list[Tensor]] = []
    for starts in show(batches(tile_starts(volume.shape, img_size))):
        x = torch.cat([crop_at(volume, start, img_size) for start in starts])
        tissue.append(patchify(x, encoder.config.patch_size).amax(-1) > margin)
        taps.append([tap[:, skip:].float().cpu() for tap in encoder(x.to(device))[0]])
    return TokenMap(
        starts=tile_starts(volume.shape, img_size),
        tissue=torch.cat(tissue),
        taps=[torch.cat(layer) for layer in zip(*taps, strict=True)],
    )
