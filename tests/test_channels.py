"""What a channel holds is judged from its values and its name, and said wherever it matters."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import DATASET, World
from golden import SHARED

from nnunetv2_hiendmae.channels import Evidence, channel_names, hu_evidence, names_ct
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW, ChannelIntensity, channel_intensity, channel_lines
from nnunetv2_hiendmae.nnunet.planner import name_by_values
from nnunetv2_hiendmae.nnunet.settings import BLOCK, FineTuneSettings
from pretraining.doctor.dataset import check_channels
from pretraining.phantom import make_phantom


def statistics(values: np.ndarray) -> dict[str, float]:
    """As nnU-Net's fingerprint has them of a channel's foreground."""
    low, median, high = np.percentile(values, (0.5, 50, 99.5))
    named = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max(), "median": median,
             "percentile_00_5": low, "percentile_99_5": high}  # fmt: skip
    return {name: float(value) for name, value in named.items()}


RNG = np.random.default_rng(0)
HU, LABELS = make_phantom(np.random.default_rng(1))
ORGANS = statistics(HU[LABELS > 0])
LIVER = statistics(RNG.normal(90, 30, 9999))
BODY = statistics(HU[HU > -500])
SUV = statistics(RNG.gamma(2, 1.5, 9999))
BECQUEREL = statistics(RNG.gamma(2, 4000, 9999))
SCALED = statistics(np.clip((HU[LABELS > 0] + 175) / 425, 0, 1))
Z_SCORED = statistics(RNG.normal(size=9999))
MR = statistics(np.abs(RNG.normal(400, 150, 9999)))
BONE = statistics(RNG.uniform(200, 1500, 9999))
LUNG = statistics(RNG.normal(-800, 60, 9999))


@pytest.mark.parametrize(
    ("properties", "expected"),
    [(LIVER, Evidence.LIKELY), (ORGANS, Evidence.SURE), (BODY, Evidence.SURE), (LUNG, Evidence.SURE),
     (SUV, Evidence.NO),
     (BECQUEREL, Evidence.NO), (SCALED, Evidence.NO), (Z_SCORED, Evidence.NO), (MR, Evidence.UNCLEAR),
     (BONE, Evidence.UNCLEAR), ({}, Evidence.UNCLEAR), (dict.fromkeys(BODY, float("nan")), Evidence.UNCLEAR)],
)  # fmt: skip
def test_values_tell(properties: dict[str, float], expected: Evidence) -> None:
    assert hu_evidence(properties) is expected


def test_names_tell() -> None:
    assert all(map(names_ct, ("CT", "ct", "CTA", "CBCT", "CT_portal", "portal-CT", "CT2", "4DCT", "HU", "CT (venous)")))
    assert not any(
        map(
            names_ct, ("PET", "SPECT", "contrast", "T1", "ADC", "T2_tract", "MR", "noNorm", "CT1", "ct1w", "CT_CBF", "")
        )
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real CT in {SHARED}")
@pytest.mark.parametrize("dataset", ["Dataset501_OpenKBP", "Dataset502_Sarcoma", "Dataset503_TrunkMultiOrgan"])
def test_real_ct_is_ct(dataset: str) -> None:
    import SimpleITK as sitk

    folder = SHARED / "data" / dataset
    file = min((folder / "imagesTr").glob("*_0000.nii.gz"))
    label = folder / "labelsTr" / file.name.replace("_0000", "")
    hu, labels = (sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for f in (file, label))
    assert hu_evidence(statistics(hu[labels > 0])) in (Evidence.LIKELY, Evidence.SURE)
    assert hu_evidence(statistics(hu[hu > -500])) in (Evidence.LIKELY, Evidence.SURE)


@pytest.mark.parametrize(
    ("scheme", "properties", "name", "is_ct", "doubtful", "words"),
    [
        ("CTNormalization", ORGANS, "CT", True, False, "mapped onto the window from HU"),
        ("CTNormalization", SUV, "CT", False, True, "are no HU"),
        ("CTNormalization", BECQUEREL, "CT", False, True, "are no HU"),
        ("CTNormalization", SCALED, "CT", False, True, "are no HU"),
        ("CTNormalization", MR, "CT", True, True, "none of CT's below 0"),
        ("HUWindowNormalization", SUV, "CT", False, True, "are no HU"),
        ("ZScoreNormalization", ORGANS, "CTA", False, True, "uses each image's own statistics and cannot be undone"),
        ("ZScoreNormalization", ORGANS, "image", False, True, "cannot be undone"),
        ("ZScoreNormalization", BONE, "CBCT", False, True, "cannot be undone"),
        ("ZScoreNormalization", MR, "T1", False, False, "no CT; it reaches the encoder as ZScoreNormalization left it"),
        ("RescaleTo01Normalization", BODY, "rescale_to_0_1", False, True, "cannot be undone"),
        ("RGBTo01Normalization", BODY, "rgb_to_0_1", False, True, "cannot be undone"),
        ("SomebodysNormalization", BODY, "CT", False, True, "is not known here"),
        ("NoNormalization", ORGANS, "nonorm", True, False, "mapped onto the window from HU"),
        ("NoNormalization", SCALED, "nonorm", False, False, "no CT"),
        ("NoNormalization", MR, "nonorm", False, True, "are not clearly HU"),
    ],
)  # fmt: skip
def test_every_scheme_says_what_becomes_of_it(scheme, properties, name, is_ct, doubtful, words) -> None:
    windowed = {**properties, "window_lower": -175.0, "window_upper": 250.0}
    channel = channel_intensity(scheme, windowed, DEFAULT_WINDOW, name)
    assert (channel.is_ct, channel.is_doubtful) == (is_ct, doubtful)
    (line,) = channel_lines([channel], [name])
    assert line.startswith("WARNING: " * doubtful + f"channel 0 ({name}): ") and words in line


def test_raw_hu_is_mapped_exactly() -> None:
    channel = channel_intensity("NoNormalization", ORGANS, DEFAULT_WINDOW)
    assert channel.scale * 60 + channel.shift == pytest.approx((60 + 175) / 425)
    assert channel.air == 0 and not channel.cuts(DEFAULT_WINDOW)
    assert ChannelIntensity().air == 0


@pytest.mark.parametrize(
    ("name", "properties", "planned"),
    [("CT", ORGANS, "CT"), ("CT", SUV, "zscore"), ("CT", MR, "CT"), ("CTA", ORGANS, "CT"), ("cbct", BONE, "CT"),
     ("MRI", BODY, "MRI"), ("T1w", BODY, "T1w"), ("PET", SUV, "PET"), ("CTA", SUV, "CTA"), ("zscore", BODY, "zscore"),
     ("noNorm", BODY, "noNorm"), ("scan", LIVER, "scan"), ("scan", ORGANS, "CT"),
     ("CT1", MR, "CT1"), ("CT1", ORGANS, "CT"), ("CT_Tmax", statistics(RNG.uniform(0, 250, 9999)), "CT_Tmax")],
)  # fmt: skip
def test_the_planner_goes_by_values_and_names(name, properties, planned) -> None:
    assert name_by_values(name, properties) == planned


def test_names_in_nnunets_order() -> None:
    assert channel_names({"channel_names": {"0": "CT", "1": "PET"}}) == ["CT", "PET"]
    assert channel_names({"modality": {"0": "CT"}}) == ["CT"] and channel_names({}) == []


@pytest.fixture
def renamed(world: World, tmp_path):
    """The world's data set with its only channel called CTA, planned by nnU-Net's rule from the same fingerprint."""
    for kind in ("raw", "preprocessed", "results"):
        (tmp_path / kind).mkdir()
    shutil.copytree(world.root / "preprocessed" / DATASET, tmp_path / "preprocessed" / DATASET)
    shutil.copytree(world.root / "raw" / DATASET, tmp_path / "raw" / DATASET)
    for kind in ("raw", "preprocessed"):
        file = tmp_path / kind / DATASET / "dataset.json"
        description = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**description, "channel_names": {"0": "CTA"}}))
    place = World(tmp_path)
    place.run("nnUNetv2_plan_experiment -d 901")
    return place


def test_a_ct_of_another_name_is_never_silent(renamed: World) -> None:
    """Planned by nnU-Net it is z-scored: planning, doctor and pre-training say so. HiEndMAEPlanner plans it as CT."""
    words = "channel 0 (CTA): CT, but ZScoreNormalization uses each image's own statistics"
    assert f"WARNING: {words}" in renamed.run("hiendmae_plan -d 901")
    folder = renamed.root / "preprocessed" / DATASET
    plans = json.loads((folder / "nnUNetPlans.json").read_text(encoding="utf-8"))
    (finding,) = check_channels(folder, plans, plans["configurations"]["3d_fullres"], labelled=True)
    assert finding.level == "warning" and finding.what.startswith(words)
    log = renamed.run("hiendmae_pretrain -d 901 -p nnUNetPlans -preset tiny -device cpu -steps 2", ok=False)
    assert "pre-training needs HU in every channel" in log and words in log and "Traceback" not in log
    log = renamed.run("nnUNetv2_plan_experiment -d 901 -pl HiEndMAEPlanner")
    assert "channel 0 (CTA): its values are those of CT" in log
    assert "channel 0 (CTA): HUWindowNormalization, mapped onto the window from HU." in log


@pytest.mark.parametrize(
    "block",
    [{"initial_lr": "1e-4"}, {"initial_lr": None}, {"vit_patch_size": 8}, {"window_hu": 5}, {"weights": 5},
     {"architecture": {"kind": "vit", "embed_dim": 384}}, {"architecture": ["tiny"]}, {"epochs": 3}, None, "tiny"],
)  # fmt: skip
def test_a_block_of_other_types_gets_a_sentence(block: object) -> None:
    """Written by hand, or by an editor that turns numbers into text."""
    with pytest.raises(ValueError, match="'hiendmae' block"):
        FineTuneSettings.from_configuration({BLOCK: block})
