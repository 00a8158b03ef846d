"""Rate, warm-up and initialisation follow the sizes; what the user says, and what is published, stays."""

from __future__ import annotations

import json
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import DATASET, World
from processes import start, wait_for

from nnunetv2_hiendmae.architectures.blocks import MLP, Attention
from pretraining import HiEndMAE
from pretraining.config import PRESETS, RunConfig
from pretraining.recipe import choose_recipe, start_small

SMALL = "-preset tiny -device cpu -batch_size 2 -crop_size 16 16 16 -num_workers 0 -val_every 2"


def model_of(preset: str, crop: int | None = None, token: int | None = None):
    p = PRESETS[preset]
    return p.model(
        crop_size=(crop,) * 3 if crop else p.crop_size,
        patch_size=(token,) * 3 if token else p.encoder.patch_size,
        in_channels=1,
        mask_ratio=0.75,
    )


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.is_published])
@pytest.mark.parametrize("batch_size", [192, 768])
def test_published_sizes_train_as_published(preset: str, batch_size: int) -> None:
    recipe = choose_recipe(model_of(preset), preset, batch_size, steps=400_000)
    assert (recipe.base_lr, recipe.warmup_steps, recipe.weight_init) == (1e-4, 4000, "published")


def test_other_sizes_follow_the_width() -> None:
    rates = {}
    for preset in ("nano", "tiny", "small_p12", "base_p16", "large_p12"):
        recipe = choose_recipe(model_of(preset, 48, 4), preset, 8, steps=2000)
        assert recipe.weight_init == "small" and recipe.warmup_steps >= 100
        rates[PRESETS[preset].encoder.embed_dim] = recipe.base_lr
    widths = sorted(rates)
    assert all(rates[a] > rates[b] for a, b in pairwise(widths))


def test_a_short_run_says_that_its_warm_up_is_short() -> None:
    long, short = (choose_recipe(model_of("tiny"), "tiny", 8, steps) for steps in (1000, 50))
    assert short.warmup_steps < long.warmup_steps and len(short.reason) > len(long.reason)


def test_small_start() -> None:
    torch.manual_seed(0)
    model = HiEndMAE(model_of("tiny", 16))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start_small(model)
    factors = {"encoder": (2 * 12) ** -0.5, "decoder": (2 * 5) ** -0.5}
    scaled: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, (Attention, MLP)):
            scaled.add(f"{name}.{'proj' if isinstance(module, Attention) else 'fc2'}.weight")
    assert len(scaled) == 12 * 2 + 2 * 2 + 3 * 3
    for name, value in model.state_dict().items():
        factor = factors[name.split(".")[0]] if name in scaled else 0.1 if name == "decoder.head.weight" else 1
        torch.testing.assert_close(value, before[name] * factor)


def test_user_wins_and_the_choice_is_recorded(world: World) -> None:
    log = world.run(f"hiendmae_pretrain -d 901 {SMALL} -steps 4 -run chosen")
    assert "peak rate 0.0005 after 0 steps of warm-up, small start" in log
    log = world.run(
        f"hiendmae_pretrain -d 901 {SMALL} -steps 4 -run given -lr 2e-3 -warmup_steps 2 -weight_init published"
    )
    assert "peak rate 0.002 after 2 steps of warm-up, published start (as given)" in log
    base = world.root / "results" / DATASET / "HiEndMAE__nnUNetPlans__3d_fullres"
    chosen, given = (json.loads((base / run / "config.json").read_text()) for run in ("chosen", "given"))
    assert chosen["recipe"] and not given["recipe"]
    assert (given["base_lr"], given["warmup_steps"], given["weight_init"]) == (2e-3, 2, "published")


@pytest.mark.slow
def test_a_run_of_an_earlier_version_keeps_its_recipe(world: World) -> None:
    """Its config has a share for the warm-up, and its rate was the preset's."""
    flags = f"hiendmae_pretrain -d 901 {SMALL} -steps 10"
    world.run(f"{flags} -run earlier -lr 1e-3 -warmup_steps 1 -weight_init published")
    folder = world.root / "results" / DATASET / "HiEndMAE__nnUNetPlans__3d_fullres" / "earlier"
    files = [folder / "config.json", folder / "checkpoint_final.pth"]
    old = json.loads(files[0].read_text())
    for name in ("warmup_steps", "weight_init", "recipe"):
        del old[name]
    old["warmup_fraction"] = 0.1
    files[0].write_text(json.dumps(old))
    checkpoint = torch.load(files[1], weights_only=True)
    torch.save({**checkpoint, "config": old}, files[1])
    assert RunConfig.from_dict(old).warmup_steps == 1
    log = world.run(f"{flags} -run earlier --c")
    assert "peak rate 0.001 after 1 steps" in log and "Encoder weights" in log


def test_a_run_keeps_its_precision_on_another_machine(world: World) -> None:
    """Where it was left to the GPU that the run was started on, or was given only then."""
    flags = f"hiendmae_pretrain -d 901 {SMALL} -steps 4 -run moved"
    world.run(f"{flags} -precision bf16")
    assert "1 × cpu, bf16," in world.run(f"{flags} --c")
    log = world.run(f"{flags} --c -precision fp32", ok=False)
    assert "precision" in log and "Repeat the original flags" in log


def weights_in(folder: Path) -> set[str]:
    return {p.name for p in folder.glob("encoder_weights*.pth")}


def test_export_of_an_unfinished_run(world: World) -> None:
    """The encoder of a run that a signal ended is exported on request, named as unfinished, and not taken by itself."""
    flags = f"hiendmae_pretrain -d 901 {SMALL} -steps 100000 -run unfinished"
    process = start(world, flags)
    wait_for(process, "step 4/")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    folder = world.root / "results" / DATASET / "HiEndMAE__nnUNetPlans__3d_fullres" / "unfinished"
    assert not weights_in(folder)
    log = world.run(f"{flags} --export")
    (name,) = weights_in(folder)
    header = torch.load(folder / name, weights_only=True)["header"]
    assert name != "encoder_weights.pth" and name in log
    assert header["steps"] < 100000 and header["unfinished"] == f"step {header['steps']} of 100000"
    log = world.run("hiendmae_pretrain -d 901 -preset tiny -device cpu -run nowhere --export", ok=False)
    assert "has no sound checkpoint" in log
