"""Weights files: how they are written, found, loaded, converted from other programs' forms, and shared."""

from nnunetv2_hiendmae.weights.file import (
    LoadReport,
    Weights,
    load_encoder,
    load_weights,
    save_weights,
    tensors_sha256,
)
from nnunetv2_hiendmae.weights.find import find_weights
from nnunetv2_hiendmae.weights.official import convert_official

__all__ = [
    "LoadReport",
    "Weights",
    "convert_official",
    "find_weights",
    "load_encoder",
    "load_weights",
    "save_weights",
    "tensors_sha256",
]
