"""Controls: identity instead of the ViT's blocks, and an encoder that is frozen throughout."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import DATASET, World

from nnunetv2_hiendmae.architectures.unetr import HiEndMAEUNETR
from nnunetv2_hiendmae.architectures.vit import ViTConfig
from nnunetv2_hiendmae.nnunet.settings import FineTuneSettings

ENCODER = ViTConfig(patch_size=(8, 8, 4), embed_dim=24, depth=4, num_heads=2, taps=(1, 2))


def network(**kwargs: bool) -> HiEndMAEUNETR:
    torch.manual_seed(0)
    return HiEndMAEUNETR(ENCODER, input_channels=1, num_classes=3, img_size=(16, 24, 8), feature_size=4, **kwargs)


def test_identity_blocks_have_no_parameters() -> None:
    control, full = network(identity_blocks=True), network()
    names, all_names = set(control.state_dict()), set(full.state_dict())
    assert all_names - names == {name for name in all_names if name.startswith("vit.blocks.")}
    assert control(torch.rand(1, 1, 16, 24, 8)).shape == (1, 3, 16, 24, 8)
    x = torch.rand(1, 1, 16, 24, 8)
    taps, final = control.vit(x)
    embedded = control.vit.patch_embed(x) + control.vit.pos_embed
    assert all(torch.equal(tap, embedded) for tap in taps)
    assert torch.equal(final, control.vit.norm(embedded))


def test_identity_blocks_are_another_network() -> None:
    with_blocks, without = FineTuneSettings(), FineTuneSettings(identity_blocks=True)
    assert not with_blocks.same_network(without)
    with pytest.raises(ValueError, match="identity_blocks='yes' must be true or false"):
        FineTuneSettings(identity_blocks="yes")  # type: ignore[arg-type]


WINDOW = {"window_hu": [-175, 250]}  # a training has it from its weights
AXES = """
import json, sys, torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
plans, dataset, name = json.load(open(sys.argv[1])), json.load(open(sys.argv[2])), sys.argv[3]
plans["configurations"]["3d_fullres"]["hiendmae"], plans["continue_training"] = json.loads(sys.argv[4]), False
trainer = recursive_find_trainer_class_by_name(name)(plans, "3d_fullres", 0, dataset, torch.device("cpu"))
choices = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
transforms = trainer.get_training_transforms([8, 8, 8], choices[0], None, choices[3], False)
margin = [int(n) for n in choices[2]] != list(trainer.configuration_manager.patch_size)
print(json.dumps([choices[3], trainer.inference_allowed_mirroring_axes, margin, "Spatial" in str(transforms)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nnUNetTrainerBudget", "nnUNetTrainerHiEndMAE_scratch"])
def test_less_augmentation(world: World, name: str) -> None:
    """No mirroring in training or prediction; no margin and no rotation either; without the settings as nnU-Net."""
    folder = world.root / "preprocessed" / DATASET
    files = [str(folder / "nnUNetPlans.json"), str(folder / "dataset.json")]
    all_axes = [0, 1, 2]
    for block, expected in (
        ({}, [all_axes, all_axes, True, True]),
        ({"no_mirroring": True}, [None, None, True, True]),
        ({"no_augmentation": True}, [None, None, False, False]),
    ):
        command = [sys.executable, "-W", "ignore", "-c", AXES, *files, name, json.dumps(block | WINDOW)]
        said = subprocess.run(command, env=world.env, capture_output=True, check=True, encoding="utf-8").stdout
        assert json.loads(said.splitlines()[-1]) == expected
