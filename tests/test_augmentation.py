"""Augmentation is right off the cube and replayable."""

from __future__ import annotations

import numpy as np

from pretraining.augmentation import Augmentation, rotation_plane


def test_rotation_off_the_cube_gives_the_crop_size() -> None:
    size = (4, 6, 10)
    draw = Augmentation(quarter_turns=1, plane=(1, 2))
    assert draw.size_to_read(size) == (4, 10, 6)
    crop = np.random.default_rng(0).random((2, *draw.size_to_read(size)), np.float32)
    rotated = draw.apply(crop)
    assert rotated.shape == (2, *size)
    # One quarter turn takes the last column to the first row.
    np.testing.assert_array_equal(rotated[:, :, 0, :], crop[:, :, :, -1])


def test_flips_and_intensities() -> None:
    crop = np.random.default_rng(0).random((1, 3, 4, 5), np.float32)
    changed = Augmentation(flips=(True, False, True), scale=1.1, shift=-0.05).apply(crop)
    np.testing.assert_allclose(changed, crop[:, ::-1, :, ::-1] * 1.1 - 0.05, rtol=1e-6)


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
