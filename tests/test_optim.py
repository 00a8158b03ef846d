"""Which parameters decay and how fast each layer learns, by name."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from nnunetv2_hiendmae.architectures import HiEndMAEUNETR, ViTConfig
from nnunetv2_hiendmae.optim import FineTuneSchedule, decay_groups, layer_decay_groups, warmup_cosine
from pretraining.config import ModelConfig
from pretraining.model import HiEndMAE

ENCODER = ViTConfig(patch_size=(4, 4, 4), embed_dim=12, depth=3, num_heads=2, taps=(0, 1))


@pytest.fixture
def network() -> HiEndMAEUNETR:
    return HiEndMAEUNETR(ENCODER, input_channels=1, num_classes=2, img_size=(8, 8, 8), feature_size=2)


def names_of(groups: list[dict], module: torch.nn.Module, key: str) -> dict[str, float]:
    """What a group's setting is for each named parameter; every parameter is in one group."""
    names = {id(p): name for name, p in module.named_parameters()}
    found = [(names[id(p)], group[key]) for group in groups for p in group["params"]]
    assert len(found) == len(names) == len(dict(found))
    return dict(found)


def test_matrices_decay_and_nothing_else() -> None:
    config = ModelConfig(
        img_size=(8, 8, 8), patch_size=(4, 4, 4), in_channels=1, embed_dim=12, depth=3, num_heads=2, mlp_ratio=2,
        taps=(0, 1), mask_ratio=0.5, decoder_embed_dim=12, decoder_num_heads=2, decoder_self_depth=1,
    )  # fmt: skip
    model = HiEndMAE(config)
    decay = names_of(decay_groups(model.named_parameters(), 0.05), model, "weight_decay")
    for name, value in decay.items():
        free = name.endswith(".bias") or ".norm" in name or name in ("mask_token", "encoder.cls_token")
        assert value == (0.0 if free else 0.05), name
    published = names_of(decay_groups(model.named_parameters(), 0.05, divided=False), model, "weight_decay")
    assert set(published.values()) == {0.05}


def test_layers_learn_slower_the_further_they_are_from_the_decoder(network: HiEndMAEUNETR) -> None:
    scale = names_of(layer_decay_groups(network, ENCODER, 0.05, 0.5), network, "lr_scale")
    for name, value in scale.items():
        if name.startswith("vit.blocks."):
            distance = ENCODER.depth + 1 - int(name.split(".")[2])
        elif name.startswith("vit.norm"):
            distance = 1
        else:
            distance = ENCODER.depth + 2 if name.startswith("vit.") else 0
        assert value == 0.5**distance, name


def test_schedule_of_fine_tuning(network: HiEndMAEUNETR) -> None:
    optimizer = torch.optim.AdamW(layer_decay_groups(network, ENCODER, 0.05, 0.5))
    schedule = FineTuneSchedule(optimizer, initial_lr=1e-2, num_epochs=10, warmup_epochs=2)
    rates = []
    for epoch in range(10):
        schedule.step(epoch)
        assert all(g["lr"] == optimizer.param_groups[0]["lr"] * g["lr_scale"] for g in optimizer.param_groups)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:3] == pytest.approx([5e-3, 1e-2, 1e-2])
    assert all(a > b > 0 for a, b in pairwise(rates[2:]))


def test_pre_training_warms_up_from_0_and_ends_at_0() -> None:
    rates = [warmup_cosine(step, 100, 10) for step in range(101)]
    assert rates[0] == 0 and rates[5] == 0.5 and max(rates) == rates[10] == 1 and rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0)
