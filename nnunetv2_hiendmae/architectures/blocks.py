"""Transformer blocks, shared by the encoder and the pre-training decoder.

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from dynamic_network_architectures.building_blocks.regularization import DropPath
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm(nn.LayerNorm):
    """Layer norm with the eps of pre-training.

    The authors pre-train with 1e-6 and fine-tune with 1e-5 (MONAI's default). We keep 1e-6 everywhere, so that
    features after loading are those of pre-training.
    """

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(dim, eps=1e-6, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """The norm of tokens, in their dtype where that is bfloat16, else as torch does it (float32 under autocast)."""
        if x.dtype != torch.bfloat16:
            return super().forward(x)
        # The kernel computes in float32 anyhow: what autocast adds is two copies of the tokens.
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention whose queries may be fewer than its keys, or come from elsewhere."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj = nn.Linear(dim, dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``(B, Nq, D), (B, Nk, D), (B, Nk, D)`` to ``(B, Nq, D)``."""
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, N, D/heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    """All tokens are keys; the last ``num_queries`` of them, by default all, are queries."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        if num_queries is None or num_queries == x.shape[1]:
            return self.attend(*self.qkv(x).chunk(3, dim=-1))
        dim = x.shape[-1]
        q = F.linear(last(x, num_queries), self.qkv.weight[:dim], self.qkv.bias[:dim])
        kv = F.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:])
        return self.attend(q, *kv.chunk(2, dim=-1))


class CrossAttention(Attention):
    """Tokens query a memory."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attend(self.q(x), *self.kv(memory).chunk(2, dim=-1))


class MLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, then MLP, both residual with stochastic depth."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """Tokens ``(B, N, D)`` to the last ``num_queries`` of them, by default all, updated."""
        x = last(x, num_queries) + self.drop_path(self.attn(self.norm1(x), num_queries))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CrossAttentionBlock(nn.Module):
    """Self-attention, cross-attention to one memory (not normalised, as published), MLP; all pre-norm residual."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm0 = LayerNorm(dim)
        self.self_attn = SelfAttention(dim, num_heads)
        self.norm1 = LayerNorm(dim)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim, mlp_ratio)

    def forward(self, x: Tensor, memory: Tensor, num_queries: int | None = None) -> Tensor:
        """Tokens ``(B, N, D)`` and memory ``(B, Nm, D)`` to the last ``num_queries`` tokens, by default all."""
        x = last(x, num_queries) + self.self_attn(self.norm0(x), num_queries)
        x = x + self.cross_attn(self.norm1(x), memory)
        return x + self.mlp(self.norm2(x))


def last(x: Tensor, num_queries: int | None) -> Tensor:
    """The last ``num_queries`` tokens of ``(B, N, D)``; all, without a copy in the backward pass, if None."""
    return x if num_queries is None else x[:, -num_queries:]


def in_stream(values: Tensor, tokens: Tensor) -> Tensor:
    """What is added to tokens, in their dtype if that is bfloat16, so that they stay in it from block to block.

    float16 lacks the range for a sum over all blocks: there tokens become float32 by what is added to them.
    """
    return values.to(tokens.dtype) if tokens.dtype == torch.bfloat16 else values


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear layers, as published (qkv as one matrix)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
