"""Augmentation is right off the cube and replayable."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pretraining.config import ModelConfig
from pretraining.data.augmentation import Augmentation, orient_crops, rotation_plane
from pretraining.data.stream import canonical_crops, stored_crops
from pretraining.model import HiEndMAE


def test_rotation_off_the_cube_gives_the_crop_size() -> None:
    size = (4, 6, 10)
    draw = Augmentation(quarter_turns=1, plane=(1, 2))
    assert draw.size_to_read(size) == (4, 10, 6)
    crop = np.random.default_rng(0).random((2, *draw.size_to_read(size)), np.float32)
    rotated = moved(draw, crop)
    assert rotated.shape == (2, *size)
    # One quarter turn takes the last column to the first row.
    np.testing.assert_array_equal(rotated[:, :, 0, :], crop[:, :, :, -1])


def moved(draw: Augmentation, crop: np.ndarray) -> np.ndarray:
    """Both parts of a draw, the loader's and the device's."""
    crop, exchange = draw.exchange_in_loader(crop)
    flips = torch.tensor([draw.flips_afterwards])
    return orient_crops(torch.from_numpy(crop)[None], torch.tensor([exchange]), flips)[0].numpy()


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int16])
def test_every_draw_moves_like_numpy(dtype: type) -> None:
    crop = np.arange(2 * 4 * 4 * 4).reshape(2, 4, 4, 4).astype(dtype)
    for flips in itertools.product((False, True), repeat=3):
        for turns, plane in itertools.product(range(4), [(0, 1), (0, 2), (1, 2)]):
            flipped = np.flip(crop, [axis + 1 for axis in range(3) if flips[axis]])
            expected = np.rot90(flipped, turns, (plane[0] + 1, plane[1] + 1))
            draw = Augmentation(flips=flips, quarter_turns=turns, plane=plane)
            np.testing.assert_array_equal(moved(draw, crop), expected)


def test_a_batch_is_flipped_crop_by_crop() -> None:
    flips = torch.tensor(list(itertools.product((False, True), repeat=3)))
    image = torch.arange(8 * 24).reshape(8, 1, 2, 3, 4)
    oriented = orient_crops(image, torch.zeros(8, dtype=torch.int64), flips)
    for one, flip, result in zip(image, flips, oriented, strict=True):
        assert torch.equal(result, one.flip([axis + 1 for axis in range(3) if flip[axis]]))
    assert torch.equal(image.flatten(), torch.arange(8 * 24))


def test_intensities_change_after_the_window_is_clipped() -> None:
    batch = {
        "image": torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(1, 1, 1, 1, 3),
        "intensity": torch.tensor([[[2 / 255, -0.5]]]),
        "exchange": torch.zeros(1, dtype=torch.int64),
        "flips": torch.zeros(1, 3, dtype=torch.bool),
        "jitter": torch.tensor([[1.1, -0.05]]),
    }
    before = batch["image"].clone()
    seen = canonical_crops(batch, torch.device("cpu")).flatten().tolist()
    assert seen == pytest.approx([-0.05, (256 / 255 - 0.5) * 1.1 - 0.05, 1.05], abs=1e-6)
    stored = {**batch, "image": before.float()}
    assert canonical_crops(stored, torch.device("cpu")).flatten().tolist() == pytest.approx(seen)
    assert torch.equal(stored["image"], before.float())


def test_draws_have_the_published_frequencies_and_replay() -> None:
    draws = [Augmentation.draw(np.random.default_rng((1, i)), (1, 2)) for i in range(4000)]
    assert draws[7] == Augmentation.draw(np.random.default_rng((1, 7)), (1, 2))
    share = lambda values: sum(values) / len(draws)  # noqa: E731
    assert abs(share(d.flips[2] for d in draws) - 0.5) < 0.03
    assert abs(share(d.quarter_turns > 0 for d in draws) - 0.3) < 0.03
    assert abs(share(d.scale != 1 for d in draws) - 0.1) < 0.02
    assert abs(share(d.shift != 0 for d in draws) - 0.1) < 0.02
    assert all(abs(d.scale - 1) <= 0.1 and abs(d.shift) <= 0.1 and d.quarter_turns in range(4) for d in draws)


def test_rotation_plane_has_equal_spacing() -> None:
    assert rotation_plane((3.0, 0.8, 0.8)) == (1, 2)
    assert rotation_plane((4.08, 2.5, 4.08)) == (0, 2)
    assert rotation_plane((1.5, 1.5, 1.5)) == (1, 2)


@pytest.mark.parametrize("channels", [1, 2])
def test_voxels_as_stored_give_the_same_loss(channels: int) -> None:
    """The step takes patches of 8 bits and converts what it took: the same numbers as from canonical crops."""
    config = ModelConfig(
        img_size=(8, 8, 8), patch_size=(4, 4, 2), in_channels=channels, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2,
        taps=(0,), mask_ratio=0.5, decoder_embed_dim=12, decoder_num_heads=2, decoder_self_depth=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = HiEndMAE(config)
    batch = {
        "image": torch.randint(0, 256, (3, channels, 8, 8, 8), dtype=torch.uint8),
        "intensity": torch.rand(3, channels, 2) / 100,
        "exchange": torch.tensor([0, 3, 1]),
        "flips": torch.rand(3, 3) < 0.5,
        "jitter": torch.rand(3, 2),
    }
    ids = torch.rand(3, config.num_tokens).argsort(1)
    image, intensity = stored_crops(batch, torch.device("cpu"))
    assert image.dtype == torch.uint8
    crops = canonical_crops(batch, torch.device("cpu"))
    assert torch.equal(model(image, ids, intensity=intensity).loss, model(crops, ids).loss)
    assert torch.equal(model.mean_patch_loss(image, ids, intensity), model.mean_patch_loss(crops, ids))
