"""``hiendmae_ingest`` on a heap of real files, good and broken."""

from __future__ import annotations

import csv
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import World
from heap import ct, write, write_bad, write_dicom, write_good

from pretraining.phantom import make_phantom
from pretraining.prepare.find import Source, find_sources
from pretraining.prepare.geometry import Refused
from pretraining.prepare.provenance import excluded_cases, refuse_excluded, remove_excluded
from pretraining.prepare.quality import content_hash
from pretraining.prepare.read import read
from pretraining.prepare.report import Row, draw_sheets


@pytest.fixture
def place(tmp_path: Path) -> World:
    """Empty nnU-Net folders."""
    for kind in ("raw", "preprocessed", "results"):
        (tmp_path / kind).mkdir()
    return World(tmp_path)


def table(place: World, dataset: str = "Dataset510_Heap") -> dict[str, dict[str, str]]:
    with open(place.root / "raw" / dataset / "ingest_report.csv", newline="", encoding="utf-8") as file:
        return {row["input"]: row for row in csv.DictReader(file)}


def images(place: World, dataset: str = "Dataset510_Heap") -> list[Path]:
    return sorted((place.root / "raw" / dataset / "imagesTr").iterdir())


def test_heap_becomes_a_data_set(place: World, tmp_path: Path) -> None:
    heap = tmp_path / "heap"
    good, bad = write_good(heap), write_bad(heap)
    before = sorted(heap.rglob("*"))
    log = place.run(f"hiendmae_ingest -i {heap} -d 510 -n Heap -np 2", ok=False)  # exit 1: not all went in
    assert sorted(heap.rglob("*")) == before and "Traceback" not in log and "Warning" not in log
    rows = table(place)
    assert {name for name, row in rows.items() if row["status"] == "accepted"} == good
    for name, reason in bad.items():
        assert rows[name]["status"] == "refused" and reason in rows[name]["reason"], rows[name]
        assert sum(line.startswith(f"REFUSED {name}: ") for line in log.splitlines()) == 1
    assert set(rows) == good | set(bad)
    assert f"{len(good)} accepted, {len(bad)} refused" in log
    assert len(images(place)) == len(good)
    assert any(os.path.samefile(file, heap / "plain.nii.gz") for file in images(place))  # linked, not copied
    dicom = sitk.ReadImage(str(place.root / "raw/Dataset510_Heap/imagesTr" / f"{rows['dicom']['case']}_0000.nii.gz"))
    assert np.abs(sitk.GetArrayFromImage(dicom) - sitk.GetArrayFromImage(ct(6))).max() <= 1  # slope 2 rounds
    assert dicom.GetSpacing() == (2.0, 2.0, 3.0)
    sheets = sorted(p.name for p in (place.root / "raw/Dataset510_Heap/ingest_thumbnails").glob("*.png"))
    assert sheets == ["accepted_000.png", "refused_000.png"]

    again = place.run(f"hiendmae_ingest -i {heap} -d 510 -n Heap", ok=False)
    assert "REFUSED" not in again and f"{len(good)} accepted, {len(bad)} refused" in again  # nothing is looked at twice
    assert table(place) == rows

    write(ct(20), heap / "truncated.nii.gz")  # repaired
    log = place.run(f"hiendmae_ingest -i {heap} -d 510 -n Heap", ok=False)
    assert f"{len(good) + 1} accepted, {len(bad) - 1} refused" in log


def test_test_scans_do_not_leak(place: World, tmp_path: Path) -> None:
    write(ct(1), place.root / "raw/Dataset017_Task/imagesTs/case_0000.nii.gz")
    write(ct(1), tmp_path / "heap" / "copy.nrrd")
    write(ct(2), tmp_path / "heap" / "new.nrrd")
    log = place.run(f"hiendmae_ingest -i {tmp_path / 'heap'} -d 510 -n Heap --exclude_overlap 17", ok=False)
    assert "REFUSED copy.nrrd: patient to keep out: duplicate of Dataset017_Task/imagesTs/case_0000.nii.gz" in log
    assert "1 accepted, 1 refused" in log


def patient(seed: int, file: Path, change: Callable[[np.ndarray], np.ndarray] = lambda v: v) -> Path:
    """A phantom's scan, changed as an array."""
    image = sitk.GetImageFromArray(change(make_phantom(np.random.default_rng(seed))[0].astype(np.int16)))
    image.SetSpacing((4.0, 4.0, 5.0))
    return write(image, file)


def test_exclusions_hold_in_every_order(place: World, tmp_path: Path) -> None:
    """Accepted before the exclusion or after it, by another call that does not name it; preprocessed already."""
    heap, command = tmp_path / "heap", f"hiendmae_ingest -i {tmp_path / 'heap'} -d 510 -n Heap -np 1"
    patient(0, place.root / "raw/Dataset017_Task/imagesTs/case_0000.nii.gz", lambda v: v[:-1])
    for seed in (0, 1):
        patient(seed, heap / f"{seed}.nii.gz")
    place.run(command)
    case = table(place)["0.nii.gz"]["case"]
    volume = place.root / f"preprocessed/Dataset510_Heap/HiEndMAEPlans_3d_fullres/{case}.b2nd"
    volume.parent.mkdir(parents=True)
    volume.touch()
    log = place.run(f"{command} --exclude_overlap 17", ok=False)
    assert "REFUSED 0.nii.gz: patient to keep out: same patient as Dataset017_Task/imagesTs/case_0000.nii.gz" in log
    assert f"preprocessed already and will not be trained on: {case}" in log and "1 accepted, 1 refused" in log
    assert [file.name for file in (place.root / "raw/Dataset510_Heap/imagesExcluded").iterdir()] == [
        f"{case}_0000.nii.gz"
    ]
    assert len(images(place)) == 1 and table(place)["1.nii.gz"]["compared_with"] == "Dataset017_Task"
    assert excluded_cases(volume.parent.parent) == {case}

    shutil.rmtree(place.root / "raw/Dataset017_Task")  # what was noted of it stays
    patient(0, heap / "later.nii.gz", lambda v: v[:, ::-1])
    log = place.run(command, ok=False)
    assert "REFUSED later.nii.gz: patient to keep out: same patient as Dataset017_Task" in log
    with pytest.raises(ValueError, match=f"refuses by now {case}, but the data hold them still"):
        refuse_in(place, case)
    remove_excluded(volume.parent)
    assert not volume.exists()


def refuse_in(place: World, case: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_preprocessed", str(place.root / "preprocessed"))
        refuse_excluded("Dataset510_Heap", [case, "other"], "")


def test_scans_of_one_patient_may_be_told(place: World, tmp_path: Path) -> None:
    """Refused as long as nobody says that both are wanted; excluded together."""
    heap, command = tmp_path / "heap", f"hiendmae_ingest -i {tmp_path / 'heap'} -d 510 -n Heap -np 1"
    patient(0, heap / "phase_1.nii.gz")
    patient(0, heap / "phase_2.nii.gz", lambda v: v[2:] + 5)
    patient(1, heap / "date_2.nii.gz")
    log = place.run(command, ok=False)
    assert "REFUSED phase_2.nii.gz: same patient as phase_1.nii.gz; if both are to go in" in log
    rows = table(place)
    lines = [f"{row['case']},P7\n" for row in rows.values()]
    (place.root / "raw/Dataset510_Heap/patients.csv").write_text("case,patient\n" + "".join(lines))
    assert "3 accepted, 0 refused" in place.run(command)
    patient(0, place.root / "raw/Dataset017_Task/imagesTr/case_0000.nii.gz")
    log = place.run(f"{command} --exclude_overlap 17", ok=False)
    assert "0 accepted, 3 refused" in log and "REFUSED date_2.nii.gz: patient to keep out: another scan of P7" in log


def test_duplicates_are_found_across_data_sets(place: World, tmp_path: Path) -> None:
    for number, cases in ((510, (1, 2)), (511, (2, 3))):
        heap = tmp_path / f"heap{number}"
        for case in cases:
            write(ct(case), heap / f"scan_{case}.nii.gz")
        log = place.run(f"hiendmae_ingest -i {heap} -d {number} -n Heap -np 1", ok=number == 510)
    first = table(place)["scan_2.nii.gz"]["case"]
    assert f"REFUSED scan_2.nii.gz: duplicate of Dataset510_Heap/{first}" in log and "1 accepted, 1 refused" in log
    assert table(place)["scan_2.nii.gz"]["status"] == "accepted"  # the other report is as it was


def test_gate_can_be_turned_off(place: World, tmp_path: Path) -> None:
    write(ct(1) + 1024, tmp_path / "heap" / "offset.nii.gz")
    place.run(f"hiendmae_ingest -i {tmp_path / 'heap'} -d 510 -n Heap", ok=False)
    log = place.run(f"hiendmae_ingest -i {tmp_path / 'heap'} -d 511 -n Any --no_quality_gate")
    assert "1 accepted, 0 refused" in log


def test_slices_that_are_there_twice_are_taken_once(tmp_path: Path) -> None:
    write_dicom(ct(1), tmp_path / "heap", "1.2.826.0.1.3680043.2.1125.8001")
    for file in sorted((tmp_path / "heap").iterdir())[:5]:
        shutil.copy(file, file.with_name(f"copy_{file.name}"))
    (source,) = find_sources(tmp_path / "heap")
    np.testing.assert_allclose(sitk.GetArrayFromImage(read(source)), sitk.GetArrayFromImage(ct(1)), atol=1)


def test_unreadable_files_are_told(tmp_path: Path) -> None:
    """A dangling link, and a file of somebody else; root may read anything, so it is read as another user."""
    (tmp_path / "gone.nii.gz").symlink_to(tmp_path / "nowhere")
    (source,) = find_sources(tmp_path)
    with pytest.raises(Refused, match="No such file"):
        read(source)
    secret = write(ct(1), tmp_path / "secret.mha")
    secret.chmod(0)
    me = os.geteuid()
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):
        folder.chmod(folder.stat().st_mode | 0o055)
    if me == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(Refused, match="permission denied"):
            read(Source("secret.mha", (str(secret),)))
    finally:
        os.seteuid(me)


def test_hash_does_not_depend_on_the_format(tmp_path: Path) -> None:
    hashes = set()
    for name in ("a.nii.gz", "a.nrrd", "a.mha", "a.nii"):
        image = ct(1) if name != "a.nrrd" else sitk.Cast(ct(1), sitk.sitkFloat32)
        hashes.add(content_hash(sitk.GetArrayFromImage(sitk.ReadImage(str(write(image, tmp_path / name))))))
    assert len(hashes) == 1 and content_hash(sitk.GetArrayFromImage(ct(2))) not in hashes


def test_ctrl_c_then_the_same_command(place: World, tmp_path: Path) -> None:
    for i in range(40):
        write(ct(i, (40, 96, 96)), tmp_path / "heap" / f"{i}.mha")
    command = f"hiendmae_ingest -i {tmp_path / 'heap'} -d 510 -n Heap -np 1"
    words = [str(Path(sys.executable).with_name("hiendmae_ingest")), *command.split()[1:]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    process = subprocess.Popen(words, env=place.env, start_new_session=True, **pipes)
    report = place.root / "raw/Dataset510_Heap/ingest_report.csv"
    while not report.is_file() or report.read_text("utf-8").count("accepted") < 2:
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.strip().endswith(
        "interrupted; what was accepted is kept, the same command goes on"
    )
    kept = {name: row for name, row in table(place).items() if row["status"] == "accepted"}
    assert 2 <= len(kept) < 40
    assert "40 accepted, 0 refused" in place.run(command)
    assert {name: table(place)[name] for name in kept} == kept and len(images(place)) == 40


def test_full_disk_keeps_what_is_there(place: World, tmp_path: Path) -> None:
    raw = place.root / "raw"
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(raw)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system")
    try:
        for i in range(12):
            write(ct(i, (40, 64, 64)), tmp_path / "heap" / f"{i:02d}.mha")
        log = place.run(f"hiendmae_ingest -i {tmp_path / 'heap'} -d 510 -n Heap -np 1", ok=False)
        assert "Traceback" not in log and "what was accepted is kept" in log, log
        assert all(sitk.ReadImage(str(file)).GetSize() == (64, 64, 40) for file in images(place))
        subprocess.run(["mount", "-o", "remount,size=64m", str(raw)], check=True)
        assert "12 accepted, 0 refused" in place.run(f"hiendmae_ingest -i {tmp_path / 'heap'} -d 510 -n Heap -np 1")
    finally:
        subprocess.run(["umount", str(raw)], check=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-i /nowhere -d 510 -n Heap", "-i /nowhere is no folder"),
        ("-i . -d 0 -n Heap", "-d 0 must be 1…999"),
        ("-i . -d 510 -n two__parts", "'two__parts'"),
        ("-i . -d 510 -n Heap -np 0", "-np 0 must be an integer of at least 1"),
        ("-i . -d 510 -n Heap --exclude_overlap 888", "888"),
        ("-i . -d 17 -n Heap", "-d 17 is taken by Dataset017_Task"),
    ],
)
def test_mistakes_get_one_line(place: World, flags: str, message: str) -> None:
    (place.root / "raw" / "Dataset017_Task").mkdir()
    log = place.run(f"hiendmae_ingest {flags}", ok=False)
    assert message in log and "Traceback" not in log


def test_what_readers_turn_into_zero_is_refused(place: World, tmp_path: Path) -> None:
    """NaN and infinity in NIfTI, packed or not, in each byte order; the same volume without them is accepted."""
    heap = tmp_path / "heap"
    voxels = sitk.GetArrayFromImage(ct(1)).astype(np.float32)
    for name, value in (("sound", 40.0), ("nan", np.nan), ("infinite", -np.inf)):
        voxels[3, 4, 5] = value
        image = nibabel.Nifti1Image(voxels.T.copy(), np.diag([2.0, 2.0, 3.0, 1.0]))
        heap.mkdir(exist_ok=True)
        nibabel.save(image, heap / f"{name}.nii.gz")
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels.T.copy(), np.diag([2.0, 2.0, 3.0, 1.0]), header), heap / "big.nii")
    place.run(f"hiendmae_ingest -i {heap} -d 510 -n Heap -np 1", ok=False)
    rows = table(place)
    assert rows["sound.nii.gz"]["status"] == "accepted"
    for name in ("nan.nii.gz", "infinite.nii.gz", "big.nii"):
        assert rows[name]["reason"].startswith("NaN or infinite voxels"), rows[name]


def test_no_part_of_a_heap_is_passed_over(tmp_path: Path) -> None:
    """Linked folders once each, also in a ring; folders nobody may read; voxels without a header."""
    heap, elsewhere = tmp_path / "heap", tmp_path / "elsewhere"
    write(ct(1), heap / "a.nii.gz")
    write(ct(2), elsewhere / "b.mha")
    write(ct(3), heap / "pair" / "c.mhd")
    (heap / "site").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(heap)
    (heap / "d.img").write_bytes(b"voxels")
    (heap / "lost.raw").write_bytes(b"voxels")
    assert [source.name for source in find_sources(heap)] == [
        "a.nii.gz",
        "d.img",
        "lost.raw",
        "pair/c.mhd",
        "site/b.mha",
    ]
    (heap / "closed").mkdir(mode=0)
    if os.access(heap / "closed", os.R_OK):
        pytest.skip("this user may read everything")
    assert [source.name for source in find_sources(heap)][-1] == "closed"


def test_a_folder_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a network storage that went away; root may read what others may not."""

    def gone(path: str) -> list[str]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "listdir", gone)
    with pytest.raises(Refused, match=os.strerror(errno.ESTALE)):
        read(Source("closed", (str(tmp_path / "closed"),)))


def test_another_heap_does_not_replace_the_first(place: World, tmp_path: Path) -> None:
    """Case names follow from paths below -i; the same heap by another path is the same."""
    for seed, site in enumerate("ab"):
        patient(seed, tmp_path / site / "001.nii.gz")
    place.run(f"hiendmae_ingest -i {tmp_path / 'a'} -d 510 -n Heap -np 1")
    log = place.run(f"hiendmae_ingest -i {tmp_path / 'b'} -d 510 -n Heap -np 1", ok=False)
    assert f"was made from {tmp_path / 'a'}" in log and len(images(place)) == 1
    (tmp_path / "again").symlink_to(tmp_path / "a")
    before = table(place)
    place.run(f"hiendmae_ingest -i {tmp_path / 'again'} -d 510 -n Heap -np 1")
    assert table(place) == before
    (tmp_path / "empty").mkdir()
    assert "holds no files" in place.run(f"hiendmae_ingest -i {tmp_path / 'empty'} -d 511 -n Empty -np 1", ok=False)
    assert "1 accepted" in place.run(f"hiendmae_ingest -i {tmp_path / 'b'} -d 511 -n Empty -np 1 --no_quality_gate")


def test_every_channel_is_kept_out(place: World, tmp_path: Path) -> None:
    """Phases of a scan, and the CT of PET/CT, are channels of a test case."""
    patient(0, place.root / "raw/Dataset017_Task/imagesTs/case_0000.nii.gz")
    patient(1, place.root / "raw/Dataset017_Task/imagesTs/case_0001.nii.gz")
    patient(1, tmp_path / "heap" / "copy.nii.gz")
    log = place.run(f"hiendmae_ingest -i {tmp_path / 'heap'} -d 510 -n Heap --exclude_overlap 17 -np 1", ok=False)
    assert "0 accepted, 1 refused" in log and "Dataset017_Task/imagesTs/case_0001.nii.gz" in log


def test_scans_that_change_their_names(place: World, tmp_path: Path) -> None:
    """A new scan in front of the others, which are numbered anew, is no duplicate; one that is spoilt goes."""
    heap, command = tmp_path / "heap", f"hiendmae_ingest -i {tmp_path / 'heap'} -d 510 -n Heap -np 1"
    for seed in (1, 2):
        patient(seed, heap / f"00{seed}.nii.gz")
    place.run(command)
    case = table(place)["002.nii.gz"]["case"]
    volume = place.root / f"preprocessed/Dataset510_Heap/HiEndMAEPlans_3d_fullres/{case}.b2nd"
    volume.parent.mkdir(parents=True)
    volume.touch()
    for number, seed in enumerate((7, 1, 2), 1):
        patient(seed, heap / f"00{number}.nii.gz")
    assert "3 accepted, 0 refused" in place.run(command)
    (heap / "002.nii.gz").write_bytes(b"spoilt")
    assert "2 accepted, 1 refused" in place.run(command, ok=False) and len(images(place)) == 2
    assert excluded_cases(volume.parent.parent) == {case}
    patient(1, heap / "002.nii.gz")
    assert "3 accepted, 0 refused" in place.run(command) and excluded_cases(volume.parent.parent) == set()


def test_sheets_before_the_first_change_stay(tmp_path: Path) -> None:
    rows = [Row(input=f"{i:03d}", status="accepted") for i in range(100)]
    draw_sheets(rows, tmp_path, "accepted", ["000"])
    times = [file.stat().st_mtime_ns for file in sorted(tmp_path.glob("*.png"))]
    draw_sheets(rows, tmp_path, "accepted", [])
    assert [file.stat().st_mtime_ns for file in sorted(tmp_path.glob("*.png"))] == times and len(times) == 3
    (tmp_path / "accepted_000.png").unlink()
    draw_sheets(rows[:90], tmp_path, "accepted", ["060"])
    after = [file.stat().st_mtime_ns for file in sorted(tmp_path.glob("*.png"))]
    assert len(after) == 2 and after[0] != times[0] and after[1] != times[1]
    draw_sheets([*rows[:90], replace(rows[95], reason="new")], tmp_path, "accepted", ["095"])
    assert sorted(tmp_path.glob("*.png"))[0].stat().st_mtime_ns == after[0]
