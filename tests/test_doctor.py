"""``hiendmae_doctor``: each problem provoked, and its remedy named."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from conftest import DATASET, World
from heap import ct, write

from pretraining.doctor.dataset import check_raw, check_weights, compare_spacing
from pretraining.doctor.environment import DOOR, check_discovery, check_torchvision, check_versions
from pretraining.doctor.finding import Finding
from pretraining.prepare.raw import RawDataSet

QUICK = "hiendmae_doctor -preset tiny -device cpu"


def levels(report: str) -> list[str]:
    return [line.split()[0] for line in report.splitlines() if line.startswith(("ok ", "warning ", "problem "))]


def test_all_is_well(world: World, pretrained: Path) -> None:
    report = world.run(f"{QUICK} -d 901", HIENDMAE_WEIGHTS=str(pretrained))
    assert "problem" not in levels(report) and "0 problems" in report
    assert "\033" not in report and "Warning" not in report
    assert "6 raw cases, with labels" in report and "6 cases preprocessed" in report
    assert f"weights: {pretrained} (named by the environment variable HIENDMAE_WEIGHTS)" in report
    assert f"pre-trained on {DATASET} (6 cases)" in report and "more voxels" in report
    assert "nnU-Net finds nnUNetTrainerHiEndMAE through" in report


@pytest.mark.slow
def test_problems_and_their_mends(world: World, tmp_path: Path) -> None:
    for kind in ("preprocessed", "results"):
        (tmp_path / kind).mkdir()
    empty = {"nnUNet_preprocessed": str(tmp_path / "preprocessed"), "nnUNet_results": str(tmp_path / "results")}
    report = world.run(f"{QUICK} -d 901", ok=False, **empty)
    assert "→ nnUNetv2_plan_and_preprocess -d 901 -pl HiEndMAEPlanner" in report
    report = world.run(f"{QUICK} -d 888", ok=False)
    assert "problem  -d 888" in report and "hiendmae_ingest" in report
    shutil.copytree(world.root / "preprocessed" / DATASET, tmp_path / "preprocessed" / DATASET)
    volumes = tmp_path / "preprocessed" / DATASET / "nnUNetPlans_3d_fullres"
    (volumes / "phantom_000.b2nd").unlink()
    report = world.run(f"{QUICK} -d 901", ok=False, **empty)
    assert "warning" in levels(report) and "5 of 6 cases are preprocessed" in report
    assert "→ nnUNetv2_preprocess -d 901 -plans_name nnUNetPlans -c 3d_fullres" in report
    assert "No Hi-End-MAE weights found" in report and "→ Pre-train with 'hiendmae_pretrain -d" in report
    report = world.run(f"{QUICK} -d 901 -c 3d_lowres", ok=False)
    assert "has no configuration 3d_lowres" in report
    (tmp_path / "preprocessed" / DATASET / "nnUNetPlans.json").write_text("{", encoding="utf-8")
    report = world.run(f"{QUICK} -d 901", ok=False, **empty)
    assert "nnUNetPlans.json cannot be read as JSON" in report and "Traceback" not in report
    report = world.run(QUICK, ok=False, nnUNet_raw="", nnUNet_results=str(tmp_path / "none"))
    assert "variable nnUNet_raw is not set" in report and f"→ mkdir -p {tmp_path / 'none'}" in report


def test_raw_cases_that_lack_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label, then a channel; and a single slice."""
    folder = tmp_path / "Dataset022_STS"
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
    for case in "abc":
        write(ct(1, (1 if case == "c" else 24, 32, 40)), folder / "imagesTr" / f"{case}_0000.nii.gz")
        write(ct(1) > 0, folder / "labelsTr" / f"{case}.nii.gz")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    (folder / "dataset.json").write_text(json.dumps(description))
    (finding,) = check_raw(RawDataSet.open("22"))
    assert finding.level == "problem" and f"{folder}/imagesTr/c_0000.nii.gz: a single slice" in finding.what
    (folder / "imagesTr" / "c_0000.nii.gz").unlink()
    (finding,) = check_raw(RawDataSet.open("22"))
    assert finding.level == "ok" and "2 raw cases, with labels" in finding.what
    (folder / "labelsTr" / "b.nii.gz").unlink()
    (finding,) = check_raw(RawDataSet.open("22"))
    assert finding.level == "problem" and f"1 of 2 raw cases lack a label: {folder}/labelsTr/b.nii.gz" in finding.what
    (folder / "dataset.json").write_text(json.dumps({**description, "channel_names": {"0": "CT", "1": "PET"}}))
    write(ct(2), folder / "imagesTr" / "a_0001.nii.gz")
    first, second = check_raw(RawDataSet.open("22"))
    assert "b_0001.nii.gz: missing: channel 1 (PET) of case b" in first.what and "lack a label" in second.what


def test_torchvision_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision").mkdir()
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision" / "__init__.py").write_text(broken, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    (finding,) = check_torchvision()
    assert finding.level == "problem" and "operator torchvision::nms does not exist" in finding.what


def test_trainer_that_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretraining.doctor.environment.DOOR", DOOR.with_name("not_there.py"))
    monkeypatch.setattr("pretraining.doctor.environment.TRAINER", "nnUNetTrainerThatIsNotThere")
    (finding,) = check_discovery()
    assert finding.level == "problem" and finding.remedy.startswith("export nnUNet_extTrainer=")


def test_old_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretraining.doctor.environment.version", lambda name: "0.1" if name == "nnunetv2" else "99")
    problems = [f for f in check_versions() if f.level == "problem"]
    assert [f.what.split()[0] for f in problems] == ["nnunetv2"] and "pip install 'nnunetv2>=" in problems[0].remedy


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> str:
        if name == "surface-distance":
            raise PackageNotFoundError(name)
        return "99"

    monkeypatch.setattr("pretraining.doctor.environment.version", without)
    (problem,) = [f for f in check_versions() if f.level == "problem"]
    assert problem.what == "surface-distance is not installed." and "pip install 'surface-distance" in problem.remedy


def test_plan_against_weights(world: World, pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another spacing, a clip inside the window, a patch that wastes tokens."""
    monkeypatch.setenv("HIENDMAE_WEIGHTS", str(pretrained))
    for kind in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(world.root / kind))
    file = world.root / "preprocessed" / DATASET / "nnUNetPlans.json"
    plans = json.loads(file.read_text(encoding="utf-8"))
    plans["foreground_intensity_properties_per_channel"]["0"] |= {"percentile_00_5": -20.0, "percentile_99_5": 60.0}
    plan = {**plans["configurations"]["3d_fullres"], "spacing": [1.0, 1.0, 1.0], "patch_size": [17, 16, 24]}
    found: list[Finding] = list(check_weights("901", plans, plan, "3d_fullres"))
    overlap, *warnings = [f for f in found if f.level == "warning"]
    assert len(warnings) == 3 and "in the pre-training" in overlap.what
    assert "pre-training had 8 × 6 × 6" in warnings[0].what and "-overwrite_target_spacing 8 6 6" in warnings[0].remedy
    assert "-20…60 HU" in warnings[1].what
    assert "41% more voxels" in warnings[2].what and warnings[2].remedy == "hiendmae_plan -d 901 -patch_size 16 16 24"


def test_order_of_axes_is_no_other_spacing() -> None:
    (finding,) = compare_spacing("17", [1.5, 3.0, 1.5], {"D": [3.0, 1.5, 1.5]})
    assert finding.level == "ok"
