"""The 3D ViT and the segmentation network built on it."""

from nnunetv2_hiendmae.architectures.pos_embed import interpolate_pos_embed, sincos_pos_embed
from nnunetv2_hiendmae.architectures.unetr import HiEndMAEUNETR
from nnunetv2_hiendmae.architectures.vit import ENCODERS, ViT, ViTConfig

__all__ = ["ENCODERS", "HiEndMAEUNETR", "ViT", "ViTConfig", "interpolate_pos_embed", "sincos_pos_embed"]
