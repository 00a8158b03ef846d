"""The authors' checkpoints: an explicit list of their keys, a map onto ours, and a refusal of anything else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nnunetv2_hiendmae.architectures.encoder import EncoderConfig
from nnunetv2_hiendmae.architectures.pos_embed import sincos_pos_embed
from nnunetv2_hiendmae.architectures.vit import ViTConfig
from nnunetv2_hiendmae.checks import Size
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW, Window

State = dict[str, Tensor]

# The authors' checkpoint records neither; these are their builders (width: heads) and their only taps.
PUBLISHED_HEADS = {768: 12, 1536: 16}
PUBLISHED_TAPS = (3, 6, 9)
PUBLISHED_SPACING_MM = [1.5, 1.5, 1.5]
RELEASED_DATA = "10K CT (authors)"
RELEASED_LICENCE = "that of the release, see github.com/FengheTan9/Hi-End-MAE"

LINEAR_OR_NORM = ("weight", "bias")
BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
CROSS_BLOCK = (
    "norm0", "self_attn.qkv", "self_attn.proj", "norm1", "cross_attn.q", "cross_attn.kv", "cross_attn.proj",
    "norm2", "mlp.fc1", "mlp.fc2",
)  # fmt: skip


@dataclass(frozen=True)
class Imported:
    """An encoder taken from someone else's file."""

    kind: str
    """What the file was, for the user."""
    encoder: State
    """``state_dict`` keys of the kind's network."""
    header: dict[str, Any]
    """For ``weights.save_weights``."""
    dropped: list[str]
    """Keys of the file that fine-tuning does not need."""
    decoder: State = field(default_factory=dict)
    """The rest of a Hi-End-MAE, with which a pre-training may go on: ``HiEndMAE.state_dict`` without ``encoder.``."""


def strip_wrappers(checkpoint: Mapping[str, Any]) -> State:
    """The bare state dict in a checkpoint, without ``module.`` and ``_orig_mod.``.

    It is the checkpoint itself, or its ``state_dict`` (torch's custom) or ``network_weights`` (nnU-Net's).

    Raises:
        ValueError: no dict, or two keys that differ in the prefix only.
    """
    state: Any = checkpoint if isinstance(checkpoint, Mapping) else None
    for name in ("state_dict", "network_weights"):
        state = state.get(name, state) if isinstance(state, Mapping) else None
    if not isinstance(state, Mapping):
        raise ValueError("The file holds no dict of named tensors.")
    bare = {re.sub(r"^((module|_orig_mod)\.)+", "", str(key)): value for key, value in state.items()}
    if len(bare) != len(state):
        raise ValueError("The file names tensors twice: with and without 'module.' or '_orig_mod.'.")
    return bare


def official_keys(depth: int, self_depth: int, cross_depth: int) -> set[str]:
    """Every key of the authors' ``HiEndMAE``, by the three numbers that vary."""
    modules = {"encoder.patch_embed.proj", "encoder.norm", "decoder.norm", "decoder.head"}
    modules |= {f"encoder.blocks.{i}.{m}" for i in range(depth) for m in BLOCK}
    modules |= {f"decoder.blocks.{i}.{m}" for i in range(self_depth) for m in BLOCK}
    modules |= {f"decoder.cross_attention_blocks.{i}.{m}" for i in range(cross_depth) for m in CROSS_BLOCK}
    modules |= {f"encoder_to_decoder.{i}" for i in range(cross_depth + 1)}
    singles = {"mask_token", "encoder_pos_embed", "decoder_pos_embed", "encoder.cls_token"}
    return {f"{module}.{kind}" for module in modules for kind in LINEAR_OR_NORM} | singles


def check_official(state: State) -> None:
    """``ValueError`` naming missing and unexpected keys unless ``state`` is the authors' pre-training model."""

    def count(prefix: str) -> int:
        return len({m[1] for key in state if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", key))})

    depth, crosses = max(count("encoder.blocks"), 1), max(count("decoder.cross_attention_blocks"), 1)
    wanted = official_keys(depth, count("decoder.blocks"), crosses)
    missing, unexpected = sorted(wanted - set(state)), sorted(set(state) - wanted)
    if missing or unexpected:
        raise ValueError(
            f"Not a checkpoint of the authors' Hi-End-MAE pre-training: {len(missing)} keys missing "
            f"({shorten(missing)}), {len(unexpected)} unexpected ({shorten(unexpected)})."
        )
    no_tensors = [key for key, value in state.items() if not (isinstance(value, Tensor) and value.is_floating_point())]
    if no_tensors:
        raise ValueError(f"These entries of the checkpoint are no floating-point tensors: {shorten(no_tensors)}.")


def shorten(names: list[str], limit: int = 6) -> str:
    """The first names and how many more there are."""
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "") or "none"


def sincos_grid(pos_embed: Tensor) -> Size | None:
    """Token grid of a sine-cosine embedding ``(1, L, E)``, None if it is another kind (a learned one)."""
    _, length, dim = pos_embed.shape
    if dim % 6:
        return None
    tokens = pos_embed[0].float()

    def run(axis: int) -> int:
        """Tokens from the first on that share its coordinate on an axis."""
        channels = tokens[:, axis * dim // 3 : (axis + 1) * dim // 3]
        moved = ((channels - channels[0]).abs().amax(1) > 1e-3).nonzero()
        return int(moved[0]) if len(moved) else length

    plane = run(0)
    row = min(run(1), plane)
    grid = (length // plane, plane // row, row)
    if grid[0] * grid[1] * grid[2] != length:
        return None
    return grid if torch.allclose(sincos_pos_embed(dim, grid), tokens, atol=2e-3) else None


def convert_official(state_dict: Mapping[str, Any]) -> State:
    """Map the authors' checkpoint (or its state dict, any wrapper prefix) onto ``pretraining.HiEndMAE.state_dict``.

    The two position embeddings are regenerated by our model and dropped, unless the encoder's was learned: then it
    becomes ``encoder.pos_embed``. All other names are the same.

    Raises:
        ValueError: keys are missing or unexpected; names them.
    """
    state = strip_wrappers(state_dict)
    check_official(state)
    encoder_pos_embed = state.pop("encoder_pos_embed")
    del state["decoder_pos_embed"]
    if sincos_grid(encoder_pos_embed) is None:
        state["encoder.pos_embed"] = encoder_pos_embed
    return state


def official_architecture(state: State, num_heads: int | None = None) -> ViTConfig:
    """Encoder architecture of an authors' state dict; heads and taps are the published ones unless given.

    Raises:
        ValueError: ``num_heads`` is needed and not given, or the shapes are no architecture of theirs.
    """
    stem = state["encoder.patch_embed.proj.weight"]
    if stem.ndim != 5:
        raise ValueError(f"encoder.patch_embed.proj.weight has shape {tuple(stem.shape)}; it must be that of a Conv3d.")
    width, channels, *patch = stem.shape
    heads = PUBLISHED_HEADS.get(width) if num_heads is None else num_heads
    if heads is None:
        raise ValueError(
            f"The checkpoint does not record its attention heads, and {width} is no published width; say -num_heads."
        )
    depth = sum(key.endswith(".norm1.weight") and key.startswith("encoder.blocks.") for key in state)
    crosses = sum(key.endswith(".norm0.weight") for key in state)
    if crosses != len(PUBLISHED_TAPS):
        raise ValueError(f"The checkpoint has {crosses} cross-attention blocks; the authors' code taps three layers.")
    return ViTConfig(
        patch_size=tuple(patch),  # type: ignore[arg-type]
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        in_channels=channels,
        mlp_ratio=state["encoder.blocks.0.mlp.fc1.weight"].shape[0] / width,
        taps=PUBLISHED_TAPS,
    )


def learned_grid(length: int, config: ViTConfig, img_size: Size | None) -> Size:
    """Token grid of a learned embedding: from ``img_size`` in voxels, else a cube. ``ValueError`` if neither fits."""
    side = round(length ** (1 / 3))
    grid = (side, side, side)
    if img_size is not None:
        grid = tuple(s // p for s, p in zip(img_size, config.patch_size, strict=True))  # type: ignore[assignment]
    if min(grid) < 1 or grid[0] * grid[1] * grid[2] != length:
        raise ValueError(
            f"The learned position embedding has {length} tokens, which is no {' × '.join(map(str, grid))} grid; "
            f"say -img_size H W D, the crop in voxels of the pre-training."
        )
    return grid


def import_official(
    checkpoint: Mapping[str, Any],
    num_heads: int | None = None,
    img_size: Size | None = None,
    window_hu: Window = DEFAULT_WINDOW,
) -> Imported:
    """The encoder in a checkpoint of the authors' ``main.py``.

    Args:
        checkpoint: their dict of epoch, state_dict, optimizer, scaler; or the state dict alone.
        num_heads: attention heads, where the width is not a published one.
        img_size: crop in voxels, where a learned position embedding does not tell.
        window_hu: HU range that was scaled to [0, 1].

    Raises:
        ValueError: another model's checkpoint, or shapes that contradict each other; names the keys.
    """
    bare, state = strip_wrappers(checkpoint), convert_official(checkpoint)
    config = official_architecture(state, num_heads)
    encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    positions = bare["encoder_pos_embed"]
    grid = sincos_grid(positions)
    learned = grid is None
    grid = grid or learned_grid(positions.shape[1], config, img_size)
    check_shapes(encoder, config, grid)
    used = {f"encoder.{key}" for key in encoder} | ({"encoder_pos_embed"} if learned else set())
    # Only the released model has this architecture; who trained another with the authors' code is unknown.
    released = (config.embed_dim, config.patch_size) == (1536, (12, 12, 12))
    header = {
        "architecture": config.to_dict(),
        "pos_embed": "learned" if learned else "sincos",
        "pos_embed_grid": list(grid),
        "window_hu": list(window_hu),
        "img_size": [g * p for g, p in zip(grid, config.patch_size, strict=True)],
        "spacing": {RELEASED_DATA: PUBLISHED_SPACING_MM} if released else {},
        "datasets": [{"name": RELEASED_DATA, "cases": None}] if released else [],
        "steps": None,
        "epochs": checkpoint.get("epoch"),
        "source": "authors' Hi-End-MAE checkpoint",
        "licence": RELEASED_LICENCE,
    }
    note = "learned and kept" if learned else "sine-cosine and regenerated by the network"
    kind = f"the authors' Hi-End-MAE checkpoint; its encoder_pos_embed is {note}"
    decoder = {k: v for k, v in state.items() if not k.startswith("encoder.")}
    return Imported(kind, encoder, header, sorted(set(bare) - used), decoder)


def check_shapes(encoder: State, config: EncoderConfig, grid: Size) -> None:
    """``ValueError`` naming keys and shapes in which an encoder differs from its architecture."""
    with torch.device("meta"):
        wanted = config.build_like(encoder, grid).state_dict()
    wrong = [
        f"{key} {tuple(encoder[key].shape)} instead of {tuple(tensor.shape)}" if key in encoder else f"{key} missing"
        for key, tensor in wanted.items()
        if key not in encoder or encoder[key].shape != tensor.shape
    ]
    wrong += [f"{key} unexpected" for key in encoder if key not in wanted]
    if wrong:
        raise ValueError(f"The checkpoint's shapes contradict each other: {shorten(wrong)}.")
