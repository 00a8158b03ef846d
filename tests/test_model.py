"""``HiEndMAE`` at sizes for which no published numbers exist, against a second, plain implementation."""

from __future__ import annotations

from dataclasses import replace

import plain_hiendmae
import pytest
import torch

from pretraining import HiEndMAE, ModelConfig
from pretraining.masking import patchify, unpatchify

BASE = ModelConfig(
    img_size=(36, 48, 24),
    patch_size=(12, 12, 12),
    in_channels=1,
    embed_dim=60,
    depth=5,
    num_heads=5,
    mlp_ratio=4.0,
    taps=(1, 2, 3),
    mask_ratio=0.6,
    decoder_embed_dim=30,
    decoder_num_heads=3,
    decoder_self_depth=1,
)
CONFIGS = {
    "non-cubic": BASE,
    "two channels": replace(
        BASE, img_size=(24, 24, 24), patch_size=(8, 8, 8), in_channels=2, embed_dim=48, num_heads=3,
        decoder_embed_dim=42, decoder_num_heads=2, decoder_self_depth=3, mask_ratio=0.5,
    ),
    "anisotropic patch, three channels": replace(BASE, img_size=(8, 24, 12), patch_size=(2, 8, 6), in_channels=3),
    "one tap, the first block": replace(BASE, taps=(0,)),
    "every block tapped": replace(BASE, taps=(0, 1, 2, 3, 4), img_size=(12, 36, 24)),
    "depth 12, published taps": replace(BASE, depth=12, taps=(3, 6, 9), img_size=(12, 24, 36)),
    "no self-attention blocks, odd head width": replace(
        BASE, decoder_self_depth=0, decoder_embed_dim=66, decoder_num_heads=2, embed_dim=66, num_heads=2
    ),
    "narrow MLP, little masked": replace(BASE, mlp_ratio=1.5, mask_ratio=0.1),
    "one visible token": replace(BASE, mask_ratio=0.95),
    "control: last layer": replace(BASE, decoder="last_layer"),
    "control: plain MAE": replace(BASE, decoder="self_attention"),
}  # fmt: skip


def perturbed(config: ModelConfig) -> HiEndMAE:
    """A model in double precision whose biases and norms are not at their trivial start."""
    torch.manual_seed(0)
    mae = HiEndMAE(config).double()
    with torch.no_grad():
        for parameter in mae.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return mae


def example(config: ModelConfig, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops with air (zeros), and token orders that differ between the samples."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch, config.in_channels, *config.img_size, generator=generator, dtype=torch.float64)
    x = torch.where(x < 0.3, 0.0, x)
    x[:, :, : config.patch_size[0], : config.patch_size[1], : config.patch_size[2]] = 0
    return x, torch.rand(batch, config.num_tokens, generator=generator).argsort(1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_against_the_plain_implementation(config):
    mae = perturbed(config)
    x, ids = example(config)
    parameters = dict(mae.named_parameters())
    loss, pred = plain_hiendmae.forward(parameters, config, x, ids)
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    output = mae(x, ids, return_pred=True)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(output.pred, pred, rtol=0, atol=2e-6)  # positions are float32

    mae(x, ids).loss.backward()  # the path of training, which leaves out tokens without a loss
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        difference = (parameter.grad - expected[name]).norm()
        assert difference <= 2e-5 * expected[name].norm() + 1e-9, name


def test_samples_do_not_see_each_other():
    x, ids = example(BASE, batch=3)
    mae = perturbed(BASE)
    together = mae(x, ids, return_pred=True).pred
    for i in range(3):
        torch.testing.assert_close(mae(x[i : i + 1], ids[i : i + 1], return_pred=True).pred[0], together[i])


def test_masked_voxels_do_not_reach_the_prediction():
    x, ids = example(BASE)
    mae = perturbed(BASE)
    patches = patchify(x, BASE.patch_size)
    for b in range(len(x)):
        patches[b, ids[b, BASE.num_visible :]] = 0.77
    hidden = unpatchify(patches, BASE.patch_size, BASE.grid)
    assert not torch.equal(hidden, x)
    assert torch.equal(mae(x, ids, return_pred=True).pred, mae(hidden, ids, return_pred=True).pred)


def test_order_of_the_visible_tokens_does_not_matter():
    x, ids = example(BASE)
    mae = perturbed(BASE)
    other = ids.clone()
    other[:, : BASE.num_visible] = ids[:, : BASE.num_visible].flip(1)
    assert mae(x, other).loss.item() == pytest.approx(mae(x, ids).loss.item(), rel=1e-9)


def test_random_order_covers_every_token_and_is_returned():
    x, _ = example(BASE)
    ids = perturbed(BASE)(x).ids_shuffle
    assert torch.equal(ids.sort(1).values, torch.arange(BASE.num_tokens).expand(2, -1))
    assert not torch.equal(ids[0], ids[1])


def test_a_constant_patch_has_target_zero():
    mae = perturbed(BASE)
    patches = torch.full((1, BASE.num_tokens, BASE.patch_dim), 0.3)
    assert mae.target(patches, torch.arange(BASE.num_tokens)[None]).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": (36, 48, 25)}, r"img_size=\(36, 48, 25\) must be a multiple of patch_size=\(12, 12, 12\)"),
        ({"embed_dim": 50}, "embed_dim=50 must be divisible by 6"),
        ({"decoder_embed_dim": 32}, "decoder_embed_dim=32 must be divisible by 6"),
        ({"mask_ratio": 0.0}, "mask_ratio=0.0 leaves 24 of 24"),
        ({"mask_ratio": 0.99}, "mask_ratio=0.99 leaves 0 of 24"),
        ({"taps": (1, 5)}, r"taps=\(1, 5\) name blocks beyond depth=5"),
        ({"taps": (2, 1)}, "ascending"),
    ],
)
def test_impossible_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(BASE, **changes)


def test_input_that_does_not_fit():
    mae = HiEndMAE(BASE)
    with pytest.raises(ValueError, match=r"\(1, 48, 36, 24\) given; the model takes \(1, 36, 48, 24\)"):
        mae(torch.zeros(1, 1, 48, 36, 24))
    with pytest.raises(ValueError, match=r"ids_shuffle is \(1, 23\), must be \(1, 24\)"):
        mae(torch.zeros(1, 1, 36, 48, 24), torch.arange(23)[None])
