"""``hiendmae_pretrain`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import DATASET, World

from nnunetv2_hiendmae.weights.file import load_weights
from pretraining.commands.pretrain import parser
from pretraining.config import ModelConfig, RunConfig, Runtime
from pretraining.masking import patchify
from pretraining.model import HiEndMAE
from pretraining.preview import reconstruct

SMALL = "-preset tiny -device cpu -batch_size 2 -val_every 2 -crop_size 24 32 40 -num_workers 1"


def folder(world: World, run: str) -> Path:
    return world.root / "results" / DATASET / "HiEndMAE__nnUNetPlans__3d_fullres" / run


def tensors(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["network_weights"]


def test_run_folder_has_everything(pretrained: Path) -> None:
    names = {p.name for p in pretrained.parent.iterdir()}
    assert sum(name.startswith("events.out.tfevents") for name in names) == 1
    names = {name for name in names if not name.startswith("events.")}
    assert names == {
        "config.json", "metrics.jsonl", "progress.png", "checkpoint_final.pth", "encoder_weights.pth", "previews",
        ".lock", "cases.json",
    }  # fmt: skip
    assert (pretrained.parent / "previews" / "step_00000006.png").stat().st_size > 10_000
    entries = [
        json.loads(line) for line in (pretrained.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert entries[-1]["step"] == 6 and 0 < entries[-1]["val_mean_patch_loss"] <= 1
    weights = load_weights(pretrained)
    assert weights.header["datasets"] == [{"name": DATASET, "cases": 6}]
    assert weights.header["spacing"] == {DATASET: [8.0, 6.0, 6.0]}
    saved = tensors(pretrained.parent / "checkpoint_final.pth")
    assert all(torch.equal(saved[f"encoder.{k}"], v) for k, v in weights.encoder.items())


def test_refusals(world: World, pretrained: Path) -> None:
    log = world.run(f"hiendmae_pretrain -d 901 {SMALL} -steps 6", ok=False)
    assert "holds a run already. Continue it with --c" in log
    log = world.run(f"hiendmae_pretrain -d 901 {SMALL} -steps 6 -lr 0.5 --c", ok=False)
    assert "base_lr: 0.0005 → 0.5" in log
    log = world.run(f"hiendmae_pretrain -d 901 {SMALL} -steps 6 -run new --c", ok=False)
    assert "has no checkpoint to continue from" in log
    assert not folder(world, "new").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-d 901 -crop_size 20 32 40", "-crop_size (20, 32, 40) must be a multiple of -vit_patch_size (8, 8, 8)"),
        ("-d 901 -batch_size 0", "-batch_size 0"),
        ("-d 901 -steps -3", "-steps -3 must be an integer of at least 1"),
        ("-d 901 -mask_ratio 1", "-mask_ratio 1.0 leaves 0 of"),
        ("-d 901 -steps 5 -epochs 2", "not allowed with argument"),
        ("-d 901 -window_hu 250 -175", "-window_hu (250.0, -175.0) is empty"),
        ("-d 444", "-d 444"),
        ("-d 901 -p NoPlans", "NoPlans.json does not exist"),
        ("-d 901 -c 3d_lowres", "has no configuration '3d_lowres' (-c); it has"),
        ("-d 901 -c 2d", "is not 3D"),
        ("-d 901 -device cuda", "torch finds no CUDA device"),
        ("-d 901 -preset gigantic", "invalid choice: 'gigantic'"),
    ],
)
def test_mistakes_get_one_line(world: World, flags: str, message: str) -> None:
    device = "" if "-device" in flags else "-device cpu"
    preset = "" if "-preset" in flags else "-preset tiny"
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    log = world.run(f"hiendmae_pretrain {flags} {device} {preset} -run refused", ok=False)
    assert message in log and "Traceback" not in log
    assert not folder(world, "refused").exists()


@pytest.mark.parametrize("variable", ["nnUNet_preprocessed", "nnUNet_results"])
def test_unset_folder_is_named(world: World, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable, raising=False)
    env = {k: v for k, v in world.env.items() if k != variable}
    words = [str(Path(sys.executable).with_name("hiendmae_pretrain")), *f"-d 901 {SMALL}".split()]
    done = subprocess.run(words, env=env, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"The environment variable {variable} is not set" in done.stderr


def test_flags_cover_config_and_runtime() -> None:
    flags = {action.dest for action in parser()._actions}
    names = {
        "datasets": "d", "plans": "p", "configuration": "c",
        "augment": "no_augmentation", "packed_bits": "packed",
    }  # fmt: skip
    python_only = {"model", "body_fraction", "recipe", "weight_decay", "decay_all"}
    settings = {f.name for config in (RunConfig, Runtime) for f in fields(config)} - python_only
    assert {names.get(name, name) for name in settings} <= flags


def test_reconstruction_pastes_and_denormalises() -> None:
    """With the target itself as prediction, the original comes back, without seams."""
    config = ModelConfig(
        img_size=(16, 24, 8), patch_size=(8, 8, 4), in_channels=1, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2,
        taps=(0,), mask_ratio=0.5, decoder_embed_dim=12, decoder_num_heads=2, decoder_self_depth=1,
    )  # fmt: skip
    model = HiEndMAE(config)
    x = torch.rand(2, 1, *config.img_size)
    ids = torch.stack([torch.randperm(config.num_tokens) for _ in range(2)])
    seen, rebuilt = reconstruct(model, x, ids)
    visible = ~seen.isnan()
    assert visible.float().mean() == 0.5 and torch.equal(rebuilt[visible], x[visible])
    masked = model.target(patchify(x, config.patch_size), ids)
    every = torch.cat([torch.zeros(2, config.num_visible + 1, config.patch_dim), masked], dim=1)
    model.forward_decoder = lambda *_, **__: every  # type: ignore[method-assign, assignment]
    torch.testing.assert_close(reconstruct(model, x, ids)[1], x, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_compiled_it_trains_the_same(world: World) -> None:
    """And where torch cannot compile, the error names the flag."""
    small = "hiendmae_pretrain -d 901 -preset pico -device cpu -batch_size 2 -crop_size 16 16 16 -num_workers 0"
    losses = []
    for run, flag in (("eager", ""), ("compiled", "--compile")):
        world.run(f"{small} -steps 4 -log_every 1 -run {run} {flag}")
        lines = (folder(world, run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([entry["loss"] for entry in map(json.loads, lines) if "loss" in entry])
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    no_compiler = {"CXX": "/nonexistent", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    log = world.run(f"{small} -steps 4 -run without --compile", ok=False, **no_compiler)
    assert "error: --compile: torch cannot compile" in log
