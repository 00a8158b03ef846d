"""One CT, whatever the plans did to it, reaches the encoder as the same canonical values."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from golden import SHARED
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization, ZScoreNormalization
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnunetv2_hiendmae.architectures import HiEndMAEUNETR, ViTConfig
from nnunetv2_hiendmae.intensity import (
    DEFAULT_WINDOW,
    CanonicalIntensity,
    channel_intensity,
    clip_warning,
    plan_intensities,
)
from nnunetv2_hiendmae.nnunet.normalization import HUWindowNormalization

# Intensity properties as nnU-Net's fingerprint has them: bones dominate, soft tissue dominates, whole trunk.
HEAD_NECK = {"mean": 255.415, "std": 444.195, "percentile_00_5": -116.0, "percentile_99_5": 1638.0}
SARCOMA = {"mean": 30.888, "std": 54.590, "percentile_00_5": -111.0, "percentile_99_5": 165.0}
TRUNK = {"mean": 4.999, "std": 256.367, "percentile_00_5": -992.0, "percentile_99_5": 708.0}
CT_FOLDER = SHARED / "data" / "Dataset501_OpenKBP" / "imagesTr"
PROPERTIES = {"head and neck": HEAD_NECK, "sarcoma": SARCOMA, "trunk": TRUNK}


def ct() -> np.ndarray:
    """HU of ``(7, 11, 5)`` voxels, with every integer of the default window's surroundings likely."""
    rng = np.random.default_rng(0)
    hu = rng.integers(-400, 500, size=(7, 11, 5)).astype(np.int16)
    hu[0, :, 0] = [-1024, 3071, -175, 250, -116, 165, -111, 0, 708, -992, 1638]
    return hu


def window(hu: np.ndarray, low: float, high: float) -> np.ndarray:
    """The definition: clipped to the window, scaled to [0, 1]."""
    return (np.clip(hu.astype(np.float64), low, high) - low) / (high - low)


def canonical(scheme: str, properties: dict, hu: np.ndarray, target=DEFAULT_WINDOW) -> np.ndarray:
    """Through nnU-Net's own normalisation class, then through our layer."""
    classes = {"CTNormalization": CTNormalization, "HUWindowNormalization": HUWindowNormalization}
    normalised = classes[scheme](use_mask_for_norm=False, intensityproperties=properties).run(hu.copy())
    layer = CanonicalIntensity([channel_intensity(scheme, properties, target)])
    return layer(torch.from_numpy(normalised)[None, None])[0, 0].numpy()


@pytest.mark.parametrize("target", [DEFAULT_WINDOW, (-1000.0, 400.0), (0.0, 80.0)])
@pytest.mark.parametrize("properties", PROPERTIES.values(), ids=PROPERTIES.keys())
def test_nnunet_plans(properties, target):
    hu = ct()
    actual, expected = canonical("CTNormalization", properties, hu, target), window(hu, *target)
    low, high = properties["percentile_00_5"], properties["percentile_99_5"]
    common = (hu >= low) & (hu <= high)
    assert common.mean() > 0.2
    np.testing.assert_allclose(actual[common], expected[common], rtol=0, atol=1e-5)
    # What the plans' clip cut off arrives as the clip's limit: the nearest that is left of it.
    limits = window(np.clip(hu, low, high), *target)
    np.testing.assert_allclose(actual, limits, rtol=0, atol=1e-5)


@pytest.mark.skipif(not CT_FOLDER.is_dir(), reason=f"real CT is not in {CT_FOLDER}")
def test_a_real_ct_under_three_plans():
    """A head-and-neck CT under its own data set's plans, which cut at -116 HU, and under HiEndMAEPlanner's."""
    image = sitk.ReadImage(str(min(CT_FOLDER.glob("*.nii.gz"))))
    hu = sitk.GetArrayFromImage(image)
    expected = window(hu, *DEFAULT_WINDOW)
    stock = canonical("CTNormalization", HEAD_NECK, hu)
    ours = canonical("HUWindowNormalization", {"window_lower": -175.0, "window_upper": 250.0}, hu)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    common = hu >= -116
    assert 0.05 < common.mean() < 0.95
    np.testing.assert_allclose(stock[common], expected[common], rtol=0, atol=1e-5)
    np.testing.assert_allclose(stock[~common], (175 - 116) / 425, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", [DEFAULT_WINDOW, (-100.0, 200.0)])
def test_hiendmae_planner_plans(target):
    properties = {**HEAD_NECK, "window_lower": -175.0, "window_upper": 250.0}
    hu = ct()
    actual = canonical("HUWindowNormalization", properties, hu, target)
    np.testing.assert_allclose(actual, window(hu, *target), rtol=0, atol=1e-5)


def test_normalisation_scheme_leaves_its_input_alone_and_is_the_window():
    properties = {"window_lower": -175.0, "window_upper": 250.0}
    hu = ct()
    before = hu.copy()
    normalised = HUWindowNormalization(use_mask_for_norm=False, intensityproperties=properties).run(hu)
    assert normalised.dtype == np.float32 and np.array_equal(hu, before)
    np.testing.assert_allclose(normalised, window(hu, -175, 250), rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_encoder_sees_the_same_ct_under_three_plans():
    torch.manual_seed(0)
    config = ViTConfig(patch_size=(4, 6, 2), embed_dim=24, depth=3, num_heads=2, taps=(0, 2))
    hu = np.clip(ct(), -111, 165)  # what no clip cuts
    schemes = {
        "raw window": (None, None),
        **{f"nnUNetPlans {name}": ("CTNormalization", p) for name, p in PROPERTIES.items()},
        "HiEndMAEPlans": ("HUWindowNormalization", {"window_lower": -175.0, "window_upper": 250.0}),
    }
    network = HiEndMAEUNETR(config, input_channels=1, num_classes=2, img_size=hu.shape, feature_size=2)
    features = {}
    for name, (scheme, properties) in schemes.items():
        if scheme is None:
            x = torch.from_numpy(window(hu, *DEFAULT_WINDOW)).float()[None, None]
        else:
            x = torch.from_numpy(canonical(scheme, properties, hu))[None, None]
        features[name] = network.vit(network.pad_to_patches(x)[0])[1]
    for name, final in features.items():
        torch.testing.assert_close(final, features["raw window"], rtol=0, atol=1e-4, msg=name)


def network_under(properties: dict, num_classes: int = 2) -> HiEndMAEUNETR:
    config = ViTConfig(patch_size=(4, 4, 4), embed_dim=12, depth=2, num_heads=2, taps=(0, 1))
    intensity = CanonicalIntensity([channel_intensity("CTNormalization", properties, DEFAULT_WINDOW)])
    return HiEndMAEUNETR(
        config, input_channels=1, num_classes=num_classes, img_size=(8, 8, 8), feature_size=2, intensity=intensity
    )


def test_pretrained_weights_bring_neither_map_nor_head(tmp_path):
    """nnU-Net's own ``-pretrained_weights``: a model of other plans and labels; the map stays that of the new plans."""
    old, new = network_under(TRUNK, 5), network_under(SARCOMA, 3)
    torch.save({"network_weights": old.state_dict()}, tmp_path / "checkpoint_final.pth")
    head = new.head.seg_layers[0].weight.clone()
    load_pretrained_weights(new, str(tmp_path / "checkpoint_final.pth"))
    assert torch.equal(new.head.seg_layers[0].weight, head)
    assert all(torch.equal(p, old.state_dict()[n]) for n, p in new.state_dict().items() if ".seg_layers." not in n)
    stored = torch.full((1, 1, 4, 4, 4), (60 - SARCOMA["mean"]) / SARCOMA["std"])
    torch.testing.assert_close(new.intensity(stored), torch.full_like(stored, (60 + 175) / 425))


def of_version_0_1(network: HiEndMAEUNETR) -> dict[str, torch.Tensor]:
    """Its state as that version saved it."""
    state = {name.replace("head.seg_layers.0", "seg_head"): value for name, value in network.state_dict().items()}
    return state | {f"intensity.{name}": getattr(network.intensity, name) for name in ("scale", "shift", "is_ct")}


def test_checkpoints_of_version_0_1_load():
    old, new = network_under(TRUNK), network_under(TRUNK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new.load_state_dict(of_version_0_1(old), strict=True)
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())


def test_a_checkpoint_trained_with_another_map_is_told():
    new = network_under(SARCOMA)
    with pytest.warns(UserWarning, match="trained with other intensities than its plans describe"):
        new.load_state_dict(of_version_0_1(network_under(TRUNK)), strict=True)


def test_other_modalities_are_left_alone():
    mr = np.random.default_rng(1).normal(300, 80, size=(1, 3, 4, 5)).astype(np.float32)
    z_scored = ZScoreNormalization(use_mask_for_norm=False, intensityproperties={}).run(mr)
    properties = {"0": HEAD_NECK, "1": {}}
    plans = {"foreground_intensity_properties_per_channel": properties}
    configuration = {"normalization_schemes": ["CTNormalization", "ZScoreNormalization"]}
    layer = CanonicalIntensity(plan_intensities(plans, configuration, DEFAULT_WINDOW))
    x = torch.stack([torch.full((3, 4, 5), 99.0), torch.from_numpy(z_scored[0])])[None]
    y = layer(x)
    assert torch.equal(y[:, 1], x[:, 1]) and y[:, 1].min() < 0
    assert torch.equal(y[:, 0], torch.ones_like(y[:, 0]))


@pytest.mark.parametrize(
    ("properties", "target", "ranges"),
    [
        (HEAD_NECK, DEFAULT_WINDOW, "channel 0: -116…1638 HU"),
        (SARCOMA, DEFAULT_WINDOW, "channel 0: -111…165 HU"),
        (TRUNK, (-1000.0, 400.0), "channel 0: -992…708 HU"),
    ],
)
def test_a_clip_inside_the_window_is_told_with_both_ranges(properties, target, ranges):
    warning = clip_warning([channel_intensity("CTNormalization", properties, target)], target, "nnUNetPlans")
    assert warning is not None and warning.startswith("nnUNetPlans ")
    assert ranges in warning and f"{target[0]:g}…{target[1]:g} HU" in warning
    assert ("HiEndMAEPlanner" in warning) == (target == DEFAULT_WINDOW)  # it keeps that window, and no wider one


def test_no_warning_where_nothing_is_cut():
    whole = channel_intensity("CTNormalization", TRUNK, DEFAULT_WINDOW)
    ours = channel_intensity("HUWindowNormalization", {"window_lower": -175, "window_upper": 250}, DEFAULT_WINDOW)
    mr = channel_intensity("ZScoreNormalization", {}, DEFAULT_WINDOW)
    assert clip_warning([whole, ours, mr], DEFAULT_WINDOW, "plans") is None


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match=r"\(250, -175\) is empty"):
        channel_intensity("CTNormalization", TRUNK, (250, -175))
