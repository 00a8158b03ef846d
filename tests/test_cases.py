"""A run is tied to its cases: another list, or other content, is refused when it is continued."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import pytest
from conftest import DATASET, World
from processes import RUNS, ended

from pretraining.data.cases import CASES, case_marks, refuse_other_cases
from pretraining.data.corpus import DataSetInfo

VOLUMES = Path("preprocessed") / DATASET / "nnUNetPlans_3d_fullres"
SIZE = "-preset nano -device cpu -crop_size 16 16 16 -num_workers 0 -preview_epochs 0 -batch_size 2 -steps 2"


def rewrite(file: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Store a changed volume under the name of the old one."""
    values = change(blosc2.open(urlpath=str(file), mode="r")[:])
    file.unlink()
    blosc2.asarray(np.ascontiguousarray(values), urlpath=str(file))


def one_more(world: World) -> None:
    shutil.copy(world.root / VOLUMES / "phantom_001.b2nd", world.root / VOLUMES / "phantom_0011.b2nd")


def one_voxel(world: World) -> None:
    def brighter(values: np.ndarray) -> np.ndarray:
        values[0, 9, 9, 9] += 0.25
        return values

    rewrite(world.root / VOLUMES / "phantom_002.b2nd", brighter)


def swapped(world: World) -> None:
    a, b = (world.root / VOLUMES / f"phantom_00{i}.b2nd" for i in (3, 4))
    a.rename(a.with_name("aside"))
    b.rename(a)
    a.with_name("aside").rename(b)


def other_intensities(world: World) -> None:
    file = world.root / "preprocessed" / DATASET / "nnUNetPlans.json"
    plans = json.loads(file.read_text(encoding="utf-8"))
    plans["foreground_intensity_properties_per_channel"]["0"]["mean"] += 1
    file.write_text(json.dumps(plans), encoding="utf-8")


CHANGES: dict[str, tuple[Callable[[World], None], str]] = {
    "one more": (one_more, f"1 added ({DATASET}/phantom_0011)"),
    "one less": (lambda w: (w.root / VOLUMES / "phantom_005.b2nd").unlink(), f"1 removed ({DATASET}/phantom_005)"),
    "one voxel": (one_voxel, f"1 changed ({DATASET}/phantom_002)"),
    "swapped": (swapped, f"2 changed ({DATASET}/phantom_003, {DATASET}/phantom_004)"),
    "other intensities": (other_intensities, "6 changed ("),
}


@pytest.fixture(scope="module")
def started(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A finished run, on .b2nd files and packed, whose ``--c`` would train on."""
    place = World(tmp_path_factory.mktemp("cases"))
    shutil.copytree(world.root / "preprocessed", place.root / "preprocessed")
    shutil.copytree(world.root / "raw", place.root / "raw")
    place.run(f"hiendmae_pretrain -d 901 {SIZE}")
    place.run("hiendmae_pack -d 901 -o HiEndMAE_packed_cases -np 1")
    place.run(f"hiendmae_pretrain -packed HiEndMAE_packed_cases {SIZE}")
    return place


@pytest.fixture
def copy(started: World, tmp_path: Path) -> World:
    shutil.copytree(started.root, tmp_path / "copy")
    return World(tmp_path / "copy")


@pytest.mark.parametrize("what", CHANGES)
def test_other_cases_are_refused(copy: World, what: str) -> None:
    change, message = CHANGES[what]
    change(copy)
    log = ended(f"hiendmae_pretrain -d 901 {SIZE} --c", copy, 2)
    line = log.strip().splitlines()[-1]
    assert message in line and "start another run with -run NAME" in line, log


def test_the_same_cases_continue(copy: World) -> None:
    """Copied elsewhere with other dates, and without the record, as runs of earlier versions have none."""
    for file in (copy.root / VOLUMES).iterdir():
        shutil.copyfile(file, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)
    command = f"hiendmae_pretrain -d 901 {SIZE} --c"
    assert "does not record the cases" not in ended(command, copy, 0)
    record = copy.root / RUNS / "nano_901" / CASES
    before = record.read_bytes()
    record.unlink()
    assert "WARNING" in ended(command, copy, 0) and record.read_bytes() == before
    one_more(copy)
    assert "1 added" in ended(command, copy, 2)


def test_other_patients_are_refused(copy: World) -> None:
    """Who is held out follows from patients.csv: with another table, former held-out cases would be trained on."""
    command, record = f"hiendmae_pretrain -d 901 {SIZE}", copy.root / RUNS / "nano_901" / CASES
    held_out = json.loads(record.read_text(encoding="utf-8"))["held_out"]
    names = [f"phantom_00{i}" for i in range(6)]
    trained = [name for name in names if f"{DATASET}/{name}" not in held_out]
    together = [trained[0], held_out[0].split("/")[1]]
    rows = [f"{name},{'one' if name in together else name}" for name in names]
    table = copy.root / "raw" / DATASET / "patients.csv"
    table.write_text("\n".join(["case,patient", *rows, ""]), encoding="utf-8")
    assert "patients.csv in nnUNet_raw has changed" in ended(f"{command} --c", copy, 2)
    table.unlink()
    ended(f"{command} --c", copy, 0)
    record.write_text(json.dumps(json.loads(record.read_text(encoding="utf-8"))["cases"]), encoding="utf-8")
    ended(f"{command} --c", copy, 0)  # as an earlier version wrote it


def test_a_packed_corpus_that_was_packed_again(copy: World) -> None:
    one_voxel(copy)
    shutil.rmtree(copy.root / "preprocessed" / "HiEndMAE_packed_cases")
    copy.run("hiendmae_pack -d 901 -o HiEndMAE_packed_cases -np 1")
    log = ended(f"hiendmae_pretrain -packed HiEndMAE_packed_cases {SIZE} --c", copy, 2)
    assert f"1 changed ({DATASET}/phantom_002)" in log


class ManyCases:
    """As much of a corpus as its marks need."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def name(self, case: int) -> str:
        return f"{DataSetInfo('Dataset900_Many', self.number, (1.0, 1.0, 1.0)).name}/case_{case:06d}"

    def content_mark(self, case: int) -> int:
        return case

    def intensity(self, case: int) -> np.ndarray:
        return np.zeros((1, 2), np.float32)


def test_a_hundred_thousand_cases(tmp_path: Path) -> None:
    """All of them have a mark and are compared; long lists are cut short in the message."""
    started = time.process_time()
    cases = case_marks(ManyCases(100_000))  # type: ignore[arg-type]
    (tmp_path / CASES).write_text(json.dumps(dict(list(cases.items())[:-20])), encoding="utf-8")
    with pytest.raises(ValueError, match=r"20 added \(.*/case_099984 and 15 more\)"):
        refuse_other_cases(tmp_path, cases, [])
    assert len(cases) == 100_000 and time.process_time() - started < 20
    (tmp_path / CASES).write_text(json.dumps(dict(reversed(cases.items()))), encoding="utf-8")
    with pytest.raises(ValueError, match="they come in another order"):
        refuse_other_cases(tmp_path, cases, [])
