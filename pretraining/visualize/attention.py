"""Where a patch looks: attention weights, computed again from the queries and keys that a block used.

The blocks of every kind use fused attention, which never forms the weights.
Shapes: L tokens of a crop, V visible, N tokens or keys, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nnunetv2_hiendmae.architectures.encoder import Encoder
from nnunetv2_hiendmae.checks import Size
from pretraining.masking import patchify
from pretraining.model import HiEndMAE

MASKS_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class AttentionMap:
    """How one query token attends to the tokens of a crop."""

    layer: int
    """0-based encoder block that is attended to."""
    weights: np.ndarray
    """``(gh, gw, gd)`` mean over heads; NaN where a token was never a key."""
    num_keys: int
    """Keys of each softmax, all tokens included: uniform attention is one over this."""
    to_others: float
    """Weight of tokens without a patch, the class token or registers; 0 where there is none."""


class AttentionCalls(TorchFunctionMode):
    """Within the block, the queries and keys ``(B, heads, N, D/heads)`` of every fused attention, call by call.

    They are caught where attention begins, so that all that a kind of encoder does with them (rotations) is done.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.found.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """``softmax(q kᵀ / √(D/heads))``: ``(B, heads, Nq, D/heads), (B, heads, Nk, …)`` to ``(B, heads, Nq, Nk)``."""
    return (q.float() @ k.float().transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)


@torch.no_grad()
def encoder_attention(encoder: Encoder, x: Tensor, token: int) -> list[AttentionMap]:
    """Self-attention of a token at each tapped layer, shallow to deep; the encoder sees all patches of ``x``.

    Args:
        x: one canonical crop ``(1, 1, H, W, D)``.
        token: the query, an index into the L tokens.
    """
    grid = tuple(n // p for n, p in zip(x.shape[2:], encoder.config.patch_size, strict=True))
    with AttentionCalls() as calls:
        encoder(x)
    maps = []
    for layer in encoder.config.taps:
        q, k = calls.found[layer]
        first = q.shape[2] - math.prod(grid)  # class or register tokens come first
        row = attention_weights(q[:, :, first + token : first + token + 1], k)[0, :, 0].mean(0).cpu()
        weights = row[first:].view(grid).numpy()
        maps.append(AttentionMap(layer=layer, weights=weights, num_keys=len(row), to_others=float(row[:first].sum())))
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
    config, first = model.config, model.encoder.num_prefix
    patches = patchify(x, config.patch_size)
    total = torch.zeros(len(model.decoder.cross_attention_blocks), first + config.num_tokens)
    seen = torch.zeros(first + config.num_tokens)
    orders = orders_hiding(token, config.num_tokens, config.num_visible, seed, num_masks)
    for ids in orders.split(MASKS_AT_ONCE):
        ids = ids.to(x.device)
        encoded = model.forward_encoder(patches.expand(len(ids), -1, -1), ids)
        with AttentionCalls() as calls:
            model.forward_decoder(*encoded, ids, all_tokens=True)
        places = first + (ids == token).int().argmax(1)
        others = torch.arange(first).expand(len(ids), -1)  # the class token is key 0
        keys = torch.cat([others, first + ids[:, : config.num_visible].cpu()], 1)
        seen.put_(keys, torch.ones(keys.shape), accumulate=True)
        crossing = calls.found[len(model.decoder.blocks) :][1::2]  # each of those blocks has self-attention first
        for row, (q, k) in zip(total, crossing, strict=True):
            q = q[torch.arange(len(ids), device=ids.device), :, places].unsqueeze(2)
            row.put_(keys, attention_weights(q, k)[:, :, 0].mean(1).cpu(), accumulate=True)
    mean = total / seen  # NaN where a token was never visible, as the query itself
    layers = config.taps if config.decoder == "hierarchical" else (config.depth - 1,) * len(config.taps)
    return [
        AttentionMap(
            layer=layer,
            weights=row[first:].view(config.grid).numpy(),
            num_keys=first + config.num_visible,
            to_others=float(row[:first].sum()),
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
