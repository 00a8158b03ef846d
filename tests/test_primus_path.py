"""From pre-training a Primus to fine-tuning it, with the commands that users run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import DATASET, World

from nnunetv2_hiendmae.weights.file import load_weights


@pytest.mark.slow
def test_primus_from_pre_training_to_nnunets_own_trainer(world: World, tmp_path: Path) -> None:
    world.run(
        "hiendmae_pretrain -d 901 -preset primus_s -device cpu -steps 2 -batch_size 1 -crop_size 16 24 16 "
        "-num_workers 0 --activation_checkpointing"
    )
    run = world.root / "results" / DATASET / "HiEndMAE__nnUNetPlans__3d_fullres" / "primus_s_901"
    weights = run / "encoder_weights.pth"
    assert load_weights(weights).architecture.kind == "primus"

    for decoder in ("patch", "hierarchical"):
        world.run(
            f"hiendmae_plan -d 901 -plans_name Primus{decoder} --weights {weights} --epochs 1 --feature_size 4 "
            f"--num_iterations_per_epoch 1 --num_val_iterations_per_epoch 1 --segmentation_decoder {decoder}"
        )
        world.run(f"nnUNetv2_train 901 3d_fullres 0 -p Primus{decoder} -tr nnUNetTrainerHiEndMAE -device cpu")
        folder = world.root / "results" / DATASET / f"nnUNetTrainerHiEndMAE__Primus{decoder}__3d_fullres"
        block = json.loads((folder / "plans.json").read_text())["configurations"]["3d_fullres"]["hiendmae"]
        assert block["architecture"]["kind"] == "primus" and block["segmentation_decoder"] == decoder
        assert (folder / "fold_0" / "validation" / "summary.json").is_file()

    refused = world.run(f"hiendmae_import_weights {weights} -o {tmp_path / 'start.pth'} --nnunet -d 901", ok=False)
    assert "'hiendmae_plan -patch_size 32 40 40' writes plans that have" in refused
    world.run("hiendmae_plan -d 901 -plans_name PrimusTheirs -patch_size 32 40 40")
    out = world.run(f"hiendmae_import_weights {weights} -o {tmp_path / 'start.pth'} --nnunet -d 901 -p PrimusTheirs")
    assert "-tr nnUNet_Primus_S_Trainer -pretrained_weights" in out
    first = torch.load(tmp_path / "start.pth", weights_only=True)["network_weights"]["eva.blocks.3.attn.q_proj.weight"]
    assert torch.equal(first, load_weights(weights).encoder["eva.blocks.3.attn.q_proj.weight"])
    # nnU-Net's form does not say on what grid its positions are, which is no cube here.
    again = "hiendmae_pretrain -d 901 -preset primus_s -device cpu -steps 1 -batch_size 1 -num_workers 0 -run again"
    refused = world.run(f"{again} -crop_size 16 16 16 -init {tmp_path / 'start.pth'}", ok=False)
    assert "say -img_size" in refused
    world.run(f"hiendmae_import_weights {tmp_path / 'start.pth'} -o {tmp_path / 'back.pth'} -img_size 32 40 40")
    out = world.run(f"{again} -crop_size 16 16 16 -init {tmp_path / 'back.pth'}")
    assert "interpolated from 4 × 5 × 5 to 2 × 2 × 2 tokens" in out
