"""The encoder of a Primus once more, as plainly as can be, from the papers (Primus, EVA-02, rotary embedding)."""

from __future__ import annotations

import itertools
import math

import torch
from plain_hiendmae import Params, attention, grid_of, linear
from torch import Tensor

from pretraining import ModelConfig


def norm(p: Params, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def turned(x: Tensor, place: tuple[int, ...], heads: int) -> Tensor:
    """A query or key ``(E,)`` of the token at a place ``(h, w, d)``, each pair of channels turned by its angle."""
    width = len(x) // heads
    count = width // 6  # frequencies an axis
    angles = [at / 10000 ** (k / count) for at in place for k in range(count)]
    out = x.clone()
    for head, (k, angle) in itertools.product(range(heads), enumerate(angles)):
        i = head * width + 2 * k
        out[i] = x[i] * math.cos(angle) - x[i + 1] * math.sin(angle)
        out[i + 1] = x[i + 1] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def rotated(x: Tensor, places: list[list[tuple[int, ...] | None]], heads: int) -> Tensor:
    """``(B, N, E)``; tokens without a place stay as they are."""
    rows = [
        [token if at is None else turned(token, at, heads) for token, at in zip(tokens, ats, strict=True)]
        for tokens, ats in zip(x, places, strict=True)
    ]
    return torch.stack([torch.stack(row) for row in rows])


def block(p: Params, name: str, x: Tensor, places: list[list[tuple[int, ...] | None]], heads: int) -> Tensor:
    y = norm(p, f"{name}.norm1", x)
    q, v = linear(p, f"{name}.attn.q_proj", y), linear(p, f"{name}.attn.v_proj", y)
    k = y @ p[f"{name}.attn.k_proj.weight"].T
    y = attention(rotated(q, places, heads), rotated(k, places, heads), v, heads)
    y = linear(p, f"{name}.attn.proj", norm(p, f"{name}.attn.norm", y))
    x = x + p[f"{name}.gamma_1"] * y
    y = norm(p, f"{name}.norm2", x)
    gate = linear(p, f"{name}.mlp.fc1_g", y)
    y = gate / (1 + torch.exp(-gate)) * linear(p, f"{name}.mlp.fc1_x", y)
    return x + p[f"{name}.gamma_2"] * linear(p, f"{name}.mlp.fc2", norm(p, f"{name}.mlp.norm", y))


def encoder(p: Params, config: ModelConfig, patches: Tensor, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """As ``plain_hiendmae.vit_encoder``: ``(B, N, E)``, register tokens left out."""
    p = {key.removeprefix("encoder.").removeprefix("eva."): value for key, value in p.items()}
    kernel = p["down_projection.proj.weight"]
    z = torch.einsum("blhwdc,echwd->ble", patches, kernel) + p["down_projection.proj.bias"]
    registers = config.encoder_options.get("num_register_tokens", 0)
    z = torch.stack([one + p["pos_embed"][0, registers + at] for one, at in zip(z, ids, strict=True)])
    cells = list(itertools.product(*map(range, grid_of(config))))
    places: list[list[tuple[int, ...] | None]] = [[None] * registers + [cells[i] for i in row] for row in ids.tolist()]
    if registers:
        first = p["register_tokens"] + p["pos_embed"][:, :registers]
        z = torch.cat([first.expand(len(z), -1, -1), z], 1)
    layers = []
    for i in range(config.depth):
        z = block(p, f"blocks.{i}", z, places, config.num_heads)
        layers.append(z[:, registers:])
    return layers, norm(p, "norm", z)[:, registers:]
