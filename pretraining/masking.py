"""Patches, which of them the encoder sees, and their values.

Shapes: B batch, C channels, L = gh·gw·gd tokens, V visible, M = L - V masked, P = ph·pw·pd·C.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nnunetv2_hiendmae.checks import Size
from nnunetv2_hiendmae.intensity import to_canonical


def patchify(x: Tensor, patch: Size) -> Tensor:
    """Volume ``(B, C, H, W, D)`` to ``(B, L, P)``; tokens with d fastest, voxels in a token ordered (ph, pw, pd, c)."""
    b, c, *size = x.shape
    if any(s % p for s, p in zip(size, patch, strict=True)):
        raise ValueError(f"The volume {tuple(size)} does not divide into patches of {patch}.")
    (gh, gw, gd), (ph, pw, pd) = (s // p for s, p in zip(size, patch, strict=True)), patch
    x = x.view(b, c, gh, ph, gw, pw, gd, pd)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, gh * gw * gd, ph * pw * pd * c)


def unpatchify(tokens: Tensor, patch: Size, grid: Size) -> Tensor:
    """Inverse of ``patchify``: ``(B, L, P)`` to ``(B, C, H, W, D)``."""
    b, _, p = tokens.shape
    (gh, gw, gd), (ph, pw, pd) = grid, patch
    x = tokens.view(b, gh, gw, gd, ph, pw, pd, p // (ph * pw * pd))
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, -1, gh * ph, gw * pw, gd * pd)


def num_visible(num_tokens: int, mask_ratio: float) -> int:
    """Visible tokens, as published: ``int(L · (1 - mask_ratio))`` in floating point."""
    return int(num_tokens * (1 - mask_ratio))


def random_shuffle(rng: np.random.Generator, num_tokens: int) -> np.ndarray:
    """One random order of the tokens, ``(L,)`` int64; its first V entries are the visible ones."""
    return rng.permutation(num_tokens)


def random_shuffles(batch: int, num_tokens: int) -> Tensor:
    """``(B, L)`` int64 orders from torch's CPU generator (the published way)."""
    return torch.rand(batch, num_tokens).argsort(dim=1)


def take_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Tokens ``(B or 1, L, D)`` at ``ids`` ``(B, N)``: ``(B, N, D)``."""
    batch, length, dim = tokens.shape
    # Whole rows are copied, which is faster than gather's voxel by voxel.
    first = torch.arange(batch, device=ids.device).unsqueeze(1) * length
    return tokens.reshape(-1, dim).index_select(0, (first + ids).flatten()).view(*ids.shape, dim)


def take_canonical(patches: Tensor, ids: Tensor, intensity: Tensor | None) -> Tensor:
    """Patches ``(B, L, P)`` at ``ids`` ``(B, N)`` as the model sees them: ``(B, N, P)``.

    With an ``intensity`` ``(B, C, 4)`` the patches are voxels as stored, and only those taken become float32.
    """
    taken = take_tokens(patches, ids)
    if intensity is None:
        return taken
    channels_last = taken.unflatten(2, (-1, intensity.shape[1]))
    return canonical_values(channels_last, *intensity[:, None, None].unbind(-1)).flatten(2)


def canonical_values(stored: Tensor, scale: Tensor, shift: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """Stored voxels mapped onto the canonical domain, then augmented: float32."""
    return to_canonical(stored.float(), scale, shift).mul_(gain).add_(offset)
