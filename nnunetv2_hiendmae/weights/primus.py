"""Checkpoints of nnU-Net's Primus by other programs: nnssl (OpenMind's), nnU-Net's own, or a bare state dict."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnunetv2_hiendmae.architectures.primus import ENCODERS, PrimusConfig
from nnunetv2_hiendmae.checks import Size
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW, Window
from nnunetv2_hiendmae.weights.nnssl import PLAN
from nnunetv2_hiendmae.weights.official import Imported, State, check_shapes, learned_grid, shorten, strip_wrappers

FIRST = re.compile(r"(|.*\.)eva\.blocks\.0\.norm1\.weight")
QUARTERS = 4
"""The published taps are the blocks 3, 6 and 9 of 12: at one, two and three quarters."""


def is_primus(checkpoint: Any) -> bool:
    """Whether there are blocks of a Primus in it, under whatever prefix."""
    return any(FIRST.fullmatch(key) for key in strip_wrappers(checkpoint))


def import_primus(
    checkpoint: Mapping[str, Any],
    num_heads: int | None = None,
    img_size: Size | None = None,
    window_hu: Window = DEFAULT_WINDOW,
) -> Imported:
    """The encoder of a Primus.

    Args:
        checkpoint: nnssl's, with or without its adaptation plan, nnU-Net's, or a state dict.
        num_heads: attention heads, where the width is none of nnU-Net's sizes and the plan does not say.
        img_size: crop in voxels of its training, where the plan does not say and it was no cube.
        window_hu: HU range that will be scaled to [0, 1] for it.

    Raises:
        ValueError: PrimusV2 or V3, several encoders, or shapes that contradict each other; names the keys.
    """
    weights = strip_wrappers(checkpoint)
    plan = checkpoint.get(PLAN) or {}
    keys = renamed(weights, plan)
    encoder: State = {ours: weights[theirs] for ours, theirs in keys.items()}
    no_tensors = [k for k, v in encoder.items() if not (isinstance(v, Tensor) and v.is_floating_point())]
    if no_tensors:
        raise ValueError(f"These entries of the checkpoint are no floating-point tensors: {shorten(no_tensors)}.")
    config = primus_architecture(encoder, plan, num_heads)
    trained = training_of(plan)
    size = img_size or trained.get("patch_size")
    registers = config.num_register_tokens
    grid = learned_grid(encoder[config.positions].shape[1] - registers, config, tuple(size) if size else None)  # type: ignore[arg-type]
    check_shapes(encoder, config, grid)
    name = str((plan.get("pretrain_plan") or {}).get("dataset_name") or "data of the checkpoint")
    spacing = trained.get("spacing")
    numbers = isinstance(spacing, (list, tuple)) and all(isinstance(mm, (int, float)) for mm in spacing)
    schemes = [str(scheme) for scheme in trained.get("normalization_schemes") or []]
    header = {
        "architecture": config.to_dict(),
        "pos_embed": "learned",
        "pos_embed_grid": list(grid),
        "window_hu": list(window_hu),
        "img_size": [g * p for g, p in zip(grid, config.patch_size, strict=True)],
        "spacing": {name: [float(mm) for mm in spacing]} if numbers else {},  # type: ignore[union-attr]
        "datasets": [{"name": name, "cases": None}],
        "steps": None,
        "normalization": schemes or ["not stated"],
        "source": f"Primus checkpoint of {checkpoint.get('trainer_name') or 'another program'}",
        "source_citations": [str(text) for text in checkpoint.get("citations") or []],
        "licence": str(checkpoint.get("license") or checkpoint.get("licence") or "that of its source; not stated"),
    }
    how = f"images normalised by {', '.join(schemes)}" if schemes else "images of a normalisation it does not state"
    kind = (
        f"a Primus checkpoint, trained on {how}; here it gets HU of {window_hu[0]:g} to {window_hu[1]:g} scaled to "
        f"[0, 1], to which its first layers have to adapt"
    )
    return Imported(kind, encoder, header, sorted(set(weights) - set(keys.values())))


def renamed(weights: State, plan: Mapping[str, Any]) -> dict[str, str]:
    """Our key: theirs, of every tensor of the encoder. ``ValueError`` if there is none, or more than one."""
    trunks = [m[1] + "eva" for key in weights if (m := FIRST.fullmatch(key))]
    trunk = str(plan.get("key_to_encoder") or (trunks[0] if len(trunks) == 1 else ""))
    if f"{trunk}.blocks.0.norm1.weight" not in weights:
        raise ValueError(f"The checkpoint has the encoders {shorten(trunks)}, and its plan names '{trunk}'.")
    parent = trunk.removesuffix("eva")
    stem = str(plan.get("key_to_stem") or f"{parent}down_projection")
    if f"{stem}.proj.weight" not in weights:
        raise ValueError(f"The checkpoint lacks {stem}.proj.weight; PrimusV2 and V3 have other stems.")
    keys = {"eva." + key.removeprefix(f"{trunk}."): key for key in weights if key.startswith(f"{trunk}.")}
    keys |= {"down_projection." + k.removeprefix(f"{stem}."): k for k in weights if k.startswith(f"{stem}.")}
    positions = str(plan.get("key_to_lpe") or f"{trunk}.pos_embed")
    if positions not in weights:
        raise ValueError(f"The checkpoint lacks its position embedding, {positions}.")
    keys["eva.pos_embed"] = positions
    if f"{parent}register_tokens" in weights:
        keys["register_tokens"] = f"{parent}register_tokens"
    return keys


def primus_architecture(encoder: State, plan: Mapping[str, Any], num_heads: int | None) -> PrimusConfig:
    """Architecture of an encoder under our keys. ``ValueError`` if ``num_heads`` is needed, or shapes are none."""
    stem = encoder["down_projection.proj.weight"]
    gate = encoder.get("eva.blocks.0.mlp.fc1_g.weight")
    if stem.ndim != 5 or gate is None:
        raise ValueError("The checkpoint's stem is no Conv3d, or its blocks have no gated MLP (mlp.fc1_g): no Primus.")
    width, channels, *patch = stem.shape
    depth = len({key.split(".")[2] for key in encoder if key.startswith("eva.blocks.")})
    kwargs = (plan.get("architecture_plans") or {}).get("arch_kwargs") or {}
    widths = {config.embed_dim: config.num_heads for config in ENCODERS.values()}
    recorded = kwargs.get("eva_numheads") or widths.get(width)
    heads = recorded if num_heads is None else num_heads
    if heads is None:
        raise ValueError(f"The checkpoint does not record its attention heads, and {width} is no width of nnU-Net's "
                         f"Primus; say -num_heads.")  # fmt: skip
    registers = encoder["register_tokens"].shape[1] if "register_tokens" in encoder else 0
    ratio = gate.shape[0] / width
    return PrimusConfig(
        patch_size=tuple(patch),  # type: ignore[arg-type]
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        in_channels=channels,
        mlp_ratio=ratio if int(width * ratio) == gate.shape[0] else math.nextafter(ratio, math.inf),
        taps=tuple(sorted({depth * i // QUARTERS for i in (1, 2, 3)})),
        num_register_tokens=registers,
        scale_attn_inner="eva.blocks.0.attn.norm.weight" in encoder,
        init_values=0.1 if "eva.blocks.0.gamma_1" in encoder else None,
    )


def training_of(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first configuration of the plans of the pre-training, as nnU-Net takes it; empty if there is none."""
    configurations = (plan.get("pretrain_plan") or {}).get("configurations") or {}
    first: Any = next(iter(configurations.values()), {}) if isinstance(configurations, Mapping) else {}
    return first if isinstance(first, Mapping) else {}
