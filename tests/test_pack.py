"""Packed corpora: what they hold, that packing can be interrupted, and that damage is found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import DATASET, World

from pretraining.data.b2nd import DataSet, PreprocessedCorpus
from pretraining.data.corpus import BODY_CELL, canonical_volume
from pretraining.data.pack import begin_or_continue, mark_of, pack_shard, save_index, write_index
from pretraining.data.packed import PackedCorpus, dequantisation, quantise

WINDOW = (-175.0, 250.0)


@pytest.fixture
def source(world: World, monkeypatch: pytest.MonkeyPatch) -> PreprocessedCorpus:
    for kind in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(world.root / kind))
    return PreprocessedCorpus([DataSet.open("901", "nnUNetPlans", "3d_fullres", WINDOW)])


@pytest.mark.parametrize("bits", [8, 16])
def test_quantisation_error_is_half_a_step(bits: int) -> None:
    canonical = np.linspace(0, 1, 10_001, dtype=np.float32)
    scale, shift = dequantisation(bits)
    back = quantise(canonical, bits).astype(np.float64) * scale + shift
    assert np.abs(back - canonical).max() <= 0.5 / (2**bits - 1) + 1e-7
    assert back[0] == pytest.approx(0, abs=1e-12) and back[-1] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("bits", [8, 16])
def test_packed_equals_preprocessed(world: World, source: PreprocessedCorpus, tmp_path: Path, bits: int) -> None:
    log = world.run(f"hiendmae_pack -d 901 -o {tmp_path / 'packed'} -bits {bits} -np 2")
    assert "6 cases of" in log and f"{bits} bits a voxel" in log
    packed = PackedCorpus(tmp_path / "packed")
    assert len(packed) == len(source) and packed.datasets == source.datasets and packed.window == WINDOW
    for case in range(len(source)):
        assert packed.name(case) == source.name(case) and packed.shape(case) == source.shape(case)
        np.testing.assert_array_equal(packed.body_cells(case), source.body_cells(case))
        start, size = (-3, 2, 5), tuple(n + 1 for n in source.shape(case))
        expected, found = (canonical_volume(c.read(case, start, size), c.intensity(case)) for c in (source, packed))
        np.testing.assert_allclose(found, expected, atol=0.5 / (2**bits - 1) + 1e-6)
        cells = packed.body_cells(case)
        assert len(cells) and (cells >= 0).all() and (cells * BODY_CELL < packed.shape(case)).all()


@pytest.mark.slow
def test_a_packed_corpus_trains(world: World, source: PreprocessedCorpus) -> None:
    world.run("hiendmae_pack -d 901")
    flags = "-preset tiny -device cpu -steps 2 -batch_size 2 -crop_size 24 32 40 -num_workers 1"
    log = world.run(f"hiendmae_pretrain -packed HiEndMAE_packed_901 {flags}")
    assert "Encoder weights" in log
    run = world.root / "results" / DATASET / "HiEndMAE__packed__HiEndMAE_packed_901" / "tiny_901"
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert config["packed_bits"] == 8 and config["datasets"] == [DATASET]
    log = world.run(f"hiendmae_pretrain -packed HiEndMAE_packed_901 {flags} -window_hu -200 300 -run other", ok=False)
    assert "-window_hu was settled when HiEndMAE_packed_901 was packed" in log


def test_damage_is_found(world: World, source: PreprocessedCorpus, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    world.run(f"hiendmae_pack -d 901 -o {folder}")
    assert "6 cases checked, 0 damaged" in world.run(f"hiendmae_pack -o {folder} --verify")
    voxels = folder / "shard_00000.voxels"
    content = bytearray(voxels.read_bytes())
    content[len(content) // 2] ^= 1
    voxels.write_bytes(content)
    log = world.run(f"hiendmae_pack -o {folder} --verify", ok=False)
    assert "DAMAGED: Dataset901_TestPhantom/" in log and "6 cases checked, 1 damaged" in log
    voxels.write_bytes(content[: len(content) // 2])
    assert "DAMAGED" in world.run(f"hiendmae_pack -o {folder} --verify", ok=False)
    (folder / "index.npz").write_bytes(b"")
    log = world.run(f"hiendmae_pack -o {folder} --verify", ok=False)
    assert "index" in log and "cannot be read" in log and "Traceback" not in log


def test_a_bad_case_is_left_out_and_told(world: World, source: PreprocessedCorpus, tmp_path: Path) -> None:
    preprocessed = tmp_path / "preprocessed"
    shutil.copytree(world.root / "preprocessed" / DATASET, preprocessed / DATASET)
    volume = next((preprocessed / DATASET / "nnUNetPlans_3d_fullres").glob("*_003.b2nd"))
    volume.write_bytes(volume.read_bytes()[:100])
    command = "hiendmae_pack -d 901 -o packed -np 1"
    log = world.run(command, ok=False, nnUNet_preprocessed=str(preprocessed))
    assert f"LEFT OUT: Cannot read {volume}" in log and "5 cases of" in log
    shutil.copy(world.root / "preprocessed" / DATASET / "nnUNetPlans_3d_fullres" / volume.name, volume)
    assert "6 cases of" in world.run(command, nnUNet_preprocessed=str(preprocessed))  # repaired, the same command
    packed = preprocessed / "packed"
    before = PackedCorpus(packed).content_mark(3)
    shutil.copy(volume.with_name(volume.name.replace("003", "002")), volume)  # preprocessed anew from another image
    world.run(command, nnUNet_preprocessed=str(preprocessed))
    assert PackedCorpus(packed).content_mark(3) != before == before and PackedCorpus(packed).content_mark(2) == (
        PackedCorpus(packed).content_mark(3)
    )


def test_interrupted_packing_goes_on(source: PreprocessedCorpus, world: World, tmp_path: Path) -> None:
    """Shards that are finished stay as they are, an unfinished one is written anew."""
    begin_or_continue(source, tmp_path, 8)
    parts = (range(4), range(4, 6))
    marks = [[mark_of(source, case) for case in cases] for cases in parts]
    pack_shard(source.subset(parts[0]), tmp_path, 8, 0, marks[0])
    before = (tmp_path / "shard_00000.voxels").stat().st_mtime_ns
    (tmp_path / "shard_00001.voxels.tmp").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"holds no finished packed corpus"):
        PackedCorpus(tmp_path)
    for shard, cases in enumerate(parts):
        pack_shard(source.subset(cases), tmp_path, 8, shard, marks[shard])
    write_index(source, tmp_path, 8, 2)
    assert (tmp_path / "shard_00000.voxels").stat().st_mtime_ns == before
    packed = PackedCorpus(tmp_path)
    assert [packed.name(i) for i in range(6)] == [source.name(i) for i in range(6)]
    np.testing.assert_array_equal(packed.body_cells(5), source.body_cells(5))
    with pytest.raises(ValueError, match=r"begun with other settings \(bits: 8 → 16\)"):
        begin_or_continue(source, tmp_path, 16)


def test_ctrl_c_then_the_same_command(world: World, tmp_path: Path) -> None:
    words = [str(Path(sys.executable).with_name("hiendmae_pack")), "-d", "901", "-o", str(tmp_path / "p"), "-np", "1"]
    process = subprocess.Popen(words, env=world.env, stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True)
    while not (tmp_path / "p" / "pack.json").is_file():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode in (0, 130), error  # 0: it was faster than the signal
    assert process.returncode == 0 or "the same command goes on with the others\n" in error
    world.run(f"hiendmae_pack -d 901 -o {tmp_path / 'p'} -np 1")
    assert len(PackedCorpus(tmp_path / "p")) == 6


START_UP = """
import resource, sys, time
from pathlib import Path
from pretraining.data.packed import PackedCorpus
from pretraining.data.stream import split_cases
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
corpus = PackedCorpus(Path(sys.argv[1]))
train, held_out = split_cases(corpus, 41)
print(len(corpus), corpus.name(99_999), time.perf_counter() - started,
      (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_start_up_with_100_000_cases(tmp_path: Path) -> None:
    """The index alone: seconds and MiB that opening it adds to the process."""
    entries = [
        {"name": f"case_{i:06d}", "dataset": i % 2, "shape": [200, 237, 237],
         "crc32": i, "shard": i // 64, "voxel_start": (i % 64) * 11_233_800, "body_start": 0, "body_count": 9}
        for i in range(100_000)
    ]  # fmt: skip
    datasets = [{"name": f"Dataset{n}_X", "num_cases": 50_000, "spacing": [1.5] * 3, "air": [0]} for n in (1, 2)]
    save_index(tmp_path, {"version": 1, "bits": 8, "window_hu": [-175, 250], "in_channels": 1, "datasets": datasets}, entries)  # fmt: skip # noqa: E501
    words = [sys.executable, "-c", START_UP, str(tmp_path)]
    count, name, seconds, mebibytes = subprocess.check_output(words, encoding="utf-8").split()
    assert (count, name) == ("100000", "Dataset2_X/case_099999")
    assert float(seconds) < 5 and float(mebibytes) < 500
