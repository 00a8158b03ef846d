"""What nnU-Net can do, our trainer can: several channels, regions, ignore label, cascade."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import World

from pretraining.phantom import LABELS, write_phantoms

TRAIN = "nnUNetv2_train {dataset} {configuration} {fold} -tr nnUNetTrainerHiEndMAE -p {plans} -device cpu"
SHORT = "--epochs 1 --num_iterations_per_epoch 1 --num_val_iterations_per_epoch 1 --feature_size 4"


def rewrite(file: Path, change) -> None:
    image = sitk.ReadImage(str(file))
    changed = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(image)))
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(file), useCompression=True)


@pytest.fixture(scope="module")
def ct_pet(tmp_path_factory: pytest.TempPathFactory) -> World:
    """CT and a second modality, overlapping regions, and an ignore label on the last slices."""
    world = World(tmp_path_factory.mktemp("matrix"))
    folder = write_phantoms(world.root / "raw", "Dataset902_CtPet", 5, 1, spacing=(7.0, 7.0, 9.0))

    def ignore_some(labels: np.ndarray) -> np.ndarray:
        labels[-4:] = len(LABELS)
        return labels

    for file in folder.glob("labelsT*/*"):
        rewrite(file, ignore_some)
    for file in sorted(folder.glob("imagesT*/*_0000.nii.gz")):
        pet = file.with_name(file.name.replace("_0000", "_0001"))
        pet.write_bytes(file.read_bytes())
        rewrite(pet, lambda hu: (np.clip(hu, 0, 300) * 10).astype(np.float32))
    regions = {"background": 0, "organs": [1, 2, 4], "kidneys": 2, "spine": 3, "ignore": len(LABELS)}
    description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    description |= {"channel_names": {"0": "CT", "1": "PET"}, "labels": regions, "regions_class_order": [1, 2, 3]}
    (folder / "dataset.json").write_text(json.dumps(description))
    world.run("nnUNetv2_plan_and_preprocess -d 902 -c 3d_fullres -np 1 -npfp 1")
    world.run(f"hiendmae_plan -d 902 {SHORT}")
    return world


@pytest.mark.slow
def test_channels_regions_ignore(ct_pet: World, pretrained: Path) -> None:
    command = TRAIN.format(dataset=902, configuration="3d_fullres", fold=0, plans="nnUNetPlans_hiendmae")
    log = ct_pet.run(command, HIENDMAE_WEIGHTS=str(pretrained))
    assert "Loaded" in log and "Mean Validation Dice" in log
    images, out = ct_pet.root / "raw" / "Dataset902_CtPet" / "imagesTs", ct_pet.root / "out"
    ct_pet.run(
        f"nnUNetv2_predict -i {images} -o {out} -d 902 -c 3d_fullres -f 0 -tr nnUNetTrainerHiEndMAE "
        "-p nnUNetPlans_hiendmae -device cpu --disable_tta -npp 1 -nps 1"
    )
    predicted = sitk.GetArrayFromImage(sitk.ReadImage(str(next(out.glob("*.nii.gz")))))
    assert predicted.shape == sitk.GetArrayFromImage(sitk.ReadImage(str(next(images.glob("*_0001*"))))).shape
    (network,) = (ct_pet.root / "results" / "Dataset902_CtPet").glob("*/fold_0/checkpoint_final.pth")
    bias = torch.load(network, weights_only=False)["network_weights"]["head.seg_layers.0.bias"]
    assert (bias - math.log(0.02)).abs().max() < 0.01  # regions have no background channel


@pytest.mark.slow
def test_pretraining_refuses_channels_without_hu(ct_pet: World) -> None:
    log = ct_pet.run("hiendmae_pretrain -d 902 -preset tiny -device cpu -steps 2", ok=False)
    assert "channel 1 (PET)" in log and "Traceback" not in log


@pytest.mark.slow
def test_cascade(world: World, pretrained: Path) -> None:
    """3d_lowres on all cases, whose predictions then feed 3d_cascade_fullres."""
    folder = world.root / "preprocessed" / "Dataset901_TestPhantom"
    plans = json.loads((folder / "nnUNetPlans.json").read_text(encoding="utf-8"))
    full = plans["configurations"]["3d_fullres"]
    low = {**full, "data_identifier": "nnUNetPlansCascade_3d_lowres", "spacing": [s * 1.3 for s in full["spacing"]]}
    plans["plans_name"] = "nnUNetPlansCascade"
    plans["configurations"] = {
        "3d_fullres": full,
        "3d_lowres": {**low, "next_stage": "3d_cascade_fullres"},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    (folder / "nnUNetPlansCascade.json").write_text(json.dumps(plans))
    world.run("nnUNetv2_preprocess -d 901 -plans_name nnUNetPlansCascade -c 3d_lowres -np 1")
    world.run(f"hiendmae_plan -d 901 -p nnUNetPlansCascade {SHORT}")
    for configuration in ("3d_lowres", "3d_cascade_fullres"):
        command = TRAIN.format(
            dataset=901, configuration=configuration, fold="all", plans="nnUNetPlansCascade_hiendmae"
        )
        log = world.run(command, HIENDMAE_WEIGHTS=str(pretrained))
        assert "Mean Validation Dice" in log


def test_processes_without_gpus_are_refused_by_nnunet(world: World, pretrained: Path, tmp_path: Path) -> None:
    two = TRAIN.format(dataset=901, configuration="3d_fullres", fold=0, plans="nnUNetPlans") + " -num_gpus 2"
    env = {"HIENDMAE_WEIGHTS": str(pretrained), "nnUNet_results": str(tmp_path)}
    assert "DDP training" in world.run(two, ok=False, **env)
