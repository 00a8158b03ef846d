"""Our Hi-End-MAE computes what the authors' code computes (tolerances of their numerical noise, or tighter)."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import torch
from golden import NAMES, needs_golden
from torch import nn

from nnunetv2_hiendmae.optim import decay_groups, warmup_cosine
from pretraining.masking import patchify, take_tokens, unpatchify

pytestmark = needs_golden

AUTHORS_LR, AUTHORS_BETAS, AUTHORS_DECAY = 1e-3, (0.9, 0.95), 0.05


def assert_near(actual: torch.Tensor, expected: np.ndarray, atol: float = 2e-5) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=atol)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def reference(name: str) -> dict[str, np.ndarray]:
    return golden.arrays(f"{name}_pretrain.npz")


@pytest.fixture
def inputs(reference: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(reference["x"]), torch.from_numpy(reference["shuffle_indices"])


def test_loss_and_predictions(name, reference, inputs):
    output = golden.model(name)(*inputs, return_pred=True)
    assert output.loss.item() == pytest.approx(float(reference["loss"]), rel=1e-5)
    assert_near(output.pred, reference["pred"])


def test_loss_is_the_same_without_the_unneeded_tokens(name, reference, inputs):
    """The last block is skipped for tokens that the loss does not look at; that must not change it."""
    assert golden.model(name)(*inputs).loss.item() == pytest.approx(float(reference["loss"]), rel=1e-5)


def test_encoder_layers(name, reference, inputs):
    x, ids = inputs
    mae = golden.model(name)
    taps, final = mae.forward_encoder(patchify(x, mae.config.patch_size), ids)
    for index, tap in zip((3, 6, 9), taps, strict=True):
        assert_near(tap, reference[f"enc_hidden_{index}"])
    assert_near(final, reference["enc_final"])


def test_decoder_inputs(name, reference, inputs):
    x, ids = inputs
    mae = golden.model(name)
    taps, final = mae.forward_encoder(patchify(x, mae.config.patch_size), ids)
    assert_near(mae.decoder_input(final, ids)[0], reference["dec_in_12_sample0"])
    assert_near(mae.encoder_to_decoder[2](taps[2])[0], reference["dec_in_9_sample0"])


def test_target(name, reference, inputs):
    x, ids = inputs
    mae = golden.model(name)
    assert_near(mae.target(patchify(x, mae.config.patch_size), ids)[0], reference["target_sample0"])


def test_every_gradient(name, reference, inputs):
    mae = golden.model(name)
    mae(*inputs).loss.backward()
    gradients = {key: p.grad for key, p in mae.named_parameters()}
    expected = dict(zip(reference["grad_names"], reference["grad_norms"], strict=True))
    assert set(gradients) == set(expected)
    for key, norm in expected.items():
        assert gradients[key].double().norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-9), key
    whole = {key.removeprefix("grad/"): value for key, value in reference.items() if key.startswith("grad/")}
    assert len(whole) > 100
    for key, value in whole.items():
        assert_near(gradients[key], value.reshape(gradients[key].shape), atol=1e-4 * np.abs(value).max() + 1e-8)


def test_six_steps_with_the_published_undivided_weight_decay(name, reference, inputs):
    mae = golden.model(name)
    optimizer = torch.optim.AdamW(
        decay_groups(mae.named_parameters(), AUTHORS_DECAY, divided=False), AUTHORS_LR, AUTHORS_BETAS
    )
    losses = []
    for _ in reference["traj_losses"]:
        loss = mae(*inputs).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose(losses, reference["traj_losses"], rtol=1e-5)
    norms = dict(zip(reference["grad_names"], reference["traj_param_norms"], strict=True))
    for key, parameter in mae.named_parameters():
        assert parameter.double().norm().item() == pytest.approx(norms[key], rel=1e-4), key


def test_reconstruction_differs_by_the_documented_denormalisation_only(name, reference, inputs):
    """The authors undo the normalisation with another deviation than they normalise with; ours is exact."""
    x, ids = inputs
    mae = golden.model(name)
    pred = mae(x, ids, return_pred=True).pred[:1, 1:]
    patches = patchify(x[:1], mae.config.patch_size)
    in_order = torch.zeros_like(pred).scatter(1, ids[:1, :, None].expand_as(pred), pred)
    authors = in_order * (patches.var(-1, keepdim=True).sqrt() + 1e-6) + patches.mean(-1, keepdim=True)
    assert_near(authors[0], reference["image_recon_sample0"])
    assert torch.equal(take_tokens(in_order, ids[:1]), pred)
    assert torch.equal(unpatchify(patches, mae.config.patch_size, mae.config.grid), x[:1])


def test_pretraining_schedule():
    reference = golden.arrays("lr_schedule.npz")
    ours = [1e-4 * warmup_cosine(epoch, total=1000, warmup=10) for epoch in reference["epoch"]]
    np.testing.assert_allclose(ours, reference["lr"], rtol=1e-9, atol=1e-18)


def test_modules_with_a_layer_norm_share_the_published_eps(name):
    norms = [m for m in golden.model(name).modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * 12 + 1 + 2 * 2 + 3 * 3 + 1
    assert {m.eps for m in norms} == {1e-6}
