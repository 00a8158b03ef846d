"""Exchange with nnssl and nnU-Net's pre-trained path: ``network_weights`` beside an ``nnssl_adaptation_plan``.

Only the file format is shared. What is written follows the rules of nnU-Net's loader: the plan names the encoder, its
stem, the stem's convolutions and the position embedding by their keys. A ViT is a network of ours that no other
program builds; a Primus is nnU-Net's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2_hiendmae.architectures.kinds import encoder_config
from nnunetv2_hiendmae.architectures.pos_embed import sincos_pos_embed
from nnunetv2_hiendmae.weights.official import Imported, State, shorten

PLAN = "nnssl_adaptation_plan"
HEADER = "hiendmae_header"
"""Our header rides along, for nnssl's plan has no place for the HU window."""


def to_nnssl(encoder: State, header: dict[str, Any]) -> dict[str, Any]:
    """A weights file's content in nnssl's format.

    The class token, which no segmentation network uses, is left out, and a sine-cosine position embedding is written
    out, so that the file has every tensor of the network's encoder and a strict load succeeds.
    """
    config = encoder_config(header["architecture"])
    img_size = list(header["img_size"])
    h, w, d = (s // p for s, p in zip(img_size, config.patch_size, strict=True))
    state = {name: tensor for name, tensor in encoder.items() if name not in config.pretraining_only}
    if config.positions not in state:
        state[config.positions] = sincos_pos_embed(config.embed_dim, (h, w, d))[None]
    prefix = config.exported_in
    name, kwargs = config.exported_class()
    plan = {
        "architecture_plans": {"arch_class_name": name, "arch_kwargs": kwargs, "arch_kwargs_requiring_import": None},
        "pretrain_plan": {
            "plans_name": "HiEndMAEPlans",
            "configurations": {
                "3d_fullres": {
                    "patch_size": img_size,
                    "spacing": next(iter(header.get("spacing", {}).values()), None),
                    "normalization_schemes": ["HUWindowNormalization"] * config.in_channels,
                }
            },
        },
        "pretrain_num_input_channels": config.in_channels,
        "recommended_downstream_patchsize": img_size,
        "key_to_encoder": f"{prefix}{config.trunk}".rstrip("."),
        "key_to_stem": f"{prefix}{config.stem}".rpartition(".")[0],
        "keys_to_in_proj": [f"{prefix}{config.stem}"],
        "key_to_lpe": f"{prefix}{config.positions}",
    }
    weights = {f"{prefix}{key}": tensor for key, tensor in state.items()}
    return {"network_weights": weights, PLAN: plan, "trainer_name": "hiendmae_pretrain", HEADER: header}


def from_nnssl(checkpoint: Mapping[str, Any]) -> Imported:
    """The encoder in a file that ``to_nnssl`` wrote.

    Raises:
        ValueError: no ``network_weights``, or none of the encoder.
    """
    if "network_weights" not in checkpoint:
        raise ValueError("The nnssl checkpoint lacks network_weights.")
    header, weights = dict(checkpoint[HEADER]), checkpoint["network_weights"]
    config = encoder_config(header["architecture"])
    prefix = config.exported_in
    encoder = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
    if not encoder:
        raise ValueError(f"No key of network_weights starts with '{prefix}'; keys: {shorten(sorted(weights))}.")
    dropped = [key for key in weights if not key.startswith(prefix)]
    if header.get("pos_embed") == "sincos":
        del encoder[config.positions]
        dropped.append(f"{prefix}{config.positions}")
    return Imported("an nnssl-style checkpoint", encoder, header, dropped)
