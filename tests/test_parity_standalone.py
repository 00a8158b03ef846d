"""Parity with the authors' code on the numbers that are in this repository; see ``fixtures/README.md``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import FIXTURES

from nnunetv2_hiendmae.architectures import sincos_pos_embed
from nnunetv2_hiendmae.optim import warmup_cosine
from pretraining import HiEndMAE, ModelConfig
from pretraining.masking import patchify

CONFIG = ModelConfig(
    img_size=(48, 48, 48),
    patch_size=(16, 16, 16),
    in_channels=1,
    embed_dim=60,
    depth=12,
    num_heads=6,
    mlp_ratio=4.0,
    taps=(3, 6, 9),
    mask_ratio=0.75,
    decoder_embed_dim=36,
    decoder_num_heads=4,
    decoder_self_depth=2,
)


@pytest.fixture(scope="module")
def numbers() -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / "authors_numbers.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data.files}


@pytest.fixture(scope="module")
def mae(numbers) -> HiEndMAE:
    """Our model with the authors' weights after the encoder; last-layer rows that are not kept are zero."""
    model = HiEndMAE(CONFIG)
    given = {key.removeprefix("weights/"): value for key, value in numbers.items() if key.startswith("weights/")}
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith("encoder.")}
    assert set(given) == set(wanted)
    for key in ("decoder.head.weight", "decoder.head.bias"):
        given[key] = torch.zeros_like(wanted[key]).index_copy(0, numbers["columns"], given[key])
    model.load_state_dict({**model.state_dict(), **given}, strict=True)
    return model


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_decoder_input_and_memory(numbers, mae):
    assert_near(mae.decoder_input(numbers["final"][None], numbers["ids_shuffle"][None])[0], numbers["decoder_input"])
    assert_near(mae.encoder_to_decoder[2](numbers["taps"][2]), numbers["memory_9"])


@torch.no_grad()
def test_decoder(numbers, mae):
    taps = [tap[None] for tap in numbers["taps"]]
    pred = mae.forward_decoder(taps, numbers["final"][None], numbers["ids_shuffle"][None], all_tokens=True)
    assert_near(pred[0][:, numbers["columns"]], numbers["pred"])
    masked = mae.forward_decoder(taps, numbers["final"][None], numbers["ids_shuffle"][None])
    assert_near(masked[0][:, numbers["columns"]], numbers["pred"][-CONFIG.num_masked :])


@torch.no_grad()
def test_decoder_would_notice_taps_in_another_order(numbers, mae):
    taps = [tap[None] for tap in numbers["taps"].flip(0)]
    pred = mae.forward_decoder(taps, numbers["final"][None], numbers["ids_shuffle"][None], all_tokens=True)
    assert (pred[0][:, numbers["columns"]] - numbers["pred"]).abs().max() > 0.1


def test_target(numbers, mae):
    patches = patchify(numbers["masked_patches"][:, None].float() / 256, CONFIG.patch_size)  # (3, 1, P)
    masked_last = torch.zeros(1, CONFIG.num_tokens, CONFIG.patch_dim)
    masked_last[0, -3:] = patches[:, 0]
    target = mae.target(masked_last, torch.arange(CONFIG.num_tokens)[None])
    assert_near(target[0, -3:, ::16], numbers["target"])


def test_position_embeddings(numbers):
    assert_near(sincos_pos_embed(60, CONFIG.grid), numbers["encoder_pos_embed"])
    assert_near(sincos_pos_embed(36, CONFIG.grid), numbers["decoder_pos_embed"])


def test_learning_rate_schedule(numbers):
    pretraining = [1e-4 * warmup_cosine(epoch, total=1000, warmup=10) for epoch in numbers["lr_epoch"].tolist()]
    np.testing.assert_allclose(pretraining, numbers["lr"], rtol=1e-9, atol=1e-18)
