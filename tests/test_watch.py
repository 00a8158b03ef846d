"""A run that does not learn is reported early and again at the end; one that learns is not."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import DATASET, World

from pretraining import HiEndMAE
from pretraining.config import PRESETS, RunConfig
from pretraining.watch import PATIENCE, RISING, Watch, gradient_norms, vital_signs

MODEL = PRESETS["tiny"].model(crop_size=(16, 16, 16), patch_size=(4, 4, 4), in_channels=1, mask_ratio=0.75)
CONFIG = RunConfig(
    datasets=("Dataset901_X",), plans="p", configuration="c", model=MODEL, steps=5000, batch_size=2, warmup_steps=100
)
SMALL = "-preset tiny -device cpu -batch_size 2 -crop_size 16 16 16 -num_workers 0 -preview_epochs 0"


def values(share: float, spread: float = 0.2) -> dict[str, float]:
    return {"val_loss": share * 0.8, "val_mean_patch_loss": 0.8, "spread_final": spread}


def test_vital_signs_of_a_fresh_and_of_a_collapsed_encoder() -> None:
    torch.manual_seed(0)
    model, crops = HiEndMAE(MODEL), torch.rand(2, 1, 16, 16, 16)
    ids = torch.stack([torch.randperm(64) for _ in range(2)])
    fresh = vital_signs(model, crops, ids)
    taps, final = model.forward_encoder(model.crop_patches(crops), ids)
    assert fresh["spread_final"] == pytest.approx(final.std(1).mean().item(), rel=1e-5)
    assert fresh["rms_tap_6"] == pytest.approx(taps[1].square().mean().sqrt().item(), rel=1e-5)
    assert all(0.5 < fresh[f"entropy_cross_{i}"] <= 1.0001 for i in range(3))
    with torch.no_grad():
        model.encoder.pos_embed.zero_()
        model.encoder.patch_embed.proj.weight.zero_()
        model.encoder.cls_token.copy_(model.encoder.patch_embed.proj.bias)
    collapsed = vital_signs(model, crops, ids)
    assert collapsed["spread_final"] < 1e-5 and collapsed["entropy_cross_0"] == pytest.approx(1, abs=1e-4)


def test_gradient_norms_by_module() -> None:
    torch.manual_seed(0)
    model = HiEndMAE(MODEL)
    model(torch.rand(2, 1, 16, 16, 16)).loss.backward()
    norms = gradient_norms(model, scale=2.0)
    expected = torch.stack([p.grad.norm() for p in model.decoder.parameters()]).norm().item() / 2
    assert set(norms) == {"grad_norm_encoder", "grad_norm_projections", "grad_norm_decoder"}
    assert norms["grad_norm_decoder"] == pytest.approx(expected, rel=1e-5)


def test_sound_runs_are_left_alone() -> None:
    """Slow starts, a fall of the spread that the run climbs out of, and noise at the end."""
    watch = Watch(CONFIG)
    shares = [1.006, 1.0, 0.996, 0.99, 0.97, 0.95, 0.93, 0.92, 0.921, 0.922, 0.919, 0.92, 0.921, 0.922, 0.923]
    for i, share in enumerate(shares):
        assert watch.validation(100 * (i + 1), values(share, 0.02 if i < 5 else 0.5)) == []
    assert not watch.problems


def test_what_is_wrong_is_reported_once() -> None:
    watch = Watch(CONFIG)
    stuck_at = PATIENCE + 100
    told = [watch.validation(step, values(1.0, 0.2 if step < 200 else 0.01)) for step in range(100, 1500, 100)]
    first = next(i for i, lines in enumerate(told) if lines)
    assert 100 * (first + 1) == stuck_at and sum(map(len, told)) == 2
    assert set(watch.problems) == {"stuck", "collapsed"} and all("-warmup_steps" in p for p in watch.problems.values())
    watch = Watch(CONFIG)
    rising = [0.9, *(0.9 + 0.01 * i for i in range(1, RISING + 3))]
    told = [watch.validation(100 * (i + 1), values(share)) for i, share in enumerate(rising)]
    assert list(watch.problems) == ["rising"] and sum(map(len, told)) == 1
    watch = Watch(CONFIG)
    (line,) = watch.validation(100, {"val_loss": 0.0, "val_mean_patch_loss": 0.0, "spread_final": 0.1})
    assert "constant" in line


def test_a_run_that_learned_nothing_says_so_at_its_end(world: World) -> None:
    log = world.run(f"hiendmae_pretrain -d 901 {SMALL} -steps 4 -val_every 2 -run hot")
    assert "WARNING: step 4: the held-out loss is" in log and "WARNING: at the end of the run: step 4" in log
    base = world.root / "results" / DATASET / "HiEndMAE__nnUNetPlans__3d_fullres"
    lines = [json.loads(line) for line in (base / "hot" / "metrics.jsonl").read_text().splitlines()]
    signs = next(line for line in lines if "spread_final" in line)
    assert {"grad_norm_encoder", "rms_tap_3", "spread_tap_9", "entropy_cross_2"} <= set(signs)


@pytest.mark.slow
def test_stop_on_plateau(world: World) -> None:
    """Both ranks leave at the same step, with a checkpoint and exit code 3; the run can be continued."""
    run = (
        f"hiendmae_pretrain -d 901 {SMALL} -steps 5000 -val_every 100 -lr 3e-2 -warmup_steps 1 -run plateau -num_gpus 2"
    )
    log = world.run(f"{run} --stop_on_plateau", ok=False)
    assert "checkpoint written" in log and "--stop_on_plateau: step" in log and "Traceback" not in log
    assert log.count("hiendmae_pretrain: error: --stop_on_plateau") == 1
    base = world.root / "results" / DATASET / "HiEndMAE__nnUNetPlans__3d_fullres" / "plateau"
    assert (base / "checkpoint_latest.pth").is_file() and not (base / "encoder_weights.pth").exists()
