"""Hi-End-MAE: masked reconstruction by querying the encoder's own layers (arXiv 2502.08347).

Shapes: B batch, C channels, L tokens of a crop, V visible, M = L - V masked, P = ph·pw·pd·C voxels of a token,
E embed_dim, D decoder_embed_dim, K tokens without a patch, which ride along first: the class token of a ViT (K = 1),
none in a Primus (K = 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures.blocks import (
    Block,
    CrossAttentionBlock,
    LayerNorm,
    in_stream,
    init_linear,
    last,
)
from nnunetv2_hiendmae.architectures.pos_embed import sincos_pos_embed
from pretraining.config import ModelConfig
from pretraining.masking import patchify, random_shuffles, take_canonical, take_tokens


@dataclass
class HiEndMAEOutput:
    """What a forward pass returns."""

    loss: Tensor
    """Scalar: patch-normalised squared error, mean over all voxels of masked patches."""
    pred: Tensor | None
    """``(B, K + L, P)`` in shuffled order; only if asked for."""
    ids_shuffle: Tensor
    """``(B, L)`` the order used; the first V entries were visible."""


class Decoder(nn.Module):
    """Hierarchical dense decoding: self-attention blocks, then one cross-attention block a tap, deep to shallow.

    The control ``self_attention`` has one more self-attention block in place of each cross-attention block.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, heads, ratio = config.decoder_embed_dim, config.decoder_num_heads, config.mlp_ratio
        queried = () if config.decoder == "self_attention" else config.taps
        self_depth = config.decoder_self_depth + len(config.taps) - len(queried)
        self.blocks = nn.ModuleList(Block(dim, heads, ratio) for _ in range(self_depth))
        self.cross_attention_blocks = nn.ModuleList(CrossAttentionBlock(dim, heads, ratio) for _ in queried)
        self.norm = LayerNorm(dim)
        self.head = nn.Linear(dim, config.patch_dim)
        self.apply(init_linear)

    def forward(self, x: Tensor, memories: list[Tensor], num_queries: int) -> Tensor:
        """Query tokens ``(B, K + L, D)`` and memories shallow to deep to voxels ``(B, num_queries, P)``."""
        # For speed alone: the loss needs the masked tokens, which come last, so the last block computes no others.
        # In all blocks before it every token is a key that the others attend to.
        final = [*self.blocks, *self.cross_attention_blocks][-1]
        for block in self.blocks:
            x = block(x, num_queries=num_queries if block is final else None)
        for block, memory in zip(self.cross_attention_blocks, reversed(memories), strict=True):  # deep to shallow
            x = block(x, memory, num_queries=num_queries if block is final else None)
        return self.head(self.norm(x))


class HiEndMAE(nn.Module):
    """Encoder on visible tokens, encoder-driven decoder, loss on masked tokens (paper, section 3)."""

    encoder_pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.decoder_embed_dim
        self.encoder = config.encoder.build(config.grid, pretraining=True)
        # One projection a tap, shallow to deep, and one for the final-normed output, which starts the queries.
        queried = () if config.decoder == "self_attention" else config.taps
        projections = [nn.Linear(config.embed_dim, dim) for _ in (*queried, "final")]
        for linear in projections:
            nn.init.xavier_uniform_(linear.weight)  # the bias keeps torch's default, as published
        self.encoder_to_decoder = nn.ModuleList(projections)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("decoder_pos_embed", sincos_pos_embed(dim, config.grid)[None], persistent=False)
        self.decoder = Decoder(config)

    def forward(
        self,
        x: Tensor,
        ids_shuffle: Tensor | None = None,
        return_pred: bool = False,
        intensity: Tensor | None = None,
    ) -> HiEndMAEOutput:
        """Crops ``(B, C, H, W, D)`` in [0, 1]; ``ids_shuffle`` ``(B, L)`` int64, first V visible, random if None.

        With an ``intensity`` ``(B, C, 4)`` the crops are voxels as stored (``stored_crops``). They are cut into patches
        as they are, mostly 8 bits, and become float32 where they are taken.

        Raises:
            ValueError: the crop or ``ids_shuffle`` does not fit the configuration.
        """
        patches = self.crop_patches(x)
        ids_shuffle = self.random_masking(patches, ids_shuffle)
        taps, final = self.forward_encoder(patches, ids_shuffle, intensity)
        pred = self.forward_decoder(taps, final, ids_shuffle, all_tokens=return_pred)
        loss = self.forward_loss(patches, pred, ids_shuffle, intensity)
        return HiEndMAEOutput(loss, pred if return_pred else None, ids_shuffle)

    def crop_patches(self, x: Tensor) -> Tensor:
        """Crops ``(B, C, H, W, D)`` to patches ``(B, L, P)``."""
        expected = (self.config.in_channels, *self.config.img_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"Crops of shape {tuple(x.shape[1:])} given; the model takes {expected}.")
        return patchify(x, self.config.patch_size)

    def random_masking(self, patches: Tensor, ids_shuffle: Tensor | None) -> Tensor:
        """A random order of each crop's tokens, ``(B, L)``, unless one is given; the first V are visible."""
        expected = (len(patches), self.config.num_tokens)
        if ids_shuffle is None:
            return random_shuffles(*expected).to(patches.device)
        if tuple(ids_shuffle.shape) != expected:
            raise ValueError(f"ids_shuffle is {tuple(ids_shuffle.shape)}, must be {expected}.")
        return ids_shuffle

    def forward_encoder(
        self, patches: Tensor, ids_shuffle: Tensor, intensity: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Visible tokens through the encoder: tapped layers, shallow to deep, and the final one, ``(B, K + V, E)``."""
        visible = ids_shuffle[:, : self.config.num_visible]
        # Masked patches are dropped before they are embedded: the encoder works on a quarter of the tokens.
        tokens = self.encoder.project(take_canonical(patches, visible, intensity))
        embedding, *others = self.encoder.positions_for(self.config.grid)
        positions = (in_stream(embedding, tokens), *others)
        return self.encoder.encode(tokens, *(take_tokens(places, visible) for places in positions))

    def forward_decoder(
        self, taps: list[Tensor], final: Tensor, ids_shuffle: Tensor, *, all_tokens: bool = False
    ) -> Tensor:
        """Reconstruct by querying the encoder's layers (encoder-driven reconstruction).

        Returns:
            Voxels in shuffled order: of the masked tokens, ``(B, M, P)``, or of ``all_tokens``, ``(B, K + L, P)``.
        """
        queries = self.decoder_input(final, ids_shuffle)
        *tap_projections, _ = self.encoder_to_decoder
        # The control "last_layer" asks the final output as often as the method asks the taps.
        sources = taps if self.config.decoder == "hierarchical" else [final] * len(tap_projections)
        memories = [project(source) for project, source in zip(tap_projections, sources, strict=True)]  # (B, K + V, D)
        return self.decoder(queries, memories, queries.shape[1] if all_tokens else self.config.num_masked)

    def decoder_input(self, final: Tensor, ids_shuffle: Tensor) -> Tensor:
        """Projected visible tokens, mask tokens, and positions in shuffled order: ``(B, K + L, D)``."""
        visible = self.encoder_to_decoder[-1](final)  # (B, K + V, D)
        masked = self.mask_token.expand(len(visible), self.config.num_masked, -1)
        positions = take_tokens(in_stream(self.decoder_pos_embed, visible), ids_shuffle)
        positions = F.pad(positions, (0, 0, self.encoder.num_prefix, 0))  # 0 for the class token
        return torch.cat([visible, masked.to(visible)], dim=1) + positions

    def forward_loss(
        self, patches: Tensor, pred: Tensor, ids_shuffle: Tensor, intensity: Tensor | None = None
    ) -> Tensor:
        """Mean squared error (scalar) over all voxels of the masked tokens, which are the last of ``pred``."""
        # The difference of the narrower prediction and the float32 target is float32, and the one thing that is kept.
        difference = last(pred, self.config.num_masked) - self.target(patches, ids_shuffle, intensity)
        return difference.square().mean()

    def target(self, patches: Tensor, ids_shuffle: Tensor, intensity: Tensor | None = None) -> Tensor:
        """Masked patches ``(B, M, P)``, each normalised by its own mean and biased variance; 0 where constant."""
        masked = take_canonical(patches, ids_shuffle[:, self.config.num_visible :], intensity)
        return F.layer_norm(masked.float(), masked.shape[-1:], eps=1e-6)

    def mean_patch_loss(self, x: Tensor, ids_shuffle: Tensor, intensity: Tensor | None = None) -> Tensor:
        """Loss (scalar) of predicting each masked patch's mean: the share of masked patches that are not constant."""
        return self.target(self.crop_patches(x), ids_shuffle, intensity).square().mean()
