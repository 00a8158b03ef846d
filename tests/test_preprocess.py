"""``hiendmae_plan_and_preprocess``: images without labels, through nnU-Net's own parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import World, shared_folder
from heap import ct, write

from nnunetv2_hiendmae.weights.file import load_weights

NAME = "Dataset510_Heap"


@pytest.fixture
def place(tmp_path: Path) -> World:
    """A raw data set of five images without labels."""
    for kind in ("raw", "preprocessed", "results"):
        (tmp_path / kind).mkdir()
    raw = tmp_path / "raw" / NAME
    for i in range(5):
        write(ct(i), raw / "imagesTr" / f"case_{i}_0000.nii.gz")
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps({**description, "licence": "CC0"}))
    return World(tmp_path)


def volumes(place: World, plans: str = "HiEndMAEPlans") -> dict[str, np.ndarray]:
    folder = place.root / "preprocessed" / NAME / f"{plans}_3d_fullres"
    return {f.stem: blosc2.open(str(f), mode="r")[:] for f in sorted(folder.glob("*.b2nd")) if "_seg" not in f.name}


def test_two_commands_from_raw_to_weights(place: World) -> None:
    log = place.run("hiendmae_plan_and_preprocess -d 510 -spacing 3 3 3 -np 2")
    assert "5 cases preprocessed, 0 left out" in log
    found = volumes(place)
    assert len(found) == 5 and all(v.shape == (1, 24, 21, 27) for v in found.values())
    assert all(v.min() >= -0.3 and v.max() <= 1.3 for v in found.values())  # HU window, cubic resampling
    flags = "-preset tiny -device cpu -steps 2 -batch_size 2 -crop_size 16 16 16 -num_workers 0"
    place.run(f"hiendmae_pretrain -d 510 {flags}")
    header = load_weights(next((place.root / "results").rglob("encoder_weights.pth"))).header
    (provenance,) = header["provenance"]
    assert provenance["cases"] == 5 and provenance["licence"] == "CC0" and len(provenance["content_sha256"]) == 64
    assert provenance["spacing_median"] == [3.0, 2.0, 2.0]


@pytest.mark.slow
def test_equals_nnunet_where_labels_are(place: World) -> None:
    """With labels there, nnU-Net's own command under the same plans writes the same voxels."""
    place.run("hiendmae_plan_and_preprocess -d 510 -spacing 3 3 3 -np 1")
    ours = volumes(place)
    raw = place.root / "raw" / NAME
    for i in range(5):
        write(ct(i) > 0, raw / "labelsTr" / f"case_{i}.nii.gz")
    description = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
    (raw / "dataset.json").write_text(json.dumps({**description, "labels": {"background": 0, "body": 1}}))
    shutil.rmtree(place.root / "preprocessed" / NAME / "HiEndMAEPlans_3d_fullres")
    place.run("nnUNetv2_preprocess -d 510 -plans_name HiEndMAEPlans -c 3d_fullres -np 1")
    theirs = volumes(place)
    assert ours.keys() == theirs.keys()
    for case, volume in ours.items():
        np.testing.assert_array_equal(volume, theirs[case])


def test_one_plans_file_has_one_spacing(place: World) -> None:
    command = "hiendmae_plan_and_preprocess -d 510 -np 1"
    place.run(f"{command} --plan_only -spacing 6 3 3")
    plans_file = place.root / "preprocessed" / NAME / "HiEndMAEPlans.json"
    assert json.loads(plans_file.read_text(encoding="utf-8"))["configurations"]["3d_fullres"]["spacing"] == [6, 3, 3]
    log = place.run(f"{command} -spacing 3 3 3", ok=False)
    assert "was made for a spacing of 6 3 3 mm, not 3 3 3" in log and "another name with -p" in log
    before = plans_file.stat().st_mtime_ns
    assert "(6 × 3 × 3 mm)" in place.run(command)  # no spacing asked for: the plans decide
    assert plans_file.stat().st_mtime_ns == before


@pytest.mark.slow
def test_nnunet_makes_its_own_fingerprint_of_labelled_data(place: World) -> None:
    """Ours has intensities of the body; nnU-Net would take it for its own, of labelled voxels."""
    raw = place.root / "raw" / NAME
    for i in range(5):
        write(ct(i) > 0, raw / "labelsTr" / f"case_{i}.nii.gz")
    place.run("hiendmae_plan_and_preprocess -d 510 --plan_only -np 1")
    folder = place.root / "preprocessed" / NAME
    assert not (folder / "dataset_fingerprint.json").exists() and (folder / "hiendmae_fingerprint.json").is_file()
    (folder / "dataset_fingerprint.json").write_bytes((folder / "hiendmae_fingerprint.json").read_bytes() + b"\n")
    theirs = (folder / "dataset_fingerprint.json").read_bytes()
    place.run("hiendmae_plan_and_preprocess -d 510 --plan_only -np 1 -p Other")
    assert (folder / "dataset_fingerprint.json").read_bytes() == theirs


def test_bad_case_is_left_out_and_finished_ones_are_kept(place: World) -> None:
    images = place.root / "raw" / NAME / "imagesTr"
    good = (images / "case_2_0000.nii.gz").read_bytes()
    (images / "case_2_0000.nii.gz").write_bytes(good[:2000])
    command = "hiendmae_plan_and_preprocess -d 510 -spacing 3 3 3 -np 1"
    log = place.run(command, ok=False)
    assert f"LEFT OUT {images / 'case_2_0000.nii.gz'}: " in log and "Traceback" not in log
    assert "4 cases preprocessed, 1 left out" in log
    folder = place.root / "preprocessed" / NAME / "HiEndMAEPlans_3d_fullres"
    before = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.b2nd")}
    (folder / "case_1.b2nd").write_bytes(b"damaged")
    (images / "case_2_0000.nii.gz").write_bytes(good)
    assert "5 cases preprocessed, 0 left out" in place.run(command)
    after = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.b2nd")}
    assert {n for n in before if before[n] == after[n]} == set(before) - {"case_1.b2nd", "case_1_seg.b2nd"}
    manifest = json.loads((folder.parent / "hiendmae_manifest.json").read_text(encoding="utf-8"))
    assert manifest["cases"] == 5
    shutil.copy(images / "case_0_0000.nii.gz", images / "case_3_0000.nii.gz")  # another image under the same name
    assert "5 cases preprocessed, 0 left out" in place.run(command)
    changed = {f.name for f in folder.glob("*.b2nd") if f.stat().st_mtime_ns != after[f.name]}
    assert changed == {"case_3.b2nd", "case_3_seg.b2nd"}
    after = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.b2nd")}
    records = folder.parent / "hiendmae_cases_0.jsonl"
    lines = [line for line in records.read_text(encoding="utf-8").splitlines() if line]
    records.write_text(lines[-1] + "\n", encoding="utf-8")  # as if older records were those of a later part
    records.with_name("hiendmae_cases_1.jsonl").write_text("\n".join(lines[:-1]), encoding="utf-8")
    assert "5 cases preprocessed, 0 left out" in place.run(command)
    assert {f.name: f.stat().st_mtime_ns for f in folder.glob("*.b2nd")} == after
    (images / "case_3_0000.nii.gz").write_bytes(b"no image any more")
    place.run(command, ok=False)
    assert not (folder / "case_3.b2nd").exists()  # what was made of the old image is not trained on


def test_incomplete_cases_are_named(place: World) -> None:
    """The first case is damaged, others lack a channel, have another grid, a surplus file, or one slice."""
    images = place.root / "raw" / NAME / "imagesTr"
    description = json.loads((images.parent / "dataset.json").read_text(encoding="utf-8"))
    description["channel_names"] = {"0": "CT", "1": "CT"}
    (images.parent / "dataset.json").write_text(json.dumps(description))
    for i in (0, 1, 3, 4):
        write(ct(10 + i, (24, 32, 30 if i == 4 else 40)), images / f"case_{i}_0001.nii.gz")
    write(ct(5), images / "case_5_0001.nii.gz")
    for channel in (0, 1):
        write(ct(6 + channel, (1, 32, 40)), images / f"case_6_000{channel}.nii.gz")
    write(ct(9), images / "case_3_0002.nii.gz")
    (images / "case_0_0000.nii.gz").write_bytes(b"no image")
    command = "hiendmae_plan_and_preprocess -d 510 -spacing 3 3 3 -np 1"
    log = place.run(command, ok=False, nnUNet_n_proc_DA="0")
    assert "Traceback" not in log and "1 cases preprocessed, 6 left out" in log
    for name, reason in {
        "case_0_0000": "truncated or damaged",
        "case_2_0001": "missing: channel 1 (CT) of case case_2; add it",
        "case_3_0002": "case case_3 has more channels than the 2 of dataset.json",
        "case_4_0000": "the channels differ in size (case_4_0000.nii.gz: 40 × 32 × 24",
        "case_5_0000": "missing: channel 0 (CT) of case case_5",
        "case_6_0000": "a single slice (1 × 32 × 40 voxels)",
    }.items():
        assert f"LEFT OUT {images / name}.nii.gz: {reason}" in log


def test_no_case_is_complete(place: World) -> None:
    file = place.root / "raw" / NAME / "dataset.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**description, "channel_names": {"0": "CT", "1": "PET"}}))
    log = place.run("hiendmae_plan_and_preprocess -d 510", ok=False)
    assert (
        "No case of Dataset510_Heap has all its images" in log and "case_0_0001.nii.gz: missing: channel 1 (PET)" in log
    )
    file.write_text(json.dumps({**description, "dataset": {"a": {"images": ["imagesTr/none_0000.nii.gz"]}}}))
    log = place.run("hiendmae_plan_and_preprocess -d 510", ok=False)
    assert "imagesTr/none_0000.nii.gz: missing: channel 0 (CT) of case a" in log and "Traceback" not in log


@pytest.mark.parametrize("setting", ["nnUNet_n_proc_DA=many", "nnUNet_n_proc_DA=-1", "nnUNet_def_n_proc=0"])
def test_settings_of_nnunet_that_are_no_numbers(place: World, setting: str) -> None:
    name, value = setting.split("=")
    log = place.run("hiendmae_plan_and_preprocess -d 510", ok=False, **{name: value})
    assert log.startswith(f"The environment variable {name} is '{value}'") and len(log.splitlines()) == 1


@pytest.mark.slow
def test_parts_make_the_whole(place: World) -> None:
    log = place.run("hiendmae_plan_and_preprocess -d 510 -num_parts 2 -part_id 0", ok=False)
    assert "Plan once before the parts: the same command with --plan_only" in log
    place.run("hiendmae_plan_and_preprocess -d 510 --plan_only -spacing median -p Median -np 1")
    plans = json.loads((place.root / "preprocessed" / NAME / "Median.json").read_text(encoding="utf-8"))
    assert plans["configurations"]["3d_fullres"]["spacing"] == [3.0, 2.0, 2.0]
    for part, count in ((0, 3), (1, 2)):
        log = place.run(f"hiendmae_plan_and_preprocess -d 510 -p Median -num_parts 2 -part_id {part} -np 1")
        assert f"{count} cases preprocessed, 0 left out" in log
    assert len(volumes(place, "Median")) == 5
    manifest = json.loads((place.root / "preprocessed" / NAME / "hiendmae_manifest.json").read_text(encoding="utf-8"))
    assert manifest["cases"] == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-d 777", "777"),
        ("-d 510 -spacing 1 2", "-spacing 1 2: give three numbers"),
        ("-d 510 -spacing 0 1 1", "give three numbers"),
        ("-d 510 -spacing mean", "give three numbers"),
        ("-d 510 -num_parts 2 -part_id 2", "-part_id 2 must be 0 to 1"),
        ("-d 510 -p a__b", "'a__b' must not"),
    ],
)
def test_mistakes_get_one_line(place: World, flags: str, message: str) -> None:
    log = place.run(f"hiendmae_plan_and_preprocess {flags}", ok=False)
    assert message in log and "Traceback" not in log


@pytest.mark.slow
def test_real_scans_without_labels(tmp_path: Path) -> None:
    """Dataset500 from raw to a running pre-training in two commands; a tenth of it, for time."""
    source = shared_folder() / "data" / "Dataset500_OpenKBPUnlabelled"
    for kind in ("raw", "preprocessed", "results"):
        (tmp_path / kind).mkdir()
    raw = tmp_path / "raw" / source.name
    (raw / "imagesTr").mkdir(parents=True)
    for file in sorted((source / "imagesTr").iterdir())[::10]:
        (raw / "imagesTr" / file.name).symlink_to(file)
    shutil.copy(source / "dataset.json", raw)
    place = World(tmp_path)
    assert "13 cases preprocessed, 0 left out" in place.run("hiendmae_plan_and_preprocess -d 500 -np 2")
    log = place.run("hiendmae_pretrain -d 500 -preset tiny -device cpu -steps 4 -batch_size 2 -num_workers 1")
    assert "Encoder weights" in log


def test_the_gate_of_ingesting_holds_here_too(place: World) -> None:
    """Intercept applied twice, forgotten behind padding, zeros: left out with the reason, unless the gate is off."""
    images = place.root / "raw" / NAME / "imagesTr"
    forgotten = sitk.GetArrayFromImage(ct(0)).astype(np.int16) + 1024
    forgotten[:, :6] = -2000
    bad = {
        "case_0": (sitk.GetImageFromArray(forgotten), "rescale intercept not applied"),
        "case_1": (ct(1) - 1024, "applied twice"),
        "case_2": (ct(2) * 0, "constant volume"),
    }
    for case, (image, _) in bad.items():
        image.SetSpacing(ct(0).GetSpacing())
        write(image, images / f"{case}_0000.nii.gz")
    command = "hiendmae_plan_and_preprocess -d 510 -spacing 3 3 3 -np 1"
    log = place.run(command, ok=False)
    assert "2 cases preprocessed, 3 left out" in log and "channel 0 (CT): HUWindowNormalization, mapped" in log
    for case, (_, reason) in bad.items():
        (line,) = [line for line in log.splitlines() if f"{case}_0000" in line]
        assert line.startswith("LEFT OUT ") and reason in line
    assert "5 cases preprocessed, 0 left out" in place.run(f"{command} --no_quality_gate")
