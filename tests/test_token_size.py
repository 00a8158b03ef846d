"""Tokens of another size at fine-tuning than in pre-training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nnunetv2_hiendmae.architectures import HiEndMAEUNETR, PrimusConfig, ViTConfig
from nnunetv2_hiendmae.commands.plan import parser
from nnunetv2_hiendmae.nnunet.settings import FineTuneSettings
from nnunetv2_hiendmae.weights.file import Weights, load_encoder

WINDOW = (-175.0, 250.0)
VIT = ViTConfig(patch_size=(8, 8, 8), embed_dim=24, depth=2, num_heads=2, taps=(0, 1))
PRIMUS = PrimusConfig(patch_size=(8, 8, 8), embed_dim=24, depth=2, num_heads=2, taps=(0, 1))


@pytest.mark.parametrize("config", [VIT, PRIMUS], ids=["vit", "primus"])
def test_tokens_twice_as_large_see_the_same_in_smooth_images(config) -> None:
    """An image that was made twice as large by the rule's own interpolation gives the old tokens."""
    encoder = config.build((2, 2, 2), pretraining=True)
    header = {"architecture": config.to_dict(), "pos_embed_grid": [2, 2, 2], "window_hu": list(WINDOW)}
    weights = Weights(Path("w.pth"), encoder.state_dict(), header)
    settings = FineTuneSettings(vit_patch_size=(16, 16, 16)).resolved(config, WINDOW)
    assert settings.encoder == replace(config, patch_size=(16, 16, 16))
    assert (
        FineTuneSettings(**settings.to_block()).resolved(config, WINDOW) == settings
    )  # a block that is resolved again
    network = HiEndMAEUNETR(settings.encoder, input_channels=1, num_classes=2, img_size=(32, 32, 32), feature_size=2)
    report = load_encoder(network.vit, weights, 1)
    assert report.resized == {f"{config.stem}.weight": "tokens of 8 × 8 × 8 to 16 × 16 × 16 voxels, 0.0% of it lost"}
    x = torch.rand(1, 1, 8, 8, 8)  # one token; between tokens the interpolation of a whole image differs
    larger = torch.nn.functional.interpolate(x, size=(16, 16, 16), mode="trilinear")
    torch.testing.assert_close(network.vit.stem(larger), encoder.stem(x), rtol=1e-4, atol=1e-4)

    smaller = FineTuneSettings(vit_patch_size=(4, 8, 6)).resolved(config, WINDOW)
    network = HiEndMAEUNETR(smaller.encoder, input_channels=2, num_classes=2, img_size=(32, 32, 32), feature_size=2)
    words = load_encoder(network.vit, weights, 2).resized[f"{config.stem}.weight"]
    assert words.startswith("spread from 1 to 2 channels; tokens of 8 × 8 × 8 to 4 × 8 × 6 voxels, ")
    assert "0.0%" not in words
    assert network(torch.rand(1, 2, 32, 32, 32)).shape == (1, 2, 32, 32, 32)


def test_the_flag_and_impossible_sizes() -> None:
    assert parser().parse_args(["-d", "1", "--vit_patch_size", "8", "8", "8"]).vit_patch_size == [8, 8, 8]
    for size in ((0, 8, 8), (8, 8), (8, 8, 65)):
        with pytest.raises(ValueError, match="must be three integers of 1 to 64"):
            FineTuneSettings(vit_patch_size=size)
    with pytest.raises(ValueError, match="The plans ask for the architecture tiny"):
        FineTuneSettings(architecture="tiny", vit_patch_size=(4, 4, 4)).resolved(VIT, WINDOW)
