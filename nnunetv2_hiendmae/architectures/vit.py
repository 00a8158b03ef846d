"""A plain 3D vision transformer; the one encoder of pre-training and segmentation.

Shapes: B batch, C channels, L tokens of the whole grid, N tokens given, E embed_dim, P = ph·pw·pd·C.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures.blocks import Block, LayerNorm, init_linear
from nnunetv2_hiendmae.architectures.pos_embed import Grid, interpolate_pos_embed, sincos_pos_embed

MAX_TOKENS = 50_000
"""Of a crop (36³; published: 8³ at most): more is a slip, or a header that is not honest."""


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Architecture of the encoder, as it travels in weights headers and plans."""

    patch_size: tuple[int, int, int]
    """Edge lengths of a token in voxels, per axis."""
    embed_dim: int
    """Token width E; divisible by 6 (position embedding) and by ``num_heads``."""
    depth: int
    """Number of transformer blocks."""
    num_heads: int
    """Attention heads per block."""
    in_channels: int = 1
    """Image channels."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over ``embed_dim``."""
    taps: tuple[int, ...] = (3, 6, 9)
    """0-based indices of the blocks whose outputs feed the decoders, shallow to deep."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        object.__setattr__(self, "taps", tuple(self.taps))
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size={self.patch_size} must be three positive integers.")
        counts = {name: getattr(self, name) for name in ("embed_dim", "depth", "num_heads", "in_channels")}
        if not all(type(n) is int and n > 0 for n in (*self.patch_size, *counts.values())) or not self.mlp_ratio > 0:
            raise ValueError(f"{counts}, mlp_ratio={self.mlp_ratio}: all must be positive, the counts integers.")
        if self.embed_dim % 6 or self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim={self.embed_dim} must be divisible by 6 and by num_heads={self.num_heads}.")
        if not self.taps or list(self.taps) != sorted(set(self.taps)) or not 0 <= self.taps[0] <= self.taps[-1]:
            raise ValueError(f"taps={self.taps} must be distinct block indices in ascending order.")
        if self.taps[-1] >= self.depth:
            raise ValueError(f"taps={self.taps} name blocks beyond depth={self.depth} (indices are 0-based).")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ViTConfig:
        """Inverse of ``to_dict``; ``ValueError`` names unknown keys."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"Unknown architecture keys {sorted(unknown)}; known: {[f.name for f in fields(cls)]}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON and ``torch.load(weights_only=True)`` safe)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


# Encoders by name. base and large are the published ones (their names promise the patch size); small fits a small GPU,
# tiny and nano train on a CPU, nano on voxels of 4 or 5 mm.
ENCODERS: dict[str, ViTConfig] = {
    "nano": ViTConfig(patch_size=(4, 4, 4), embed_dim=96, depth=8, num_heads=3, taps=(2, 4, 6)),
    "tiny": ViTConfig(patch_size=(8, 8, 8), embed_dim=192, depth=12, num_heads=6),
    "small_p12": ViTConfig(patch_size=(12, 12, 12), embed_dim=384, depth=12, num_heads=6),
    "base_p16": ViTConfig(patch_size=(16, 16, 16), embed_dim=768, depth=12, num_heads=12),
    "large_p16": ViTConfig(patch_size=(16, 16, 16), embed_dim=1536, depth=12, num_heads=16),
    "large_p12": ViTConfig(patch_size=(12, 12, 12), embed_dim=1536, depth=12, num_heads=16),
}


class PatchEmbed(nn.Module):
    """One linear map from the voxels of a patch to a token, kept as the weight of a strided convolution."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv3d(config.in_channels, config.embed_dim, kernel_size=p, stride=p)
        nn.init.xavier_uniform_(self.proj.weight.view(config.embed_dim, -1))  # the bias keeps torch's default

    def forward(self, x: Tensor) -> Tensor:
        """Volume ``(B, C, H, W, D)``, sizes divisible by the patch, to tokens ``(B, L, E)``."""
        return self.proj(x).flatten(2).transpose(1, 2)

    def project(self, patches: Tensor) -> Tensor:
        """Flat patches ``(B, N, P)`` ordered ``(ph, pw, pd, c)`` to tokens ``(B, N, E)``; for a subset of the grid."""
        weight = self.proj.weight.permute(0, 2, 3, 4, 1).flatten(1)  # (E, P)
        return F.linear(patches, weight, self.proj.bias)


class ViT(nn.Module):
    """Pre-norm transformer encoder on a token grid.

    Args:
        config: architecture.
        grid: token grid ``(gh, gw, gd)`` of the usual input; other grids work through ``pos_embed_for``.
        class_token: prepend a learned token without position embedding (pre-training has it; the published
            segmentation network does not).
        learned_pos_embed: make the position embedding, which starts as sine-cosine, trainable.
        drop_path: stochastic-depth rate of the last block, rising linearly from 0 at the first.
    """

    def __init__(
        self,
        config: ViTConfig,
        grid: Grid,
        *,
        class_token: bool,
        learned_pos_embed: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.grid = grid
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim)) if class_token else None
        pos_embed = sincos_pos_embed(config.embed_dim, grid)[None]
        if learned_pos_embed:
            self.pos_embed = nn.Parameter(pos_embed)
        else:
            self.register_buffer("pos_embed", pos_embed, persistent=False)
        self.blocks = nn.ModuleList(
            Block(config.embed_dim, config.num_heads, config.mlp_ratio, drop_path * i / max(config.depth - 1, 1))
            for i in range(config.depth)
        )
        self.norm = LayerNorm(config.embed_dim)
        self.blocks.apply(init_linear)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def pos_embed_for(self, grid: Grid) -> Tensor:
        """Position embedding ``(1, L, E)`` of any grid: regenerated if fixed, interpolated if learned."""
        if grid == self.grid:
            return self.pos_embed
        if isinstance(self.pos_embed, nn.Parameter):
            return interpolate_pos_embed(self.pos_embed, self.grid, grid)
        return sincos_pos_embed(self.config.embed_dim, grid)[None].to(self.pos_embed)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Volume ``(B, C, H, W, D)``, sizes divisible by the patch; returns what ``forward_intermediates`` does."""
        p = self.config.patch_size
        grid = (x.shape[2] // p[0], x.shape[3] // p[1], x.shape[4] // p[2])
        return self.forward_intermediates(self.patch_embed(x) + self.pos_embed_for(grid))

    def forward_intermediates(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        """Run the blocks on embedded tokens ``(B, N, E)``.

        Returns:
            Outputs of the tapped blocks, shallow to deep, *before* the final norm, and the final-normed output;
            each ``(B, N, E)``, or ``(B, 1 + N, E)`` with the class token first.
        """
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        taps = []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            if i in self.config.taps:
                taps.append(tokens)
        return taps, self.norm(tokens)
