"""The gate knows HU from what is shifted, whatever the padding; real CT passes as it is."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from golden import SHARED
from scipy.ndimage import gaussian_filter

from pretraining.phantom import make_phantom
from pretraining.prepare.quality import Gate, check_voxels
from pretraining.prepare.read import Refused

Volume = tuple[np.ndarray, tuple[float, ...]]
REAL = sorted((SHARED / "data").glob("Dataset50[0-3]_*/imagesTr/*_0000.nii.gz"))[::24]


def reason(voxels: np.ndarray, spacing: tuple[float, ...]) -> str:
    """Why the gate refuses; empty if it does not."""
    try:
        check_voxels(voxels, spacing, Gate())
    except Refused as refusal:
        return str(refusal)
    return ""


@pytest.fixture(params=[None, *REAL], ids=["phantom", *(file.name[:-12] for file in REAL)])
def volume(request: pytest.FixtureRequest) -> Volume:
    """HU and spacing of the phantom, and of real CT where there is some."""
    if request.param is None:
        return make_phantom(np.random.default_rng(0))[0].astype(np.int16), (5.0, 4.0, 4.0)
    image = sitk.ReadImage(str(request.param))
    return sitk.GetArrayFromImage(image).astype(np.int16), image.GetSpacing()[::-1]


def outside_the_field_of_view(voxels: np.ndarray, value: int) -> np.ndarray:
    """All but the circle that a scanner reconstructs."""
    _, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in voxels.shape), indexing="ij", sparse=True)
    return np.where(x**2 + y**2 > 1, value, voxels).astype(np.int16)


@pytest.mark.parametrize("padding", [None, 0, -1024, -2000, -3024, -32768])
def test_padding_hides_nothing_and_refuses_nothing(volume: Volume, padding: int | None) -> None:
    hu, spacing = volume
    clipped = np.clip(hu, -1024, None)
    padded = (lambda v: v) if padding is None else (lambda v: outside_the_field_of_view(v, padding))
    assert reason(padded(hu), spacing) == ""
    for offset in (1000, 1024):
        assert "rescale intercept not applied" in reason(padded(np.clip(hu, -offset, None) + offset), spacing)
    if padding != 0:  # 0 would be soft tissue
        assert "applied twice" in reason(padded(clipped - 1024), spacing)


def test_metal_and_partial_fields_of_view_pass(volume: Volume) -> None:
    hu, spacing = volume
    metal = hu.copy()
    metal[tuple(slice(n // 2, n // 2 + 3) for n in hu.shape)] = 30000
    assert reason(metal, spacing) == ""
    inner = hu[tuple(slice(n // 5, n - n // 5) for n in hu.shape)]
    assert reason(inner, spacing) == ""


def test_an_mr_is_none() -> None:
    noise = gaussian_filter(np.random.default_rng(0).normal(size=(30, 40, 40)), 2)
    assert "no fat or air" in reason(np.clip(200 + 900 * noise, 0, None), (2.0, 2.0, 2.0))


def test_pet_is_none() -> None:
    pet = np.random.default_rng(0).gamma(1, 1, (30, 40, 40))
    assert "already normalised" in reason(pet, (4.0, 4.0, 4.0))
    assert "no fat or air" in reason(pet * 40, (4.0, 4.0, 4.0))
