"""``HiEndMAEPlanner`` through nnU-Net's own command, and the rules its plans follow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunetv2_hiendmae.nnunet.planner import HiEndMAEPlanner
from nnunetv2_hiendmae.nnunet.plans import takes_batch_dice, with_patch_size

DATASET = "Dataset917_PlannerTest"
SHAPE, SPACING = (20, 60, 50), (4.0, 1.2, 0.9)  # (z, y, x), mm
NUM_CASES = 3


def write_dataset(raw: Path, channels: dict[str, str]) -> None:
    """Cases of random HU blocks with one label, in nnU-Net's raw format."""
    folder = raw / DATASET
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    rng = np.random.default_rng(0)
    for case in range(NUM_CASES):
        hu = rng.integers(-300, 400, size=[n // 5 for n in SHAPE]).repeat(5, 0).repeat(5, 1).repeat(5, 2)
        for channel in channels:
            write_image(folder / "imagesTr" / f"case_{case}_{int(channel):04d}.nii.gz", hu.astype(np.int16))
        write_image(folder / "labelsTr" / f"case_{case}.nii.gz", (hu > 0).astype(np.uint8))
    content = {
        "channel_names": channels,
        "labels": {"background": 0, "dense": 1},
        "numTraining": NUM_CASES,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))


def write_image(file: Path, array: np.ndarray) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, str(file))


def write_fingerprint(preprocessed: Path, shape: tuple[int, int, int], num_channels: int = 1) -> None:
    """What nnU-Net would have measured on cases of this shape."""
    ct = {"mean": 30.0, "std": 60.0, "median": 33.0, "min": -800.0, "max": 1400.0}
    content = {
        "spacings": [list(SPACING)] * NUM_CASES,
        "shapes_after_crop": [list(shape)] * NUM_CASES,
        "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": {
            str(c): {**ct, "percentile_00_5": -111.0, "percentile_99_5": 165.0} for c in range(num_channels)
        },
    }
    (preprocessed / DATASET).mkdir(parents=True, exist_ok=True)
    (preprocessed / DATASET / "dataset_fingerprint.json").write_text(json.dumps(content))


@pytest.fixture
def folders(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """nnU-Net's raw and preprocessed folders, both scratch."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path / "raw", tmp_path / "preprocessed"


def test_nnunets_own_command(folders):
    raw, preprocessed = folders
    write_dataset(raw, {"0": "CT"})
    command = Path(sys.executable).with_name("nnUNetv2_plan_and_preprocess")
    arguments = ["-d", "917", "-pl", "HiEndMAEPlanner", "-c", "3d_fullres", "-np", "1", "-npfp", "1"]
    result = subprocess.run(
        [str(command), *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr

    plans = json.loads((preprocessed / DATASET / "HiEndMAEPlans.json").read_text(encoding="utf-8"))
    assert plans["experiment_planner_used"] == "HiEndMAEPlanner"
    assert list(plans["configurations"]) == ["3d_fullres"]
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["spacing"] == [1.5] * 3
    assert configuration["patch_size"] == [96] * 3
    assert configuration["normalization_schemes"] == ["HUWindowNormalization"]
    properties = plans["foreground_intensity_properties_per_channel"]["0"]
    assert (properties["window_lower"], properties["window_upper"]) == (-175.0, 250.0)
    assert properties["percentile_99_5"] > 250  # nnU-Net's own numbers stay beside ours

    resampled = [round(n * s / 1.5) for n, s in zip(SHAPE, SPACING, strict=True)]
    for case in range(NUM_CASES):
        data = blosc2.open(str(preprocessed / DATASET / "HiEndMAEPlans_3d_fullres" / f"case_{case}.b2nd"))[:]
        assert list(data.shape) == [1, *resampled]
        # nnU-Net normalises before it resamples with a cubic spline, which overshoots by some per cent.
        assert abs(np.median(data[data < 0.01])) < 0.15 and data.min() > -0.5 and data.max() < 1.5
        assert 0.3 < data.mean() < 0.7


def test_stock_trainer_can_use_the_plans(folders):
    """Its U-Net is planned for the same patch, so both can be compared on the same data."""
    raw, preprocessed = folders
    write_dataset(raw, {"0": "CT"})
    write_fingerprint(preprocessed, (300, 400, 400))
    configuration = HiEndMAEPlanner("917").plan_experiment()["configurations"]["3d_fullres"]
    strides = np.prod(configuration["architecture"]["arch_kwargs"]["strides"], axis=0)
    assert all(96 % s == 0 and 96 // s >= 4 for s in strides)


@pytest.mark.parametrize(
    ("shape", "memory_gb"), [((300, 400, 400), 8), ((300, 400, 400), 24), ((40, 90, 120), 8), ((40, 90, 120), 24)]
)
def test_batch_size_rule(folders, shape, memory_gb):
    """nnU-Net's: what its memory logic allows at 96³, at most 5 % of all voxels a batch, at least 2."""
    raw, preprocessed = folders
    write_dataset(raw, {"0": "CT"})
    write_fingerprint(preprocessed, shape)
    planner = HiEndMAEPlanner("917", gpu_memory_target_in_gb=memory_gb)
    configuration = planner.plan_experiment()["configurations"]["3d_fullres"]
    architecture = configuration["architecture"]
    estimate = ExperimentPlanner.static_estimate_VRAM_usage(
        (96, 96, 96), 1, 2, architecture["network_class_name"], architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
    )  # fmt: skip
    by_memory = round(planner.UNet_reference_val_3d * memory_gb / 8 / estimate * 2)
    voxels = NUM_CASES * np.prod([round(n * s / 1.5) for n, s in zip(shape, SPACING, strict=True)])
    by_data = round(voxels * 0.05 / 96**3)
    assert by_memory >= 5
    assert configuration["batch_size"] == max(2, min(by_memory, by_data))
    assert list(configuration["patch_size"]) == [96, 96, 96]


def test_patch_stays_whatever_the_memory_target(folders):
    raw, preprocessed = folders
    write_dataset(raw, {"0": "CT"})
    write_fingerprint(preprocessed, (300, 400, 400))
    configuration = HiEndMAEPlanner("917", gpu_memory_target_in_gb=1).plan_experiment()["configurations"]["3d_fullres"]
    assert list(configuration["patch_size"]) == [96, 96, 96]
    assert configuration["batch_size"] == 2


class FixedPatch(ExperimentPlanner):
    """nnU-Net's planner with one patch at every spacing, and so with nnU-Net's own rule for ``batch_dice``."""

    patch = (96, 96, 96)

    def get_plans_for_configuration(self, spacing, median_shape, *_):
        return {"spacing": spacing, "patch_size": self.patch, "median_image_size_in_voxels": median_shape}


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (5.0, 0.8, 0.8), (1.0, 3.0, 2.1)])
def test_batch_dice_is_nnunets_rule(folders, spacing):
    """Images around the border and far from it; the planner and ``hiendmae_plan -patch_size`` agree with nnU-Net."""
    raw, preprocessed = folders
    write_dataset(raw, {"0": "CT"})
    decided = []
    for edge in (30, 80, 96, 150, 180, 186, 189, 191, 192, 193, 200, 300, 500):
        write_fingerprint(preprocessed, (edge, edge, edge))
        plan = FixedPatch("917", overwrite_target_spacing=list(spacing)).plan_experiment()["configurations"]
        full = plan["3d_fullres"]
        found = takes_batch_dice(full["patch_size"], full["spacing"], full["median_image_size_in_voxels"])
        assert found == full["batch_dice"] == ("3d_lowres" in plan)
        decided.append(found)
        if edge in (96, 500):
            ours = HiEndMAEPlanner("917", overwrite_target_spacing=list(spacing)).plan_experiment()
            configuration = ours["configurations"]["3d_fullres"]
            resized = with_patch_size(configuration, configuration["patch_size"])
            assert configuration["batch_dice"] == resized["batch_dice"]
            if tuple(configuration["patch_size"]) == FixedPatch.patch:
                assert configuration["batch_dice"] == found
    assert set(decided) == {True, False}


def test_channels_that_are_no_ct_keep_nnunets_scheme(folders):
    raw, preprocessed = folders
    write_dataset(raw, {"0": "MR", "1": "CT"})
    write_fingerprint(preprocessed, (100, 110, 90), num_channels=2)
    plans = HiEndMAEPlanner("917").plan_experiment()
    assert plans["configurations"]["3d_fullres"]["normalization_schemes"] == [
        "ZScoreNormalization",
        "HUWindowNormalization",
    ]
    properties = plans["foreground_intensity_properties_per_channel"]
    assert "window_lower" not in properties["0"] and properties["1"]["window_lower"] == -175.0


def test_a_ct_of_another_name_is_planned_as_ct_and_told_once(folders, capsys):
    raw, preprocessed = folders
    write_dataset(raw, {"0": "CTA"})
    write_fingerprint(preprocessed, (100, 110, 90))
    plans = HiEndMAEPlanner("917").plan_experiment()
    assert plans["configurations"]["3d_fullres"]["normalization_schemes"] == ["HUWindowNormalization"]
    assert capsys.readouterr().out.count("channel 0 (CTA): its values are those of CT, and it is planned as such.") == 1


def test_a_very_coarse_axis_has_fewer_voxels(folders):
    raw, preprocessed = folders
    write_dataset(raw, {"0": "CT"})
    write_fingerprint(preprocessed, (300, 400, 400))
    planner = HiEndMAEPlanner("917", overwrite_target_spacing=[8.0, 0.5, 0.5])
    patch = planner.plan_experiment()["configurations"]["3d_fullres"]["patch_size"]
    assert list(patch[1:]) == [96, 96] and 32 <= patch[0] < 96


def test_another_spacing_and_plans_name(folders):
    raw, preprocessed = folders
    write_dataset(raw, {"0": "CT"})
    write_fingerprint(preprocessed, (300, 400, 400))
    planner = HiEndMAEPlanner("917", plans_name="Thick", overwrite_target_spacing=[3.0, 1.0, 1.0])
    plans = planner.plan_experiment()
    configuration = plans["configurations"]["3d_fullres"]
    assert list(configuration["spacing"]) == [3.0, 1.0, 1.0]
    assert list(configuration["patch_size"]) == [96, 96, 96]
    assert (preprocessed / DATASET / "Thick.json").is_file()
    assert configuration["data_identifier"] == "Thick_3d_fullres"
