"""Any shapes, spacings, channels and windows: what must hold whatever the numbers are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization

from nnunetv2_hiendmae.architectures import HiEndMAEUNETR, ViTConfig
from nnunetv2_hiendmae.architectures.pos_embed import interpolate_pos_embed, sincos_pos_embed
from nnunetv2_hiendmae.crops import read_padded
from nnunetv2_hiendmae.intensity import CanonicalIntensity, channel_intensity
from nnunetv2_hiendmae.nnunet.normalization import HUWindowNormalization
from nnunetv2_hiendmae.nnunet.plans import MAX_FEATURES, with_patch_size
from pretraining.config import ModelConfig
from pretraining.data.corpus import choose_start, find_body_cells
from pretraining.data.packed import dequantisation, quantise
from pretraining.masking import num_visible, patchify, random_shuffle, take_tokens, unpatchify
from pretraining.model import HiEndMAE

settings.register_profile(
    "here", max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("here")

edges = st.tuples(*[st.integers(1, 5)] * 3)
shapes = st.tuples(*[st.integers(1, 40)] * 3)
seeds = st.integers(0, 2**32 - 1)
hu = st.floats(-32768, 32767, allow_nan=False, width=32)


def window() -> st.SearchStrategy[tuple[float, float]]:
    """At least 1 HU wide."""
    return st.tuples(st.floats(-1500, 1500), st.floats(1, 3000)).map(lambda w: (w[0], w[0] + w[1]))


@given(batch=st.integers(1, 3), channels=st.integers(1, 3), patch=edges, grid=edges)
def test_patches_and_back(batch: int, channels: int, patch, grid) -> None:
    size = [g * p for g, p in zip(grid, patch, strict=True)]
    x = torch.arange(batch * channels * int(np.prod(size))).view(batch, channels, *size)
    tokens = patchify(x, patch)
    assert tokens.shape == (batch, int(np.prod(grid)), int(np.prod(patch)) * channels)
    assert torch.equal(unpatchify(tokens, patch, grid), x)
    # Token (i, j, k) is the block that starts at (i, j, k) · patch, whatever the order within it.
    i, j, k = (g - 1 for g in grid)
    h, w, d = (n * p for n, p in zip((i, j, k), patch, strict=True))
    block = x[0, :, h : h + patch[0], w : w + patch[1], d : d + patch[2]]
    assert sorted(tokens[0, (i * grid[1] + j) * grid[2] + k].tolist()) == sorted(block.flatten().tolist())


@given(size=shapes, patch=edges)
def test_a_volume_that_does_not_divide_is_refused(size, patch) -> None:
    assume(any(s % p for s, p in zip(size, patch, strict=True)))
    with pytest.raises(ValueError, match="does not divide"):
        patchify(torch.zeros(1, 1, *size), patch)


@given(tokens=st.integers(1, 300), ratio=st.floats(0, 0.99), seed=seeds)
def test_every_token_is_visible_or_masked(tokens: int, ratio: float, seed: int) -> None:
    order = random_shuffle(np.random.default_rng(seed), tokens)
    visible = num_visible(tokens, ratio)
    assert 0 <= visible <= tokens and abs(visible - tokens * (1 - ratio)) < 1
    assert sorted(order.tolist()) == list(range(tokens))
    values = torch.arange(tokens, dtype=torch.float32).view(1, tokens, 1)
    ids = torch.from_numpy(order)[None]
    parts = [take_tokens(values, ids[:, :visible]), take_tokens(values, ids[:, visible:])]
    assert torch.equal(torch.cat(parts, 1).flatten().sort().values, values.flatten())


@given(grid=edges, patch=edges, scale=st.floats(0.1, 100), shift=st.floats(-5, 5), seed=seeds)
def test_target_does_not_see_a_patchs_brightness_or_contrast(
    grid, patch, scale: float, shift: float, seed: int
) -> None:
    """Each masked patch is normalised by itself: mean 0 and, where it is not constant, variance 1."""
    tokens, voxels = int(np.prod(grid)), int(np.prod(patch))
    assume(tokens >= 4 and voxels >= 2)
    size = tuple(g * p for g, p in zip(grid, patch, strict=True))
    config = ModelConfig(
        img_size=size, patch_size=patch, in_channels=1, embed_dim=12, depth=1, num_heads=2, mlp_ratio=1, taps=(0,),
        mask_ratio=0.75, decoder_embed_dim=12, decoder_num_heads=2, decoder_self_depth=0,
    )  # fmt: skip
    model = HiEndMAE(config)
    rng = np.random.default_rng(seed)
    patches = torch.from_numpy(rng.normal(0, 10, (1, tokens, voxels)))
    assume(patches.var(-1).min() > 1)  # else the 1e-6 that guards the variance shows
    ids = torch.from_numpy(random_shuffle(rng, tokens))[None]
    target = model.target(patches, ids)
    assert target.shape == (1, model.config.num_masked, voxels)
    torch.testing.assert_close(target, model.target(patches * scale + shift, ids), rtol=0, atol=1e-3)
    torch.testing.assert_close(target.mean(-1), torch.zeros(1, len(target[0])), rtol=0, atol=1e-4)
    torch.testing.assert_close(target.var(-1, correction=0), torch.ones(1, len(target[0])), rtol=0, atol=1e-3)
    assert not model.target(torch.full_like(patches, shift), ids).any()


@given(dim=st.integers(1, 8).map(lambda n: 6 * n), grid=edges)
def test_position_embedding_of_any_grid(dim: int, grid) -> None:
    table = sincos_pos_embed(dim, grid)
    assert table.shape == (int(np.prod(grid)), dim) and table.abs().max() <= 1
    assert len(torch.unique(table, dim=0)) == len(table)
    # A larger grid starts with the same places: crops of other sizes mean the same by them.
    larger = sincos_pos_embed(dim, tuple(g + 2 for g in grid)).view(*(g + 2 for g in grid), dim)
    torch.testing.assert_close(larger[: grid[0], : grid[1], : grid[2]].reshape(-1, dim), table)


@given(old=edges, new=edges, seed=seeds)
def test_interpolated_positions_stay_between_their_neighbours(old, new, seed) -> None:
    table = torch.randn(1, int(np.prod(old)), 6, generator=torch.Generator().manual_seed(seed))
    resampled = interpolate_pos_embed(table, old, new)
    assert resampled.shape == (1, int(np.prod(new)), 6)
    assert (resampled <= table.amax(1) + 1e-5).all() and (resampled >= table.amin(1) - 1e-5).all()
    assert torch.equal(interpolate_pos_embed(table, old, old), table)


@given(
    values=st.lists(hu, min_size=8, max_size=8),
    mean=st.floats(-500, 500),
    std=st.floats(1, 600),
    clip=window(),
    target=window(),
    ours=st.booleans(),
)
def test_every_plan_leads_to_the_same_canonical_values(values, mean, std, clip, target, ours) -> None:
    """Through nnU-Net's normalisation and our layer: what the plan's clip left, in the window's units."""
    low, high = clip
    properties = {"mean": mean, "std": std, "percentile_00_5": low, "percentile_99_5": high}
    properties |= {"window_lower": low, "window_upper": high, "min": -1024.0, "max": 3071.0, "median": 40.0}
    scheme, cls = ("HUWindowNormalization", HUWindowNormalization) if ours else ("CTNormalization", CTNormalization)
    image = np.array(values, np.float32).reshape(2, 2, 2)
    stored = cls(use_mask_for_norm=False, intensityproperties=properties).run(image.copy())
    channel = channel_intensity(scheme, properties, target)
    found = CanonicalIntensity([channel])(torch.from_numpy(stored)[None, None])[0, 0].numpy()
    seen = np.clip(image.astype(np.float64), low, high)
    expected = (np.clip(seen, *target) - target[0]) / (target[1] - target[0])
    # float32 of nnU-Net's values, in units of the window
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * (1 + (4000 + std) / (target[1] - target[0])))
    assert channel.cuts(target) == (low > target[0] or high < target[1])


@dataclass
class OneCase:
    """A corpus of one volume of numbered voxels."""

    volume: np.ndarray
    cells: np.ndarray

    def shape(self, case: int):
        return self.volume.shape[1:]

    def body_cells(self, case: int) -> np.ndarray:
        return self.cells


@given(shape=shapes, size=shapes, channels=st.integers(1, 2), tissue=st.floats(0, 1), seed=seeds)
def test_crops_of_any_volume(shape, size, channels: int, tissue: float, seed: int) -> None:
    """A crop lies inside the volume, or the volume inside the crop; every voxel keeps its place, the rest is air."""
    rng = np.random.default_rng(seed)
    volume = 1 + np.arange(channels * int(np.prod(shape)), dtype=np.float32).reshape(channels, *shape)
    cells = find_body_cells((rng.random((channels, *shape)) > 0.3).astype(np.float32), np.zeros(channels))
    start = choose_start(OneCase(volume, cells), rng, 0, size, tissue)  # type: ignore[arg-type]
    for s, n, edge in zip(start, size, shape, strict=True):
        assert (0 <= s <= edge - n) if edge >= n else (edge - n <= s <= 0)
    crop = read_padded(volume, start, size, np.full(channels, -7.0, np.float32))
    assert crop.shape == (channels, *size)
    inside = [(max(s, 0), min(s + n, e)) for s, n, e in zip(start, size, shape, strict=True)]
    assert (crop != -7).sum() == channels * np.prod([b - a for a, b in inside])
    first = tuple(a - s for (a, _), s in zip(inside, start, strict=True))
    assert (crop[(slice(None), *first)] == volume[(slice(None), *(a for a, _ in inside))]).all()


@given(size=st.tuples(*[st.integers(1, 14)] * 3), patch=st.tuples(*[st.integers(2, 6)] * 3), channels=st.integers(1, 2))
@settings(max_examples=25)
def test_images_of_any_size_are_segmented(size, patch, channels: int) -> None:
    """Padded at the far ends to whole patches, cut back to their size."""
    config = ViTConfig(patch_size=patch, embed_dim=12, depth=2, num_heads=2, taps=(0,))
    network = HiEndMAEUNETR(config, input_channels=channels, num_classes=3, img_size=(12, 12, 12), feature_size=2)
    x = 1 + torch.rand(1, channels, *size)
    padded, grid = network.pad_to_patches(x)
    assert padded.shape[2:] == tuple(g * p for g, p in zip(grid, patch, strict=True))
    assert all(0 <= a - b < p for a, b, p in zip(padded.shape[2:], size, patch, strict=True))
    assert (
        torch.equal(padded[:, :, : size[0], : size[1], : size[2]], x)
        and (padded == 0).sum() + x.numel() == padded.numel()
    )
    if np.prod(size) > 1:  # nnU-Net's instance normalisation needs two voxels
        with torch.no_grad():
            assert network(x).shape == (1, 3, *size)


@given(values=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50), bits=st.sampled_from([8, 16]))
def test_packing_loses_half_a_step_at_most(values, bits: int) -> None:
    scale, shift = dequantisation(bits)
    back = quantise(np.array(values, np.float32), bits).astype(np.float64) * scale + shift
    assert np.abs(back - values).max() <= 0.5 / (2**bits - 1) + 1e-6


@given(
    spacing=st.tuples(*[st.floats(0.3, 8)] * 3),
    patch=st.tuples(*[st.integers(8, 160)] * 3),
    median=st.tuples(*[st.integers(8, 400)] * 3),
    residual=st.booleans(),
)
def test_planned_patches_can_be_halved(spacing, patch, median, residual: bool) -> None:
    """Either the plan's U-Net fits the patch, or the size that the refusal names is one that it fits."""
    blocks = {"n_blocks_per_stage": [1, 3, 4]} if residual else {"n_conv_per_stage": [2, 2, 2]}
    arguments = {"features_per_stage": [32, 64, 128], "n_conv_per_stage_decoder": [2, 2], **blocks}
    plan = {
        "spacing": list(spacing),
        "patch_size": [1, 1, 1],
        "median_image_size_in_voxels": list(median),
        "architecture": {"arch_kwargs": arguments},
    }
    try:
        changed = with_patch_size(plan, patch)
    except ValueError as error:
        patch = tuple(int(word) for word in str(error).rpartition("[")[2].rstrip("].").split(","))
        changed = with_patch_size(plan, patch)
    assert changed["patch_size"] == list(patch)
    share = np.prod(median) / np.prod(patch)  # nnU-Net's search overshoots by up to 1.03³
    assert share > 7.3 if changed["batch_dice"] else share < 8
    network = changed["architecture"]["arch_kwargs"]
    halved = np.prod(network["strides"], axis=0)
    assert all(p % h == 0 and p // h >= 4 for p, h in zip(patch, halved, strict=True))
    lengths = {len(network[name]) for name in ("strides", "kernel_sizes", "features_per_stage", *blocks)}
    assert lengths == {network["n_stages"]} and len(network["n_conv_per_stage_decoder"]) == network["n_stages"] - 1
    assert max(network["features_per_stage"]) <= MAX_FEATURES
