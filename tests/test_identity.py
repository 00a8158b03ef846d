"""Patients are told from one another however their scans are stored."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import shared_folder
from scipy.ndimage import zoom

from nnunetv2_hiendmae.identity import SAME_PLACES, Known, different, fingerprint, from_text, needed, to_text
from pretraining.phantom import make_phantom

SPACING = (5.0, 4.0, 4.0)
CHANGES = {
    "other axis order": lambda v: (v.transpose(2, 0, 1), (4.0, 5.0, 4.0)),
    "mirrored": lambda v: (v[:, :, ::-1], SPACING),
    "mirrored in another axis order": lambda v: (v[::-1].transpose(1, 2, 0), (4.0, 4.0, 5.0)),
    "without its last slice": lambda v: (v[:-1], SPACING),
    "without a slice in the middle": lambda v: (np.delete(v, len(v) // 2, 0), SPACING),
    "cropped": lambda v: (v[2:, 3:-3, 2:-4], SPACING),
    "resampled": lambda v: (zoom(v.astype(np.float32), (5 / 3, 4 / 3, 4 / 3), order=1), (3.0, 3.0, 3.0)),
    "float": lambda v: (v.astype(np.float64) + 0.3, SPACING),
    "rescaled": lambda v: (v * 1.05 + 10, SPACING),
    "clipped to the window": lambda v: (np.clip(v, -175, 250), SPACING),
}


def phantom(seed: int) -> np.ndarray:
    return make_phantom(np.random.default_rng(seed))[0]


@pytest.fixture(scope="module")
def crowd() -> Known:
    known = Known()
    for seed in range(8):
        known.add(str(seed), fingerprint(phantom(seed), SPACING))
    return known


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_patient_is_found(crowd: Known, change: str) -> None:
    volume, spacing = CHANGES[change](phantom(3))
    assert crowd.find(fingerprint(volume, spacing)) == ["3"]


def test_other_patients_are_not(crowd: Known) -> None:
    for seed in range(8, 14):
        assert crowd.find(fingerprint(phantom(seed), SPACING)) == []


def test_search_with_and_without_an_index_agree() -> None:
    prints = [fingerprint(phantom(seed), SPACING) for seed in range(4)]
    one_by_one, at_once = Known(), Known()
    for i, bits in enumerate(prints):
        one_by_one.add(str(i), bits)
        one_by_one.find(bits)
        at_once.add(str(i), bits)
    for i in range(30):
        at_once.add(f"more {i}", np.random.default_rng(i).integers(0, 2**16, (48, 8)).astype(np.uint16))
        one_by_one.find(prints[0])
        one_by_one.add(f"more {i}", np.random.default_rng(i).integers(0, 2**16, (48, 8)).astype(np.uint16))
    for i, bits in enumerate(prints):
        assert one_by_one.find(bits) == at_once.find(bits) == [str(i)]
    assert one_by_one.names == at_once.names and len(one_by_one._indexes) > len(at_once._indexes) == 1


def test_a_scan_without_structure_is_never_found() -> None:
    known = Known()
    for seed in range(3):
        flat = np.random.default_rng(seed).normal(40, 5, (30, 30, 30))
        bits = fingerprint(flat, (3.0, 3.0, 3.0))
        assert known.find(bits) == []
        known.add(str(seed), bits)
    assert needed(48, 48) == SAME_PLACES and needed(3, 48) > 3


def test_bits_are_counted_alike_with_every_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = np.random.default_rng(0).integers(0, 2**16, (2, 50, 8)).astype(np.uint16)
    expected = np.unpackbits((a ^ b).view(np.uint8), axis=1).sum(1)
    assert np.array_equal(different(a, b), expected)
    monkeypatch.delattr(np, "bitwise_count", raising=False)  # numpy 1 has none
    assert np.array_equal(different(a, b), expected)


def test_text_and_back() -> None:
    bits = fingerprint(phantom(0), SPACING)
    assert len(to_text(bits)) <= 1024 and np.array_equal(from_text(to_text(bits)), bits)
    assert from_text(to_text(bits[:0])).shape == (0, 8)
    with pytest.raises(ValueError, match="no fingerprint"):
        from_text("AAAA")


def test_real_patients_of_one_scanner() -> None:
    files = sorted(shared_folder().glob("data/Dataset501_OpenKBP/imagesTr/*.nii.gz"))[:8]
    images = [sitk.ReadImage(str(file)) for file in files]
    prints = [fingerprint(sitk.GetArrayViewFromImage(i), i.GetSpacing()[::-1]) for i in images]
    for a, b in combinations(range(len(prints)), 2):
        known = Known()
        known.add("other", prints[a])
        assert known.find(prints[b]) == [], (files[a].name, files[b].name)
    known.add("it", prints[0])
    cut = images[0][:, :, : -(images[0].GetDepth() // 8)]
    assert known.find(fingerprint(sitk.GetArrayFromImage(cut)[:, ::-1], cut.GetSpacing()[::-1])) == ["it"]
