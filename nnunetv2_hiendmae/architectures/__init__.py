"""The encoders and the segmentation networks built on them."""

from nnunetv2_hiendmae.architectures.kinds import ENCODERS, encoder_config
from nnunetv2_hiendmae.architectures.pos_embed import interpolate_pos_embed, sincos_pos_embed
from nnunetv2_hiendmae.architectures.primus import PrimusConfig, PrimusEncoder
from nnunetv2_hiendmae.architectures.unetr import HiEndMAEUNETR
from nnunetv2_hiendmae.architectures.vit import ViT, ViTConfig

__all__ = [
    "ENCODERS",
    "HiEndMAEUNETR",
    "PrimusConfig",
    "PrimusEncoder",
    "ViT",
    "ViTConfig",
    "encoder_config",
    "interpolate_pos_embed",
    "sincos_pos_embed",
]
