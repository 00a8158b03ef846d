"""Plans of another patch and batch size train nnU-Net's own U-Net."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import DATASET, World
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_hiendmae.nnunet.plans import stretched, with_patch_size


def configuration_of(world: World, plans: str) -> dict:
    file = world.root / "preprocessed" / DATASET / f"{plans}.json"
    return json.loads(file.read_text(encoding="utf-8"))["configurations"]["3d_fullres"]


def test_the_planned_patch_gives_the_plan_back(world: World) -> None:
    """Asked for the patch that nnU-Net planned, the topology is the one that nnU-Net planned."""
    planned = configuration_of(world, "nnUNetPlans")
    assert with_patch_size(planned, planned["patch_size"]) == planned


@pytest.mark.parametrize("patch", [(16, 24, 32), (8, 64, 64)])
def test_network_runs_on_the_patch(world: World, patch: tuple[int, int, int]) -> None:
    changed = with_patch_size(configuration_of(world, "nnUNetPlans"), patch)
    a = changed["architecture"]
    network = get_network_from_plans(
        a["network_class_name"], a["arch_kwargs"], a["_kw_requires_import"], 1, 3, deep_supervision=False
    )
    assert network(torch.zeros(1, 1, *patch)).shape == (1, 3, *patch)
    assert changed["patch_size"] == list(patch)


def test_small_patches_take_their_dice_over_the_batch(world: World) -> None:
    """As nnU-Net plans it where it would plan a 3d_lowres for the same patch: about an eighth of the median image."""
    planned = {**configuration_of(world, "nnUNetPlans"), "median_image_size_in_voxels": [64.0, 64.0, 64.0]}
    assert with_patch_size(planned, [40, 32, 32])["batch_dice"] is False
    assert with_patch_size(planned, [32, 32, 32])["batch_dice"] is True


def test_command_writes_both_sizes(world: World) -> None:
    world.run("hiendmae_plan -d 901 -plans_name sized -patch_size 16 24 32 -batch_size 5 --identity_blocks")
    changed = configuration_of(world, "sized")
    assert (changed["patch_size"], changed["batch_size"]) == ([16, 24, 32], 5)
    assert changed["hiendmae"] == {"identity_blocks": True}
    assert changed["data_identifier"] == "nnUNetPlans_3d_fullres"


def test_command_pools_the_dice_of_a_batch(world: World) -> None:
    assert configuration_of(world, "nnUNetPlans")["batch_dice"] is False
    world.run("hiendmae_plan -d 901 -plans_name pooled --batch_dice")
    assert configuration_of(world, "pooled")["batch_dice"] is True


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-patch_size 50 48 48", "-patch_size [50, 48, 48] cannot be pooled evenly; the next that nnU-Net's U-Net"),
        ("-patch_size 4 48 48", "must be three numbers of 8 to 1024"),
        ("-batch_size 0", "-batch_size 0 must be an integer of at least 1"),
    ],
)
def test_refused_in_one_line(world: World, flags: str, message: str) -> None:
    log = world.run(f"hiendmae_plan -d 901 -plans_name sized {flags}", ok=False)
    assert message in log and "Traceback" not in log


def test_stretched() -> None:
    assert stretched([1, 3, 4], 2) == [1, 3]
    assert stretched([1, 3, 4], 5) == [1, 3, 4, 4, 4]
