"""Exchange with nnssl: weights as ``network_weights`` beside an ``nnssl_adaptation_plan``.

Only the file format is shared. nnssl's own architectures (ResEncL, Primus) are other networks than this ViT, so their
checkpoints are refused by name; a checkpoint written here is read back, and its keys follow nnssl's conventions for
programs that load by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2_hiendmae.architectures.pos_embed import sincos_pos_embed
from nnunetv2_hiendmae.architectures.vit import ViTConfig
from nnunetv2_hiendmae.foreign import Imported, State, shorten

PLAN = "nnssl_adaptation_plan"
HEADER = "hiendmae_header"
"""Our header rides along, for nnssl's plan has no place for the HU window."""
ARCHITECTURE = "nnunetv2_hiendmae.architectures.HiEndMAEUNETR"
ENCODER = "vit"
"""Submodule of HiEndMAEUNETR that holds the encoder."""


def to_nnssl(encoder: State, header: dict[str, Any]) -> dict[str, Any]:
    """A weights file's content in nnssl's format.

    The class token, which no segmentation network uses, is left out, and a sine-cosine position embedding is written
    out, so that ``vit.*`` is what ``HiEndMAEUNETR`` has and a strict load succeeds.
    """
    config = ViTConfig.from_dict(header["architecture"])
    img_size = list(header["img_size"])
    h, w, d = (s // p for s, p in zip(img_size, config.patch_size, strict=True))
    state = {name: tensor for name, tensor in encoder.items() if name != "cls_token"}
    state.setdefault("pos_embed", sincos_pos_embed(config.embed_dim, (h, w, d))[None])
    spacing = next(iter(header["spacing"].values()), None)
    plan = {
        "architecture_plans": {
            "arch_class_name": ARCHITECTURE,
            "arch_kwargs": {"encoder": config.to_dict()},
            "arch_kwargs_requiring_import": None,
        },
        "pretrain_plan": {
            "plans_name": "HiEndMAEPlans",
            "configurations": {
                "3d_fullres": {
                    "patch_size": img_size,
                    "spacing": spacing,
                    "normalization_schemes": ["HUWindowNormalization"] * config.in_channels,
                }
            },
        },
        "pretrain_num_input_channels": config.in_channels,
        "recommended_downstream_patchsize": img_size,
        "key_to_encoder": ENCODER,
        "key_to_stem": f"{ENCODER}.patch_embed",
        "keys_to_in_proj": [f"{ENCODER}.patch_embed.proj"],
        "key_to_lpe": f"{ENCODER}.pos_embed",
    }
    weights = {f"{ENCODER}.{name}": tensor for name, tensor in state.items()}
    return {"network_weights": weights, PLAN: plan, "trainer_name": "hiendmae_pretrain", HEADER: header}


def from_nnssl(checkpoint: Mapping[str, Any]) -> Imported:
    """The encoder in a checkpoint of nnssl's format, if it is ours.

    Raises:
        ValueError: another architecture, no header of ours, or no ``network_weights``.
    """
    plan = checkpoint[PLAN]
    architecture = plan.get("architecture_plans", {}).get("arch_class_name")
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"This nnssl checkpoint holds the architecture '{architecture}', which is not a Hi-End-MAE ViT "
            f"('{ARCHITECTURE}'); its weights have no place here."
        )
    missing = [key for key in ("network_weights", HEADER) if key not in checkpoint]
    if missing:
        raise ValueError(f"The nnssl checkpoint lacks {', '.join(missing)}.")
    prefix = f"{plan['key_to_encoder']}."
    weights = checkpoint["network_weights"]
    encoder = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
    if not encoder:
        raise ValueError(f"No key of network_weights starts with '{prefix}'; keys: {shorten(sorted(weights))}.")
    header = dict(checkpoint[HEADER])
    dropped = [key for key in weights if not key.startswith(prefix)]
    if header["pos_embed"] == "sincos":
        del encoder["pos_embed"]
        dropped.append(f"{prefix}pos_embed")
    return Imported("an nnssl-style checkpoint", encoder, header, dropped)
