"""Patches and their order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretraining.masking import num_visible, patchify, random_shuffle, take_tokens, unpatchify


def test_patch_holds_its_voxels_in_order() -> None:
    size, patch = (4, 6, 9), (2, 3, 3)
    x = torch.arange(2 * 2 * 4 * 6 * 9).float().view(2, 2, *size)  # (B, C, H, W, D)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, 2 * 2 * 3, 2 * 3 * 3 * 2)
    # Token (h, w, d) = (1, 0, 2) is number 1·2·3 + 0·3 + 2; inside it the channel is fastest.
    expected = x[1, :, 2:4, 0:3, 6:9].permute(1, 2, 3, 0).reshape(-1)
    assert torch.equal(tokens[1, 8], expected)
    assert torch.equal(unpatchify(tokens, patch, (2, 2, 3)), x)


def test_patchify_refuses_a_remainder() -> None:
    with pytest.raises(ValueError, match=r"\(4, 6, 8\) does not divide into patches of \(2, 3, 3\)"):
        patchify(torch.zeros(1, 1, 4, 6, 8), (2, 3, 3))


def test_visible_count_is_the_published_floor() -> None:
    assert [num_visible(n, r) for n, r in ((512, 0.75), (216, 0.75), (1000, 0.9), (24, 0.6))] == [128, 54, 99, 9]


def test_shuffle_and_take() -> None:
    ids = torch.from_numpy(random_shuffle(np.random.default_rng(3), 11))
    assert sorted(ids.tolist()) == list(range(11))
    tokens = torch.randn(1, 11, 4)
    taken = take_tokens(tokens, torch.stack([ids[:5], ids[5:10]]))
    assert torch.equal(taken[1, 2], tokens[0, ids[7]])
