"""Where a patch looks: attention weights, computed again from the projections that a block used.

The blocks use fused attention, which never forms the weights; hooks catch the queries and keys on their way.
Shapes: L tokens of a crop, V visible, N keys, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures.blocks import CrossAttention, SelfAttention
from nnunetv2_hiendmae.architectures.vit import ViT
from pretraining.config import Size
from pretraining.masking import patchify
from pretraining.model import HiEndMAE

MASKS_AT_ONCE = 8
Projected = dict[nn.Module, Tensor]


@dataclass(frozen=True, kw_only=True)
class AttentionMap:
    """How one query token attends to the tokens of a crop."""

    layer: int
    """0-based encoder block that is attended to."""
    weights: np.ndarray
    """``(gh, gw, gd)`` mean over heads; NaN where a token was never a key."""
    num_keys: int
    """Keys of each softmax, class token included: uniform attention is one over this."""
    to_class_token: float
    """Weight of the class token; 0 where there is none."""


@contextmanager
def projections(modules: list[nn.Module]) -> Iterator[Projected]:
    """Outputs of linear layers during the block: module → ``(B, N, …)`` of its last call."""
    caught: Projected = {}
    hooks = [m.register_forward_hook(lambda module, _, output: caught.update({module: output})) for m in modules]
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()


def queries_and_keys(attention: SelfAttention | CrossAttention, caught: Projected) -> tuple[Tensor, Tensor]:
    """``(B, Nq, D)`` and ``(B, Nk, D)`` of one attention, from what its projections gave."""
    if isinstance(attention, SelfAttention):
        q, k, _ = caught[attention.qkv].chunk(3, dim=-1)
        return q, k
    return caught[attention.q], caught[attention.kv].chunk(2, dim=-1)[0]


def linear_layers(attention: SelfAttention | CrossAttention) -> list[nn.Module]:
    """The projections that queries and keys come from."""
    return [attention.qkv] if isinstance(attention, SelfAttention) else [attention.q, attention.kv]


def attention_weights(q: Tensor, k: Tensor, num_heads: int) -> Tensor:
    """``softmax(q kᵀ / √(D/heads))``: ``(B, Nq, D), (B, Nk, D)`` to ``(B, heads, Nq, Nk)`` float32."""
    q, k = (t.float().unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k))
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)


@torch.no_grad()
def encoder_attention(encoder: ViT, x: Tensor, token: int) -> list[AttentionMap]:
    """Self-attention of a token at each tapped layer, shallow to deep; the encoder sees all patches of ``x``.

    Args:
        x: one canonical crop ``(1, 1, H, W, D)``.
        token: the query, an index into the L tokens.
    """
    attentions: list[Any] = [encoder.blocks[i].attn for i in encoder.config.taps]
    with projections([layer for a in attentions for layer in linear_layers(a)]) as caught:
        encoder(x)
    skip = 0 if encoder.cls_token is None else 1
    grid = tuple(n // p for n, p in zip(x.shape[2:], encoder.config.patch_size, strict=True))
    maps = []
    for layer, attention in zip(encoder.config.taps, attentions, strict=True):
        q, k = queries_and_keys(attention, caught)
        row = attention_weights(q[:, skip + token : skip + token + 1], k, attention.num_heads)[0, :, 0].mean(0).cpu()
        weights = row[skip:].view(grid).numpy()
        maps.append(
            AttentionMap(layer=layer, weights=weights, num_keys=len(row), to_class_token=float(row[0]) if skip else 0.0)
        )
    return maps


@torch.no_grad()
def decoder_attention(model: HiEndMAE, x: Tensor, token: int, seed: int, num_masks: int) -> list[AttentionMap]:
    """Cross-attention of a hidden patch to each tapped layer, shallow to deep, as when it is being rebuilt.

    The encoder's tokens are the visible patches only, so one mask gives a map full of holes. Each patch's weight is
    its mean over those of ``num_masks`` random masks, all of which hide the query, that leave it visible.

    Args:
        x, token: as for ``encoder_attention``.
        seed: draws the masks.
    """
    config = model.config
    patches = patchify(x, config.patch_size)
    attentions: list[Any] = [block.cross_attn for block in model.decoder.cross_attention_blocks]
    total = torch.zeros(len(attentions), 1 + config.num_tokens)
    seen = torch.zeros(1 + config.num_tokens)
    orders = orders_hiding(token, config.num_tokens, config.num_visible, seed, num_masks)
    with projections([layer for a in attentions for layer in linear_layers(a)]) as caught:
        for ids in orders.split(MASKS_AT_ONCE):
            ids = ids.to(x.device)
            model.decode(*model.encode(patches.expand(len(ids), -1, -1), ids), ids, num_queries=1 + config.num_tokens)
            places = 1 + (ids == token).int().argmax(1)
            keys = F.pad(1 + ids[:, : config.num_visible], (1, 0)).cpu()  # the class token is key 0
            seen.put_(keys, torch.ones(keys.shape), accumulate=True)
            for row, attention in zip(total, attentions, strict=True):
                q, k = queries_and_keys(attention, caught)
                q = q[torch.arange(len(ids), device=ids.device), places].unsqueeze(1)
                row.put_(keys, attention_weights(q, k, attention.num_heads)[:, :, 0].mean(1).cpu(), accumulate=True)
    mean = total / seen  # NaN where a token was never visible, as the query itself
    layers = config.taps if config.decoder == "hierarchical" else (config.depth - 1,) * len(config.taps)
    return [
        AttentionMap(
            layer=layer,
            weights=row[1:].view(config.grid).numpy(),
            num_keys=1 + config.num_visible,
            to_class_token=float(row[0]),
        )
        for layer, row in zip(layers, reversed(mean), strict=False)  # the decoder's first block queries the deepest
    ]


def orders_hiding(token: int, num_tokens: int, num_visible: int, seed: int, count: int) -> Tensor:
    """Random orders ``(count, L)`` int64 of the tokens in which ``token`` is not among the visible first ones."""
    rng = np.random.default_rng(seed)
    others = np.delete(np.arange(num_tokens), token)
    orders = [np.insert(rng.permutation(others), rng.integers(num_visible, num_tokens), token) for _ in range(count)]
    return torch.from_numpy(np.stack(orders))


def token_of(voxel: Size, start: Size, patch: Size, grid: Size) -> int:
    """Index among the L tokens of the one that holds a voxel, in a crop that begins at ``start``."""
    h, w, d = ((v - s) // p for v, s, p in zip(voxel, start, patch, strict=True))
    return (h * grid[1] + w) * grid[2] + d


def crop_around(voxel: Size, shape: tuple[int, ...], size: Size) -> Size:
    """First voxel of the crop with a voxel in its middle, moved into the volume where the volume is large enough."""
    h, w, d = (
        min(max(v - n // 2, 0), edge - n) if edge >= n else -((n - edge) // 2)
        for v, n, edge in zip(voxel, size, shape, strict=True)
    )
    return h, w, d
