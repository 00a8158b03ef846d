"""A frozen encoder: no gradient, no step, no noise; it learns from the epoch on that the plans name."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import DATASET, World
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_hiendmae.architectures.unetr import HiEndMAEUNETR
from nnunetv2_hiendmae.architectures.vit import ViTConfig
from nnunetv2_hiendmae.nnunet.trainer import with_frozen_vit
from nnunetv2_hiendmae.optim import layer_decay_groups

ENCODER = ViTConfig(patch_size=(8, 8, 8), embed_dim=24, depth=2, num_heads=2, taps=(0, 1))
PLAN = (
    "hiendmae_plan -d 901 -plans_name thaw --frozen_epochs 2 --num_iterations_per_epoch 2 "
    "--num_val_iterations_per_epoch 1 --feature_size 4 --drop_path 0.5 -patch_size 16 16 16"
)
# nnUNetv2_train without the validation at the end, which would predict whole volumes in small patches.
TRAIN = """
import sys
import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
go_on = len(sys.argv) > 1
name = "nnUNetTrainerHiEndMAE_scratch"
trainer = get_trainer_from_args("901", "3d_fullres", 0, name, "thaw", go_on, torch.device("cpu"))
maybe_load_checkpoint(trainer, go_on, False)
trainer.run_training()
"""


def train(world: World, *flags: str) -> str:
    words = [sys.executable, "-c", TRAIN, *flags]
    return subprocess.run(
        words, env=world.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=True
    ).stdout


def plan(world: World, epochs: int) -> Path:
    """Plans for a small network; returns the folder of the fold that they train."""
    world.run(f"{PLAN} --epochs {epochs}")
    file = world.root / "preprocessed" / DATASET / "thaw.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["configurations"]["3d_fullres"]["hiendmae"]["architecture"] = ENCODER.to_dict()
    file.write_text(json.dumps(content), encoding="utf-8")
    return world.root / "results" / DATASET / "nnUNetTrainerHiEndMAE_scratch__thaw__3d_fullres" / "fold_0"


def states(fold: Path, name: str) -> tuple[dict[str, torch.Tensor], set[int]]:
    """ViT tensors of a checkpoint, and the optimizer's numbers of the parameters that were ever stepped."""
    checkpoint: dict[str, Any] = torch.load(fold / name, weights_only=False)
    weights = {k: v for k, v in checkpoint["network_weights"].items() if k.startswith("vit.")}
    return weights, {number for number, state in checkpoint["optimizer_state"]["state"].items() if state}


@pytest.mark.slow
def test_frozen_then_continued_and_thawed(world: World) -> None:
    """Two frozen epochs leave every bit of the ViT and no optimizer state of it; ``--c`` into the third trains it."""
    fold = plan(world, 2)
    train(world)
    before, _ = states(fold, "checkpoint_best.pth")  # of the first epoch, or of the second
    after, stepped_after = states(fold, "checkpoint_final.pth")
    assert all(torch.equal(before[name], after[name]) for name in before)
    plan(world, 3)
    shutil.move(fold / "checkpoint_final.pth", fold / "checkpoint_latest.pth")
    log = train(world, "--c")
    assert "Epoch 2" in log and "Epoch 1" not in log
    thawed, stepped_thawed = states(fold, "checkpoint_final.pth")
    assert all(not torch.equal(after[name], thawed[name]) for name in after if name.endswith("weight"))
    assert stepped_thawed > stepped_after
    assert len(stepped_thawed - stepped_after) == len(list(network().vit.parameters()))


def network() -> HiEndMAEUNETR:
    torch.manual_seed(0)
    return HiEndMAEUNETR(ENCODER, input_channels=1, num_classes=2, img_size=(16, 16, 16), feature_size=2)


@pytest.mark.parametrize("decoder_bias", [0.0, 1e3])
def test_the_clip_sees_the_decoder_alone(decoder_bias: float) -> None:
    """However large the encoder's gradients would be, those of the decoder are what they are without an encoder."""
    net = network()
    assert with_frozen_vit(net, True) is net
    with torch.no_grad():
        net.head.seg_layers[0].bias += decoder_bias
    net(torch.rand(1, 1, 16, 16, 16)).square().mean().backward()
    assert all(p.grad is None for p in net.vit.parameters())
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    decoder = [p for name, p in net.named_parameters() if not name.startswith("vit.")]
    assert float(torch.nn.utils.clip_grad_norm_(decoder, math.inf)) == pytest.approx(min(float(norm), 1.0), rel=1e-4)


def one_rank(rank: int, folder: str) -> None:
    """Two frozen steps, two of all, two frozen again, as one of two processes; leaves its weights."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net = with_frozen_vit(network(), True)
    optimizer = torch.optim.AdamW(layer_decay_groups(net.requires_grad_(True), ENCODER, 0.05, 1.0), 1e-2)
    net = DistributedDataParallel(with_frozen_vit(net, True))
    seen = []
    torch.manual_seed(rank)
    for frozen in (True, True, False, False, True, True):
        net = with_frozen_vit(net, frozen)
        optimizer.zero_grad()
        net(torch.rand(1, 1, 16, 16, 16)).square().mean().backward()
        seen.append(sum(p.grad is not None for p in net.module.vit.parameters()))
        optimizer.step()
    torch.save((net.module.state_dict(), seen), os.path.join(folder, f"rank_{rank}.pth"))
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may still hold a tensor; an interpreter that shuts down then aborts


def test_ranks_exchange_what_learns(tmp_path: Path) -> None:
    """Frozen, thawed and frozen again under DDP: no rank waits for a gradient that does not come, all stay equal."""
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    (first, seen), (second, _) = (torch.load(tmp_path / f"rank_{rank}.pth") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    everything = len(list(network().vit.parameters()))
    assert seen == [0, 0, everything, everything, 0, 0]
