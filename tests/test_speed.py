"""``hiendmae_benchmark_speed`` measures what it says; no figure is asserted, machines differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import World


def test_figures_are_complete_and_consistent(world: World, tmp_path: Path) -> None:
    world.run(f"hiendmae_pack -d 901 -o {tmp_path / 'packed'}")
    log = world.run(
        f"hiendmae_benchmark_speed -d 901 -compare_packed {tmp_path / 'packed'} -preset tiny -device cpu "
        f"-crop_size 24 24 24 -batch_size 2 -seconds 0.5 -json {tmp_path / 'speed.json'}"
    )
    figures = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert set(figures["data"]) == {"nnU-Net .b2nd read", ".b2nd", "packed 8 bits"}
    assert set(figures["together"]) == set(figures["constant_patches"]) == {".b2nd", "packed 8 bits"}
    step = figures["step"]
    assert (
        step["gflop_per_s"] == pytest.approx(step["crops_per_s"] * step["gflop_per_crop"]) and step["crops_per_s"] > 0
    )
    assert 0 < step["states_gib"] < step["memory_gib"]
    assert all(0 <= share < 1 for share in figures["constant_patches"].values())
    for rate in figures["data"].values():
        assert f" {rate:.1f} " in log
    for rate in (step["crops_per_s"], *figures["together"].values()):
        assert f" {rate:.2f} crops/s" in log
    assert "limited by the step" in log and "% of the measured GEMM peak" in log


def test_flops_are_those_of_the_formula() -> None:
    """Encoder on 1 + V tokens, decoder on 1 + L: twice the multiply-adds, three times for forward and backward."""
    from pretraining.config import PRESETS, RunConfig
    from pretraining.speed import flops_per_crop

    preset = PRESETS["tiny"]
    model = preset.model(crop_size=(32, 32, 32), patch_size=(8, 8, 8), in_channels=1, mask_ratio=0.75)
    config = RunConfig(datasets=("X",), plans="p", configuration="c", model=model, steps=1, batch_size=1)
    tokens, visible, masked, width, decoder = 65, 17, 48, 192, 96
    block = lambda n, d: 12 * n * d * d + 2 * n * n * d  # noqa: E731 - qkv, projection, MLP; attention
    cross = lambda n, d: block(n, d) + 2 * n * d * d + 2 * visible * d * d + 2 * n * visible * d  # noqa: E731
    last = block(masked, decoder) + 2 * masked * decoder**2 + 2 * visible * decoder**2 + 2 * masked * visible * decoder
    last += 2 * (tokens - masked) * decoder**2 + 2 * masked * (tokens - masked) * decoder  # keys of all tokens
    expected = 12 * block(visible, width) + 2 * block(tokens, decoder) + 2 * cross(tokens, decoder) + last
    expected += 16 * 512 * width + 4 * visible * width * decoder + masked * decoder * 512
    # The patches need no gradient: the embedding's backward pass is one product instead of two.
    expected = 3 * expected - 16 * 512 * width
    assert abs(flops_per_crop(config) / (2 * expected) - 1) < 0.01
