"""The kinds of encoder that pre-train and fine-tune; a further one is a file like ``vit.py`` and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2_hiendmae.architectures.encoder import EncoderConfig
from nnunetv2_hiendmae.architectures.primus import PrimusConfig
from nnunetv2_hiendmae.architectures.vit import ViTConfig

KINDS: dict[str, type[EncoderConfig]] = {
    "vit": ViTConfig,
    "primus": PrimusConfig,
}

ENCODERS: dict[str, EncoderConfig] = {
    name: config for kind in KINDS.values() for name, config in kind.presets().items()
}


def encoder_config(values: Mapping[str, Any]) -> EncoderConfig:
    """The architecture that plain data describe; without a kind (files of version 0.1) it is a ViT.

    Raises:
        ValueError: unknown kind or keys, or sizes that cannot be.
    """
    kind = values.get("kind", "vit")
    if kind not in KINDS:
        raise ValueError(f"Unknown encoder kind {kind!r}; known: {', '.join(KINDS)}.")
    return KINDS[kind].from_dict(values)
