"""Primus, nnU-Net's own transformer (arXiv 2503.01835), as an encoder (kind ``primus``).

Stem and trunk are the modules of dynamic-network-architectures under the names they have there, so that tensors go to
and from nnU-Net's Primus without a map. They are imported when a network is built: a ViT does not need them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nnunetv2_hiendmae.architectures.encoder import Encoder, EncoderConfig
from nnunetv2_hiendmae.architectures.pos_embed import interpolate_pos_embed
from nnunetv2_hiendmae.checks import Size


@dataclass(frozen=True, kw_only=True)
class PrimusConfig(EncoderConfig):
    """Architecture of a ``PrimusEncoder``; the defaults are those of nnU-Net's trainers.

    ``embed_dim`` is divisible by 6 · ``num_heads``: each head turns pairs of channels by angles of three axes.
    """

    stem: ClassVar[str] = "down_projection.proj"
    trunk: ClassVar[str] = "eva."
    positions: ClassVar[str] = "eva.pos_embed"
    exported_in: ClassVar[str] = ""

    kind: str = "primus"
    mlp_ratio: float = 4 * 2 / 3
    num_register_tokens: int = 0
    """Learned tokens beside the patches', which the blocks see and nothing else does."""
    scale_attn_inner: bool = True
    """A norm inside attention."""
    init_values: float | None = 0.1
    """Start of the layer scale; None: no layer scale."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.num_register_tokens) is not int or not 0 <= self.num_register_tokens <= 1024:
            raise ValueError(f"num_register_tokens={self.num_register_tokens!r} must be an integer of 0 to 1024.")

    @classmethod
    def presets(cls) -> dict[str, EncoderConfig]:
        return dict(ENCODERS)

    def check_width(self) -> None:
        if self.embed_dim % (6 * self.num_heads):
            raise ValueError(
                f"embed_dim={self.embed_dim} must be divisible by 6 × num_heads={self.num_heads} (rotary positions)."
            )

    def build(self, grid: Size, *, pretraining: bool = False, drop_path: float = 0.0) -> PrimusEncoder:
        """The same network for pre-training and segmentation."""
        return PrimusEncoder(self, grid, drop_path=drop_path)

    def build_like(self, state: Mapping[str, Tensor], grid: Size) -> PrimusEncoder:
        """There is no choice."""
        return PrimusEncoder(self, grid)

    def exported_class(self) -> tuple[str, dict[str, Any] | None]:
        """nnU-Net builds its four sizes by name; any other Primus is described in full."""
        size = self.nnunet_size()
        if size is not None:
            return f"Primus{size}", None
        kwargs = {
            "embed_dim": self.embed_dim, "patch_embed_size": list(self.patch_size), "eva_depth": self.depth,
            "eva_numheads": self.num_heads, "mlp_ratio": self.mlp_ratio, "init_values": self.init_values,
            "num_register_tokens": self.num_register_tokens, "scale_attn_inner": self.scale_attn_inner,
        }  # fmt: skip
        return "dynamic_network_architectures.architectures.primus.Primus", kwargs

    def nnunet_size(self) -> str | None:
        """S, B, M or L, where nnU-Net's trainer of that size has this architecture; taps are no part of it."""
        for name, config in ENCODERS.items():
            if config.depth == self.depth and replace(config, in_channels=self.in_channels, taps=self.taps) == self:
                return name.removeprefix("primus_").upper()
        return None


def preset(embed_dim: int, depth: int, num_heads: int, taps: tuple[int, ...]) -> PrimusConfig:
    return PrimusConfig(patch_size=(8, 8, 8), embed_dim=embed_dim, depth=depth, num_heads=num_heads, taps=taps)


# nnU-Net's sizes. Taps stand as far apart as the published ones do in 12 blocks.
ENCODERS: dict[str, PrimusConfig] = {
    "primus_s": preset(396, 12, 6, (3, 6, 9)),
    "primus_b": preset(792, 12, 12, (3, 6, 9)),
    "primus_m": preset(864, 16, 12, (4, 8, 12)),
    "primus_l": preset(1056, 24, 16, (6, 12, 18)),
}


class PrimusEncoder(Encoder):
    """nnU-Net's Primus without its decoder: patch embedding, EVA-02 blocks, learned and rotary positions."""

    config: PrimusConfig

    def __init__(self, config: PrimusConfig, grid: Size, *, drop_path: float = 0.0) -> None:
        super().__init__()
        from dynamic_network_architectures.building_blocks.eva import Eva
        from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchEmbed
        from dynamic_network_architectures.initialization.weight_init import InitWeights_He

        registers = config.num_register_tokens
        self.config = config
        self.grid = grid
        self.down_projection = PatchEmbed(config.patch_size, config.in_channels, config.embed_dim)
        self.eva = Eva(
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            ref_feat_shape=grid,
            num_reg_tokens=registers,
            drop_path_rate=drop_path,
            init_values=config.init_values,
            scale_attn_inner=config.scale_attn_inner,
        )
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, config.embed_dim)) if registers else None
        # As Primus starts them: the trunk has started itself.
        self.down_projection.apply(InitWeights_He(1e-2))
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        return self.eva.blocks

    @property
    def norm(self) -> nn.Module:  # type: ignore[override]
        return self.eva.norm

    def positions_for(self, grid: Size) -> tuple[Tensor, Tensor]:
        """Learned embedding, interpolated to the grid, and rotations ``(1, L, R)``, counted in tokens on any grid."""
        embedding = interpolate_pos_embed(self.eva.pos_embed, self.grid, grid)[:, self.config.num_register_tokens :]
        rope = self.eva.rope
        if grid != self.grid:
            rope = type(rope)(rope.dim, in_pixels=False, feat_shape=grid, ref_feat_shape=grid, device=embedding.device)
        return embedding, rope.get_embed()[None]

    def encode(self, tokens: Tensor, *positions: Tensor) -> tuple[list[Tensor], Tensor]:
        """See ``Encoder``; register tokens come first in the blocks and are left out of what is returned."""
        embedding, rotations = positions
        tokens, first = tokens + embedding, self.config.num_register_tokens
        if self.register_tokens is not None:
            registers = self.register_tokens + self.eva.pos_embed[:, :first]
            tokens = torch.cat([registers.expand(len(tokens), -1, -1), tokens], dim=1)
        taps = []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, rope=rotations[:, None])  # (B or 1, one for all heads, N, R)
            if i in self.config.taps:
                taps.append(tokens[:, first:])
        return taps, self.norm(tokens)[:, first:]
