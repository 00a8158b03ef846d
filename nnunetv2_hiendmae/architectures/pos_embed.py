"""Position embeddings of a 3D token grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_hiendmae.checks import Size


def sincos_pos_embed(embed_dim: int, grid: Size) -> Tensor:
    """Fixed sine-cosine embedding of every token of ``grid``: ``(L, embed_dim)`` float32, L = gh·gw·gd, d fastest.

    Each axis has ``embed_dim / 6`` frequencies ``10000^(-k / (embed_dim / 6))``; the channels are ordered
    sin h, cos h, sin w, cos w, sin d, cos d (as in MAE, extended to three axes by the published code).

    Raises:
        ValueError: ``embed_dim`` is not divisible by 6.
    """
    if embed_dim % 6:
        raise ValueError(f"embed_dim={embed_dim} must be divisible by 6: sine and cosine for each of three axes.")
    frequencies = 10000.0 ** -(torch.arange(embed_dim // 6, dtype=torch.float64) / (embed_dim // 6))
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in axes]  # 3 × (L, embed_dim/6)
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()


def interpolate_pos_embed(pos_embed: Tensor, old: Size, new: Size) -> Tensor:
    """Resample a learned embedding ``(1, L_old, E)`` trilinearly onto another grid: ``(1, L_new, E)``.

    Tokens without a place in the grid (registers) come first, and stay as they are.
    """
    if old == new:
        return pos_embed
    prefix = pos_embed.shape[1] - math.prod(old)
    volume = pos_embed[:, prefix:].reshape(1, *old, -1).permute(0, 4, 1, 2, 3)  # (1, E, gh, gw, gd)
    resampled = F.interpolate(volume, size=new, mode="trilinear").flatten(2).transpose(1, 2)
    return torch.cat([pos_embed[:, :prefix], resampled], dim=1) if prefix else resampled
