"""Parameter counts of the published models, as measured on the authors' code (crops of 96³, one channel)."""

from __future__ import annotations

import pytest
import torch

from nnunetv2_hiendmae.architectures import ENCODERS, HiEndMAEUNETR, ViTConfig
from pretraining import HiEndMAE, ModelConfig

CROP = (96, 96, 96)
# encoder preset: (decoder width, decoder heads)
DECODERS = {"large_p12": (528, 16), "large_p16": (528, 16), "base_p16": (384, 12), "base_p12": (384, 12)}
# encoder, decoder, 4 projections, mask token, frozen position embeddings (encoder, decoder)
COUNTS = {
    "large_p12": (342_638_592, 21_031_440, 3_246_144, 528, 786_432, 270_336),
    "large_p16": (346_275_840, 22_284_112, 3_246_144, 528, 331_776, 114_048),
    "base_p16": (88_203_264, 12_226_432, 1_181_184, 384, 165_888, 82_944),
    "base_p12": (86_384_640, 11_314_752, 1_181_184, 384, 393_216, 196_608),
}
TRAINABLE = {"large_p12": 366_916_704, "large_p16": 371_806_624, "base_p16": 101_611_264, "base_p12": 98_880_960}
UNETR_PARTS = {
    "image_path": 28_544,
    "tap_paths.2": 1_294_336,
    "tap_paths.1": 2_588_672,
    "tap_paths.0": 3_145_728,
    "up_blocks.0": 8_585_216,
    "up_blocks.1": 1_622_016,
    "up_blocks.2": 405_504,
    "head": 462,
}


def encoder(name: str) -> ViTConfig:
    """A preset; the authors' base model with their default patch size 12 is none."""
    if name in ENCODERS:
        return ENCODERS[name]
    return ViTConfig(**{**ENCODERS["base_p16"].to_dict(), "patch_size": (12, 12, 12)})


def count(module: torch.nn.Module | torch.nn.Parameter) -> int:
    return sum(p.numel() for p in module.parameters()) if isinstance(module, torch.nn.Module) else module.numel()


@pytest.mark.parametrize("name", COUNTS)
def test_pretraining_model(name):
    dim, heads = DECODERS[name]
    config = ModelConfig(
        **{**encoder(name).to_dict(), "in_channels": 1},
        img_size=CROP,
        mask_ratio=0.75,
        decoder_embed_dim=dim,
        decoder_num_heads=heads,
        decoder_self_depth=2,
    )
    with torch.device("meta"):
        mae = HiEndMAE(config)
    parts = (mae.encoder, mae.decoder, mae.encoder_to_decoder, mae.mask_token)
    counts = tuple(count(part) for part in parts)
    assert (*counts, mae.encoder.pos_embed.numel(), mae.decoder_pos_embed.numel()) == COUNTS[name]
    assert sum(p.numel() for p in mae.parameters()) == TRAINABLE[name] == sum(COUNTS[name][:4])


def test_segmentation_network():
    with torch.device("meta"):
        network = HiEndMAEUNETR(ENCODERS["large_p12"], input_channels=1, num_classes=14, img_size=CROP, feature_size=32)
    assert {part: count(network.get_submodule(part)) for part in UNETR_PARTS} == UNETR_PARTS
    assert count(network.reduce) + count(network.mix) == 140_320
    assert count(network.vit) == 343_423_488
    assert count(network) == 361_234_286
