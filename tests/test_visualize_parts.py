"""What the pictures are made of, on arrays and layers of our own making."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunetv2_hiendmae.architectures import PrimusConfig
from nnunetv2_hiendmae.architectures.blocks import CrossAttention, SelfAttention
from nnunetv2_hiendmae.crops import crop_around
from pretraining.visualize.attention import (
    AttentionCalls,
    attention_weights,
    orders_hiding,
)
from pretraining.visualize.cases import Frame, read_ct
from pretraining.visualize.features import principal_colours, without_place
from pretraining.visualize.tiles import paste, tile_starts
from pretraining.visualize.views import PLANES, Orientation

OBLIQUE = ((1, 0, 0, 0, 1, 0, 0, 0, 1), (-1, 0, 0, 0, 1, 0, 0, 0, -1), (0, 0, 1, 1, 0, 0, 0, -1, 0))
"""Directions: as most scanners write, flipped, and sagittal slices."""


@pytest.mark.parametrize("direction", OBLIQUE)
def test_voxels_keep_their_place_in_the_patient(direction: tuple[float, ...], tmp_path: Path) -> None:
    """HU that are the place in mm, so that every resampled voxel says where it is."""
    image = sitk.Image(50, 44, 30, sitk.sitkFloat32)
    Frame(origin=(-40.0, 12.0, 7.0), spacing=(2.0, 2.5, 4.0), direction=direction).place(image)
    geometry = image.GetSize(), image.GetOrigin(), image.GetSpacing(), image.GetDirection()
    everywhere = sitk.GetArrayFromImage(sitk.PhysicalPointSource(sitk.sitkVectorFloat32, *geometry))
    for axis in range(3):
        places = 3 * everywhere[..., axis] + 100  # the range of a CT
        ramp = sitk.GetImageFromArray(places)
        ramp.CopyInformation(image)
        sitk.WriteImage(ramp, str(tmp_path / "ramp.nii.gz"))
        case = read_ct(tmp_path / "ramp.nii.gz", (3.0, 3.0, 3.0), (-1500.0, 1500.0))
        found = case.hu(case.volume)
        for index in ((10, 12, 9), (25, 20, 30), (17, 30, 15)):
            point = case.frame.to_patient(tuple(float(i) for i in index[::-1]))
            assert (found[index] - 100) / 3 == pytest.approx(point[axis], abs=0.05)
            assert case.voxel(case.original_voxel(index)) == pytest.approx(index, abs=1)


def test_transposed_frame_describes_the_transposed_array() -> None:
    frame = Frame(origin=(1.0, 2.0, 3.0), spacing=(0.5, 0.7, 4.0), direction=(0, 0, 1, 1, 0, 0, 0, -1, 0))
    axes = [2, 0, 1]  # array (x, z, y)
    z, y, x = 5.0, 6.0, 7.0
    assert frame.transposed(axes).to_patient((y, z, x)) == pytest.approx(frame.to_patient((x, y, z)))


@pytest.mark.parametrize("direction", OBLIQUE)
def test_planes_are_those_of_the_patient(direction: tuple[float, ...]) -> None:
    array = np.random.default_rng(0).random((7, 8, 9)).astype(np.float32)
    frame = Frame(origin=(0.0, 0.0, 0.0), spacing=(1.0, 2.0, 3.0), direction=direction)
    turned = sitk.DICOMOrient(frame.place(sitk.GetImageFromArray(array)), "LPS")
    orientation, expected = Orientation.of(frame), sitk.GetArrayFromImage(turned)
    assert np.array_equal(orientation.slices(array, "axial"), expected)
    assert np.array_equal(orientation.slices(array, "coronal")[3], expected[::-1, 3])
    assert np.array_equal(orientation.slices(array, "sagittal")[4], expected[::-1, :, 4])
    assert orientation.spacing == turned.GetSpacing()[::-1]
    for plane in PLANES:
        index = orientation.find((2, 5, 1), array.shape, plane)
        assert orientation.slices(array, plane)[index] == array[2, 5, 1]


def test_tiles_cover_a_volume_once() -> None:
    shape, size = (50, 24, 90), (24, 32, 40)
    count = np.zeros(shape, int)
    for start in tile_starts(shape, size):
        before = count.copy()
        paste(count, np.ones(size, int), start)
        assert not (before & (count != before)).any()
    assert (count == 1).all()


def of_a_primus() -> torch.nn.Module:
    config = PrimusConfig(patch_size=(4, 4, 4), embed_dim=24, depth=1, num_heads=4, taps=(0,), num_register_tokens=2)
    return config.build((1, 5, 1)).blocks[0].attn


@pytest.mark.parametrize("kind", ["self", "cross", "primus"])
def test_weights_are_those_that_the_block_used(kind: str) -> None:
    torch.manual_seed(0)
    x, memory = torch.randn(2, 7, 24), torch.randn(2, 5, 24)
    attention: Any = (
        {"self": SelfAttention, "cross": CrossAttention}[kind](24, 4) if kind != "primus" else of_a_primus()
    )
    angles = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).repeat_interleave(2, 1)
    rope = torch.cat([angles.sin(), angles.cos()], 1)  # the first two tokens have no place
    with torch.no_grad(), AttentionCalls() as calls:
        output = (
            attention(x, memory) if kind == "cross" else attention(x, **({"rope": rope} if kind == "primus" else {}))
        )
    [(q, k)] = calls.found
    weights = attention_weights(q, k)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 7), atol=1e-6)
    with torch.no_grad():
        v = {
            "self": lambda: attention.qkv(x).chunk(3, -1)[2],
            "cross": lambda: attention.kv(memory).chunk(2, -1)[1],
            "primus": lambda: attention.v_proj(x),
        }[kind]()
        mixed = (weights @ v.unflatten(-1, (4, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
        assert torch.allclose(attention.proj(attention.norm(mixed) if kind == "primus" else mixed), output, atol=1e-5)


def test_the_query_stays_hidden() -> None:
    orders = orders_hiding(4, 12, 3, seed=0, count=40)
    assert (orders.sort(1).values == torch.arange(12)).all()
    assert not (orders[:, :3] == 4).any()
    assert len({tuple(order[:3].tolist()) for order in orders}) > 30


def test_crop_holds_the_voxel() -> None:
    for voxel in ((0, 0, 0), (49, 19, 89), (30, 10, 44)):
        start = crop_around(voxel, (50, 20, 90), (24, 32, 40))
        assert all(s <= v < s + n for s, v, n in zip(start, voxel, (24, 32, 40), strict=True))
        assert start[0] >= 0 and start[0] + 24 <= 50 and start[1] == -6


def test_colours_follow_the_main_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(500, 3, generator=generator) * torch.tensor([9.0, 4.0, 1.0])
    basis = torch.linalg.qr(torch.randn(20, 20, generator=generator)).Q[:, :3]
    values, explained = principal_colours(scores @ basis.T)
    again, _ = principal_colours(scores @ basis.T)
    assert torch.equal(values, again)
    assert values.min() == 0 and values.max() == 1
    for i in range(3):
        assert abs(np.corrcoef(values[:, i], scores[:, i])[0, 1]) > 0.95
    assert explained[0] > explained[1] > explained[2] and sum(explained) == pytest.approx(1)
    assert principal_colours(torch.zeros(1, 20))[0].shape == (1, 3)


def test_place_is_taken_out_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.cartesian_prod(torch.arange(4), torch.arange(5), torch.arange(6), torch.arange(3))
    by_place = sum(torch.randn(6, 8, generator=generator)[places[:, axis]] for axis in range(4))
    assert isinstance(by_place, torch.Tensor)
    rest, share = without_place(by_place, places)
    assert rest.abs().max() < 1e-4 and share == pytest.approx(1)
    content = torch.randn(len(places), 8, generator=generator)
    rest, share = without_place(by_place + content, places)
    only, little = without_place(content, places)
    assert torch.allclose(rest, only, atol=1e-4)
    assert little < 0.1 < 0.5 < share < 1
