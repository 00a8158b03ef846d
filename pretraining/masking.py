"""Patches, and which of them the encoder sees.

Shapes: B batch, C channels, L = gh·gw·gd tokens, V visible, M = L - V masked, P = ph·pw·pd·C.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, int, int]


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
