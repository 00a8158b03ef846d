"""Fresh weights have the published distributions."""

from __future__ import annotations

import math

import pytest
import torch

from pretraining import HiEndMAE, ModelConfig

CONFIG = ModelConfig(
    img_size=(16, 24, 32),
    patch_size=(8, 8, 8),
    in_channels=2,
    embed_dim=96,
    depth=4,
    num_heads=4,
    mlp_ratio=4.0,
    taps=(1, 2),
    mask_ratio=0.5,
    decoder_embed_dim=72,
    decoder_num_heads=3,
    decoder_self_depth=1,
)
TORCH_DEFAULT_BIAS = ("encoder.patch_embed.proj.bias", "encoder_to_decoder.")


@pytest.fixture(scope="module")
def parameters() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: p.detach() for name, p in HiEndMAE(CONFIG).named_parameters()}


def assert_uniform(values: torch.Tensor, bound: float, name: str) -> None:
    """Within the bound, reaching it, centred, and with a uniform distribution's deviation (4 standard errors)."""
    n = values.numel()
    assert values.abs().max() <= bound * (1 + 1e-6), name
    assert values.abs().max() > bound * (1 - 10 / n), name
    assert abs(values.mean()) < 4 * bound / math.sqrt(3 * n), name
    assert abs(values.std() / (bound / math.sqrt(3)) - 1) < 4 * math.sqrt(0.2 / n) + 1 / n, name


def test_every_matrix_is_xavier_uniform(parameters):
    """Over the whole matrix: qkv as one (3E, E), kv as one (2D, D), the patch embedding as (E, C·ph·pw·pd)."""
    matrices = {name: p for name, p in parameters.items() if name.endswith("weight") and p.ndim > 1}
    assert len(matrices) == 1 + 4 * 4 + 4 * 1 + 7 * 2 + 1 + 3
    for name, weight in matrices.items():
        fan_out, fan_in = weight.flatten(1).shape
        assert_uniform(weight, math.sqrt(6 / (fan_in + fan_out)), name)


def test_biases_and_norms(parameters):
    for name, value in parameters.items():
        if value.ndim != 1 or name.startswith(TORCH_DEFAULT_BIAS):
            continue
        is_norm_weight = name.endswith("weight")
        assert torch.equal(value, torch.full_like(value, float(is_norm_weight))), name


def test_two_kinds_of_bias_keep_torchs_default(parameters):
    patch_dim = 2 * 8**3
    assert_uniform(parameters["encoder.patch_embed.proj.bias"], 1 / math.sqrt(patch_dim), "patch embedding")
    biases = torch.stack([parameters[f"encoder_to_decoder.{i}.bias"] for i in range(3)])
    assert_uniform(biases, 1 / math.sqrt(96), "encoder_to_decoder")


def test_tokens_are_small_normal():
    """Over several models, for a token alone is a small sample."""
    torch.manual_seed(1)
    models = [HiEndMAE(CONFIG) for _ in range(8)]
    for tokens in ([m.mask_token for m in models], [m.encoder.cls_token for m in models]):
        values = torch.stack([t.detach().flatten() for t in tokens])
        assert abs(values.std() / 0.02 - 1) < 4 / math.sqrt(2 * values.numel())
        assert abs(values.mean()) < 4 * 0.02 / math.sqrt(values.numel())
        assert (values.abs() > 0.04).float().mean() < 0.1  # 4.6 % of a normal lies beyond two deviations
        assert values.abs().max() > 0.04
