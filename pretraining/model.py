"""Hi-End-MAE: masked reconstruction by querying the encoder's own layers (arXiv 2502.08347).

Shapes: B batch, C channels, L tokens of a crop, V visible, M = L - V masked, P = ph·pw·pd·C voxels of a token,
E embed_dim, D decoder_embed_dim. A class token rides along first: 1 + V or 1 + L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures.blocks import Block, CrossAttentionBlock, LayerNorm, init_linear, last
from nnunetv2_hiendmae.architectures.pos_embed import sincos_pos_embed
from nnunetv2_hiendmae.architectures.vit import ViT
from pretraining.config import ModelConfig
from pretraining.masking import patchify, random_shuffles, take_tokens


@dataclass
class HiEndMAEOutput:
    """What a forward pass returns."""

    loss: Tensor
    """Scalar: patch-normalised squared error, mean over all voxels of masked patches."""
    pred: Tensor | None
    """``(B, 1 + L, P)`` in shuffled order, class token first; only if asked for."""
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
        """Query tokens ``(B, 1 + L, D)`` and memories shallow to deep to voxels ``(B, num_queries, P)``.

        Only the last ``num_queries`` tokens are followed through the last block: the loss needs no others.
        """
        layers: list[tuple[nn.Module, tuple[Tensor, ...]]] = [(block, ()) for block in self.blocks]
        layers += [(b, (m,)) for b, m in zip(self.cross_attention_blocks, reversed(memories), strict=True)]
        for block, memory in layers[:-1]:
            x = block(x, *memory)
        block, memory = layers[-1]
        return self.head(self.norm(block(x, *memory, num_queries=num_queries)))


class HiEndMAE(nn.Module):
    """Encoder on visible tokens, encoder-driven decoder, loss on masked tokens (paper, section 3)."""

    encoder_pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.decoder_embed_dim
        self.encoder = ViT(config.encoder, config.grid, class_token=True)
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

    def forward(self, x: Tensor, ids_shuffle: Tensor | None = None, return_pred: bool = False) -> HiEndMAEOutput:
        """Crops ``(B, C, H, W, D)`` in [0, 1]; ``ids_shuffle`` ``(B, L)`` int64, first V visible, random if None.

        Raises:
            ValueError: the crop or ``ids_shuffle`` does not fit the configuration.
        """
        config = self.config
        if tuple(x.shape[1:]) != (config.in_channels, *config.img_size):
            raise ValueError(
                f"Crops of shape {tuple(x.shape[1:])} given; the model takes {(config.in_channels, *config.img_size)}."
            )
        if ids_shuffle is None:
            ids_shuffle = random_shuffles(len(x), config.num_tokens).to(x.device)
        elif tuple(ids_shuffle.shape) != (len(x), config.num_tokens):
            raise ValueError(f"ids_shuffle is {tuple(ids_shuffle.shape)}, must be {(len(x), config.num_tokens)}.")
        patches = patchify(x, config.patch_size)  # (B, L, P)
        taps, final = self.encode(patches, ids_shuffle)
        pred = self.decode(taps, final, ids_shuffle, 1 + config.num_tokens if return_pred else config.num_masked)
        target = self.target(patches, ids_shuffle)
        loss = F.mse_loss(last(pred, config.num_masked if return_pred else None).float(), target)
        return HiEndMAEOutput(loss, pred if return_pred else None, ids_shuffle)

    def encode(self, patches: Tensor, ids_shuffle: Tensor) -> tuple[list[Tensor], Tensor]:
        """Visible tokens through the encoder: tapped layers, shallow to deep, and the final one, ``(B, 1 + V, E)``."""
        visible = ids_shuffle[:, : self.config.num_visible]
        tokens = self.encoder.patch_embed.project(take_tokens(patches, visible))
        return self.encoder.forward_intermediates(tokens + take_tokens(self.encoder.pos_embed, visible))

    def decode(self, taps: list[Tensor], final: Tensor, ids_shuffle: Tensor, num_queries: int) -> Tensor:
        """Reconstruct by querying the tapped layers: voxels ``(B, num_queries, P)`` of the last tokens, shuffled."""
        queries = self.decoder_input(final, ids_shuffle)
        projections = self.encoder_to_decoder[:-1]
        sources = taps if self.config.decoder == "hierarchical" else [final] * len(projections)
        memories = [project(source) for project, source in zip(projections, sources, strict=True)]
        return self.decoder(queries, memories, num_queries)

    def decoder_input(self, final: Tensor, ids_shuffle: Tensor) -> Tensor:
        """Projected visible tokens, mask tokens, and positions in shuffled order: ``(B, 1 + L, D)``."""
        visible = self.encoder_to_decoder[-1](final)  # (B, 1 + V, D)
        masked = self.mask_token.expand(len(visible), self.config.num_masked, -1)
        positions = F.pad(take_tokens(self.decoder_pos_embed, ids_shuffle), (0, 0, 1, 0))  # 0 for the class token
        return torch.cat([visible, masked.to(visible)], dim=1) + positions

    def target(self, patches: Tensor, ids_shuffle: Tensor) -> Tensor:
        """Masked patches ``(B, M, P)``, each normalised by its own mean and biased variance; 0 where constant."""
        masked = take_tokens(patches, ids_shuffle[:, self.config.num_visible :])
        return F.layer_norm(masked.float(), masked.shape[-1:], eps=1e-6)

    def mean_patch_loss(self, x: Tensor, ids_shuffle: Tensor) -> Tensor:
        """Loss (scalar) of predicting each masked patch's mean: the share of masked patches that are not constant."""
        target = self.target(patchify(x, self.config.patch_size), ids_shuffle)
        return target.square().mean()
