"""A plain 3D vision transformer, the encoder of the published method (kind ``vit``).

Shapes: B batch, C channels, L tokens of the whole grid, N tokens given, E embed_dim, P = ph·pw·pd·C.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nnunetv2_hiendmae.architectures.blocks import Block, LayerNorm, init_linear
from nnunetv2_hiendmae.architectures.encoder import Encoder, EncoderConfig
from nnunetv2_hiendmae.architectures.pos_embed import interpolate_pos_embed, sincos_pos_embed
from nnunetv2_hiendmae.checks import Size


@dataclass(frozen=True, kw_only=True)
class ViTConfig(EncoderConfig):
    """Architecture of a ``ViT``; ``embed_dim`` divisible by 6 (position embedding) and by ``num_heads``."""

    stem: ClassVar[str] = "patch_embed.proj"
    trunk: ClassVar[str] = ""
    positions: ClassVar[str] = "pos_embed"
    pretraining_only: ClassVar[tuple[str, ...]] = ("cls_token",)
    exported_in: ClassVar[str] = "vit."

    kind: str = "vit"

    @classmethod
    def presets(cls) -> dict[str, EncoderConfig]:
        return dict(ENCODERS)

    def check_width(self) -> None:
        if self.embed_dim % 6 or self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim={self.embed_dim} must be divisible by 6 and by num_heads={self.num_heads}.")

    def build(self, grid: Size, *, pretraining: bool, drop_path: float = 0.0) -> ViT:
        """Pre-training has a class token and fixed positions, segmentation none and learned ones (as published)."""
        return ViT(self, grid, class_token=pretraining, learned_pos_embed=not pretraining, drop_path=drop_path)

    def build_like(self, state: Mapping[str, Tensor], grid: Size) -> ViT:
        """Positions that are no tensor of ``state`` are fixed."""
        return ViT(self, grid, class_token="cls_token" in state, learned_pos_embed="pos_embed" in state)

    def exported_class(self) -> tuple[str, dict[str, Any] | None]:
        """nnU-Net has no such network; it is ours."""
        return "nnunetv2_hiendmae.architectures.HiEndMAEUNETR", {"encoder": self.to_dict()}


# Encoders by name. base and large are the published ones (their names promise the patch size); small fits a small GPU,
# tiny and nano train on a CPU, nano on voxels of 4 or 5 mm; pico is the demo's.
ENCODERS: dict[str, ViTConfig] = {
    "pico": ViTConfig(patch_size=(4, 4, 4), embed_dim=96, depth=6, num_heads=3, taps=(1, 3)),
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


class ViT(Encoder):
    """Pre-norm transformer encoder on a token grid.

    Args:
        config: architecture.
        grid: token grid ``(gh, gw, gd)`` of the usual input; other grids work through ``positions_for``.
        class_token: prepend a learned token without position embedding (pre-training has it; the published
            segmentation network does not).
        learned_pos_embed: make the position embedding, which starts as sine-cosine, trainable.
        drop_path: stochastic-depth rate of the last block, rising linearly from 0 at the first.
    """

    def __init__(
        self,
        config: ViTConfig,
        grid: Size,
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
        self.num_prefix = 1 if class_token else 0
        self.blocks.apply(init_linear)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def pos_embed_for(self, grid: Size) -> Tensor:
        """Position embedding ``(1, L, E)`` of any grid: regenerated if fixed, interpolated if learned."""
        if grid == self.grid:
            return self.pos_embed
        if isinstance(self.pos_embed, nn.Parameter):
            return interpolate_pos_embed(self.pos_embed, self.grid, grid)
        return sincos_pos_embed(self.config.embed_dim, grid)[None].to(self.pos_embed)

    def positions_for(self, grid: Size) -> tuple[Tensor]:
        """The position embedding."""
        return (self.pos_embed_for(grid),)

    def encode(self, tokens: Tensor, *positions: Tensor) -> tuple[list[Tensor], Tensor]:
        """See ``Encoder``; the class token, if there is one, comes first."""
        tokens = tokens + positions[0]
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        taps = []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            if i in self.config.taps:
                taps.append(tokens)
        return taps, self.norm(tokens)
