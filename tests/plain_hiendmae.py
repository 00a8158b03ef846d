"""Hi-End-MAE once more, as plainly as can be: loops over voxels, an explicit softmax, no shared code.

Written from the paper and the description in ``docs/explanation/method.md``, to compare ``pretraining.HiEndMAE`` with
at sizes for which no published numbers exist. Slow; takes parameters by name, so gradients can be compared too.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from pretraining import ModelConfig

Params = dict[str, Tensor]


def linear(p: Params, name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def norm(p: Params, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def mlp(p: Params, name: str, x: Tensor) -> Tensor:
    return linear(p, f"{name}.fc2", gelu(linear(p, f"{name}.fc1", x)))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """``(B, Nq, D), (B, Nk, D), (B, Nk, D)``: one head after the other."""
    width = q.shape[-1] // heads
    out = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        out.append(weights / weights.sum(-1, keepdim=True) @ v[..., part])
    return torch.cat(out, -1)


def self_attention(p: Params, name: str, x: Tensor, heads: int) -> Tensor:
    return linear(p, f"{name}.proj", attention(*linear(p, f"{name}.qkv", x).chunk(3, -1), heads))


def block(p: Params, name: str, x: Tensor, heads: int) -> Tensor:
    x = x + self_attention(p, f"{name}.attn", norm(p, f"{name}.norm1", x), heads)
    return x + mlp(p, f"{name}.mlp", norm(p, f"{name}.norm2", x))


def cross_block(p: Params, name: str, x: Tensor, memory: Tensor, heads: int) -> Tensor:
    x = x + self_attention(p, f"{name}.self_attn", norm(p, f"{name}.norm0", x), heads)
    q = linear(p, f"{name}.cross_attn.q", norm(p, f"{name}.norm1", x))
    k, v = linear(p, f"{name}.cross_attn.kv", memory).chunk(2, -1)
    x = x + linear(p, f"{name}.cross_attn.proj", attention(q, k, v, heads))
    return x + mlp(p, f"{name}.mlp", norm(p, f"{name}.norm2", x))


def tokens_of(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """``(B, C, H, W, D)`` to ``(B, L, ph, pw, pd, C)``: d fastest over tokens."""
    starts = [range(0, size, edge) for size, edge in zip(x.shape[2:], patch, strict=True)]
    cut = [
        x[:, :, h : h + patch[0], w : w + patch[1], d : d + patch[2]].movedim(1, -1)
        for h, w, d in itertools.product(*starts)
    ]
    return torch.stack(cut, 1)


def position(dim: int, grid: tuple[int, int, int]) -> Tensor:
    """``(L, dim)``, one number at a time."""
    rows = []
    for place in itertools.product(*map(range, grid)):
        row = []
        for coordinate in place:
            angles = [coordinate / 10000 ** (6 * k / dim) for k in range(dim // 6)]
            row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def vit_encoder(p: Params, config: ModelConfig, patches: Tensor, places: Tensor) -> tuple[list[Tensor], Tensor]:
    """Every block's output and the final one ``(B, 1 + N, E)`` of patches ``(B, N, ph, pw, pd, C)`` at indices."""
    kernel = p["encoder.patch_embed.proj.weight"]  # (E, C, ph, pw, pd)
    embedded = torch.einsum("blhwdc,echwd->ble", patches, kernel) + p["encoder.patch_embed.proj.bias"]
    table = position(config.embed_dim, grid_of(config))
    z = torch.stack([one + table[ids] for one, ids in zip(embedded, places, strict=True)])
    z = torch.cat([p["encoder.cls_token"].expand(len(z), 1, -1), z], 1)
    layers = []
    for i in range(config.depth):
        z = block(p, f"encoder.blocks.{i}", z, config.num_heads)
        layers.append(z)
    return layers, norm(p, "encoder.norm", z)


def grid_of(config: ModelConfig) -> tuple[int, int, int]:
    h, w, d = (s // e for s, e in zip(config.img_size, config.patch_size, strict=True))
    return h, w, d


def forward(p: Params, config: ModelConfig, x: Tensor, ids: Tensor, encoder=vit_encoder) -> tuple[Tensor, Tensor]:
    """``(loss, pred)`` of crops ``(B, C, H, W, D)`` with the token order ``ids`` ``(B, L)``."""
    batch, length = ids.shape
    visible = math.floor(length * (1 - config.mask_ratio))
    voxels = tokens_of(x, config.patch_size)
    ordered = torch.stack([voxels[b, ids[b]] for b in range(batch)])  # (B, L, ph, pw, pd, C), shuffled
    layers, final = encoder(p, config, ordered[:, :visible], ids[:, :visible])
    first = final.shape[1] - visible  # class tokens

    places = position(config.decoder_embed_dim, grid_of(config))
    start = 0 if config.decoder == "self_attention" else len(config.taps)
    y = linear(p, f"encoder_to_decoder.{start}", final)
    y = torch.cat([y, p["mask_token"].expand(batch, length - visible, -1)], 1)
    y = torch.stack([torch.cat([y[b, :first], y[b, first:] + places[ids[b]]]) for b in range(batch)])
    plain = config.decoder == "self_attention"
    for i in range(config.decoder_self_depth + (len(config.taps) if plain else 0)):
        y = block(p, f"decoder.blocks.{i}", y, config.decoder_num_heads)
    for i, tap in enumerate([] if plain else range(len(config.taps) - 1, -1, -1)):
        source = layers[config.taps[tap]] if config.decoder == "hierarchical" else final
        memory = linear(p, f"encoder_to_decoder.{tap}", source)
        y = cross_block(p, f"decoder.cross_attention_blocks.{i}", y, memory, config.decoder_num_heads)
    pred = linear(p, "decoder.head", norm(p, "decoder.norm", y))

    truth = ordered[:, visible:].flatten(2)
    truth = (truth - truth.mean(-1, keepdim=True)) / (truth.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return ((pred[:, first + visible :] - truth) ** 2).mean(), pred
