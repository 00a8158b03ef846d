"""``hiendmae_benchmark_speed`` measures what it says; no figure is asserted, machines differ."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import World
from processes import start


@pytest.mark.slow
def test_figures_are_complete_and_consistent(world: World, tmp_path: Path) -> None:
    world.run(f"hiendmae_pack -d 901 -o {tmp_path / 'packed'}")
    log = world.run(
        f"hiendmae_benchmark_speed -d 901 -compare_packed {tmp_path / 'packed'} -preset tiny -device cpu "
        f"-crop_size 24 24 24 -batch_size 2 -seconds 0.5 -json {tmp_path / 'speed.json'}"
    )
    figures = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    for what in ("loading", "constant_patches", "training"):
        assert set(figures[what]) == {".b2nd", "packed 8 bits"}
    step = figures["step"]
    assert (
        step["gflop_per_s"] == pytest.approx(step["crops_per_s"] * step["gflop_per_crop"]) and step["crops_per_s"] > 0
    )
    assert all(0 <= share < 1 for share in figures["constant_patches"].values())
    for rate in (*figures["loading"].values(), figures["nnunet_read"]):
        assert f" {rate:.1f} crops/s" in log
    for found in figures["training"].values():
        assert 0 <= found["data_wait"] < 1 and 0 < found["checkpoint_gib"] < found["memory_gib"]
        assert f" {found['crops_per_s']:.2f} crops/s" in log and "limited by the step" in log


def test_a_damaged_shard_ends_the_command(world: World, tmp_path: Path) -> None:
    """At once, though the error still holds the loader and its process."""
    world.run(f"hiendmae_pack -d 901 -o {tmp_path / 'packed'}")
    os.truncate(tmp_path / "packed" / "shard_00000.voxels", 1000)
    command = f"hiendmae_benchmark_speed -packed {tmp_path / 'packed'} -preset pico -device cpu -batch_size 2"
    process = start(world, f"{command} -num_workers 1 -seconds 0.5")
    log, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "shard_00000.voxels is cut off" in log and len(log.splitlines()) == 1, log


@pytest.mark.slow
def test_estimate_writes_nothing(world: World) -> None:
    """Two ranks leave at the same step, and one reports; the run's folder is not made."""
    log = world.run(
        "hiendmae_pretrain -d 901 -preset nano -device cpu -crop_size 16 16 16 -steps 1000 -batch_size 4 -num_gpus 2 "
        "-num_workers 1 -run estimated --estimate"
    )
    assert log.count("1000 steps of 4 take") == 1 and "waiting for data" in log and "checkpoints: 3 × 0.0" in log
    assert not list((world.root / "results").rglob("estimated"))


def test_flops_are_those_of_the_formula() -> None:
    """Encoder on 1 + V tokens, decoder on 1 + L: twice the multiply-adds, three times for forward and backward."""
    from pretraining.config import PRESETS
    from pretraining.flops import flops_per_crop

    preset = PRESETS["tiny"]
    model = preset.model(crop_size=(32, 32, 32), patch_size=(8, 8, 8), in_channels=1, mask_ratio=0.75)
    tokens, visible, masked, width, decoder = 65, 17, 48, 192, 96
    block = lambda n, d: 12 * n * d * d + 2 * n * n * d  # noqa: E731 - qkv, projection, MLP; attention
    cross = lambda n, d: block(n, d) + 2 * n * d * d + 2 * visible * d * d + 2 * n * visible * d  # noqa: E731
    last = block(masked, decoder) + 2 * masked * decoder**2 + 2 * visible * decoder**2 + 2 * masked * visible * decoder
    last += 2 * (tokens - masked) * decoder**2 + 2 * masked * (tokens - masked) * decoder  # keys of all tokens
    expected = 12 * block(visible, width) + 2 * block(tokens, decoder) + 2 * cross(tokens, decoder) + last
    expected += 16 * 512 * width + 4 * visible * width * decoder + masked * decoder * 512
    # The patches need no gradient: the embedding's backward pass is one product instead of two.
    expected = 3 * expected - 16 * 512 * width
    assert abs(flops_per_crop(model) / (2 * expected) - 1) < 0.01
