"""All numbers of pre-training: the model's, the run's, and the presets."""

from __future__ import annotations

from dataclasses import dataclass, fields

from nnunetv2_hiendmae.architectures.vit import ViTConfig
from pretraining.masking import num_visible

Size = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of Hi-End-MAE for one crop size."""

    img_size: Size
    """Crop ``(H, W, D)`` in voxels; divisible by ``patch_size``."""
    patch_size: Size
    """Token ``(ph, pw, pd)`` in voxels."""
    in_channels: int
    """Image channels."""
    embed_dim: int
    """Encoder width E; divisible by 6 and by ``num_heads``."""
    depth: int
    """Encoder blocks."""
    num_heads: int
    """Encoder attention heads."""
    mlp_ratio: float
    """MLP hidden width over width, encoder and decoder."""
    taps: tuple[int, ...]
    """0-based encoder blocks the decoder queries, shallow to deep; published: (3, 6, 9)."""
    mask_ratio: float
    """Share of tokens to rebuild; published: 0.75."""
    decoder_embed_dim: int
    """Decoder width D; divisible by 6 and by ``decoder_num_heads``."""
    decoder_num_heads: int
    """Decoder attention heads."""
    decoder_self_depth: int
    """Self-attention blocks before the cross-attention blocks; published: 2."""

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size", "taps"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _ = self.encoder  # validates the encoder's part
        if len(self.img_size) != 3 or any(s < p or s % p for s, p in zip(self.img_size, self.patch_size, strict=True)):
            raise ValueError(f"img_size={self.img_size} must be a multiple of patch_size={self.patch_size} per axis.")
        if self.decoder_embed_dim % 6 or self.decoder_embed_dim % self.decoder_num_heads:
            raise ValueError(
                f"decoder_embed_dim={self.decoder_embed_dim} must be divisible by 6 and by "
                f"decoder_num_heads={self.decoder_num_heads}."
            )
        if not 0 < self.num_visible < self.num_tokens:
            raise ValueError(
                f"mask_ratio={self.mask_ratio} leaves {self.num_visible} of {self.num_tokens} tokens visible; "
                f"at least one must be visible and one masked."
            )

    @property
    def encoder(self) -> ViTConfig:
        """The part that fine-tuning keeps."""
        return ViTConfig(**{f.name: getattr(self, f.name) for f in fields(ViTConfig)})

    @property
    def grid(self) -> Size:
        """Tokens per axis."""
        h, w, d = (s // p for s, p in zip(self.img_size, self.patch_size, strict=True))
        return h, w, d

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def num_visible(self) -> int:
        """V."""
        return num_visible(self.num_tokens, self.mask_ratio)

    @property
    def num_masked(self) -> int:
        """M."""
        return self.num_tokens - self.num_visible

    @property
    def patch_dim(self) -> int:
        """P, voxels of a token over all channels."""
        return self.patch_size[0] * self.patch_size[1] * self.patch_size[2] * self.in_channels
