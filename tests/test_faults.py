"""What goes wrong on real machines, provoked for real: README.md beside it has the table."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from conftest import DATASET, World
from processes import ENDLESS, RUNS, SMALL, descendants, ended, start, wait_for

SHORT = f"hiendmae_pretrain -d 901 {SMALL} -steps 2 -batch_size 2 -val_every 1"
VOLUMES = "nnUNetPlans_3d_fullres"


@pytest.fixture
def copy(world: World, tmp_path: Path) -> World:
    """The preprocessed phantoms, to be damaged, with results of their own."""
    skip = shutil.ignore_patterns("*_body_*", "HiEndMAE_packed_*")
    shutil.copytree(world.root / "preprocessed", tmp_path / "preprocessed", ignore=skip)
    shutil.copytree(world.root / "raw", tmp_path / "raw")
    (tmp_path / "results").mkdir()
    return World(tmp_path)


def volumes(world: World) -> list[Path]:
    """The image volumes of the data set."""
    folder = world.root / "preprocessed" / DATASET / VOLUMES
    return sorted(p for p in folder.glob("*.b2nd") if not p.stem.endswith("_seg"))


def rewrite(file: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Store a changed volume under the name of the old one."""
    values = change(blosc2.open(urlpath=str(file), mode="r")[:])
    file.unlink()
    blosc2.asarray(np.ascontiguousarray(values, np.float32), urlpath=str(file))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that nobody may write to, root included."""
    if os.geteuid():
        subprocess.run(["chmod", "-R", "a-w", str(folder)], check=True)
        yield
        subprocess.run(["chmod", "-R", "u+w", str(folder)], check=True)
        return
    if subprocess.run(["mount", "--bind", str(folder), str(folder)], check=False, capture_output=True).returncode:
        pytest.skip("no permission to mount a folder read-only")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# Processes


def test_a_killed_loader_process_ends_the_run(world: World) -> None:
    process = start(world, f"{ENDLESS} -run loader")
    wait_for(process, "step 10/")  # so the checkpoint of step 5 is there
    for worker in descendants(process.pid):
        os.kill(worker, signal.SIGKILL)
    log, _ = process.communicate(timeout=60)
    assert process.returncode == 1, log
    told = log.strip().splitlines()[-1]
    assert "is killed by signal" in told or "exited unexpectedly" in told or "a process was lost" in told
    assert told.endswith("; --c continues from the last checkpoint")
    assert (world.root / RUNS / "loader" / "checkpoint_latest.pth").is_file()


def test_two_runs_in_one_folder(world: World) -> None:
    process = start(world, f"{ENDLESS} -run one")
    wait_for(process, "run folder")
    time.sleep(3)  # before its first checkpoint
    log = ended(f"{ENDLESS} -run one", world, 2)
    assert "Another process is at work in" in log or "holds a run already" in log
    wait_for(process, "step 5/")
    before = (world.root / RUNS / "one" / "config.json").read_bytes()
    log = ended(f"{ENDLESS} -run one --c", world, 2)
    assert "Another process is at work in" in log and "choose another -run" in log
    process.send_signal(signal.SIGTERM)
    log, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "checkpoint written" in log
    assert (world.root / RUNS / "one" / "config.json").read_bytes() == before


def test_sigterm_while_a_checkpoint_is_written(world: World) -> None:
    """Every signal meets the writing of a checkpoint; the checkpoint is whole, nothing half-written is left."""
    folder = world.root / RUNS / "term"
    process = start(world, f"{ENDLESS} -run term -val_every 1".replace("-val_every 5", ""))
    deadline = time.monotonic() + 60
    while not list(folder.glob("checkpoint_new.pth*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    log, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "checkpoint written" in log, log
    assert torch.load(folder / "checkpoint_latest.pth", weights_only=True)["step"] >= 1
    assert not list(folder.glob("*.tmp")) and not (folder / "checkpoint_new.pth").exists()


BACKWARDS = """
import itertools, sys, time
now = itertools.count(2e9, -3600)
time.time = lambda: next(now)
import pretraining.commands.pretrain as cli
cli.main()
"""


@pytest.mark.slow
def test_a_clock_that_goes_backwards(world: World) -> None:
    """An hour back at each look, and files dated in disorder: the newest checkpoint is found by its name."""
    flags = f"-d 901 {SMALL} -steps 4 -batch_size 2 -val_every 1 -run back".split()
    done = subprocess.run(
        [sys.executable, "-c", BACKWARDS, *flags], env=world.env, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0 and "Encoder weights" in done.stdout, done.stderr
    process = start(world, f"{ENDLESS} -run disorder")
    wait_for(process, "step 5/")
    wait_for(process, "step 10/")
    process.send_signal(signal.SIGTERM)
    log, _ = process.communicate(timeout=60)
    step = int(log.split("Stopped after step ")[1].split(";")[0])
    folder = world.root / RUNS / "disorder"
    os.utime(folder / "checkpoint_latest.pth", (0, 0))
    os.utime(folder / "checkpoint_older_1.pth", (2e9, 2e9))
    process = start(world, f"{ENDLESS} -run disorder --c")
    wait_for(process, f"step {5 * (step // 5 + 1)}/")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0


# Disks


PICTURE = "previews/step_00000002.tmp.png"


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("metrics.jsonl", "-log_every 1"),
        pytest.param(PICTURE, "-preview_epochs 1 -crops_per_case 1", marks=pytest.mark.slow, id="picture"),
    ],
)
def test_full_disk_while_logging(world: World, name: str, flags: str) -> None:
    """The file of the log, then of a picture, takes no bytes any more."""
    run = Path(name).parts[0].split(".")[0]
    folder = world.root / RUNS / run
    process = start(world, f"{ENDLESS} -run {run} {flags}".replace("-val_every 5", "-val_every 1"))
    if name.startswith("previews"):
        (folder / "previews").mkdir(parents=True)
        (folder / name).symlink_to("/dev/full")
    else:
        wait_for(process, "step 1/")
        (folder / "full").symlink_to("/dev/full")
        os.replace(folder / "full", folder / name)
    log, _ = process.communicate(timeout=90)
    assert process.returncode == 1 and "Traceback" not in log, log
    assert "No space left" in log and "--c continues from the last checkpoint" in log
    assert torch.load(folder / "checkpoint_latest.pth", weights_only=True)["step"] >= 1


def small_files() -> None:
    """No file may grow beyond 100 kB, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_full_disk_while_packing(copy: World) -> None:
    log = ended("hiendmae_pack -d 901 -np 1 -bits 16 -o packed", copy, 1, small_files)
    assert "File too large" in log and "the same command goes on" in log
    packed = copy.root / "preprocessed" / "packed"
    assert not (packed / "index.json").exists() and not list(packed.glob("*.tmp"))
    assert "6 cases of" in ended("hiendmae_pack -d 901 -np 1 -bits 16 -o packed", copy, 0)


@pytest.mark.slow
def test_read_only_data(copy: World) -> None:
    """Body maps are then kept in memory."""
    with read_only(copy.root / "preprocessed"):
        assert "Encoder weights" in ended(SHORT, copy, 0)
    assert not list((copy.root / "preprocessed" / DATASET).glob("*_body_*"))


def test_results_that_cannot_be_written(copy: World) -> None:
    with read_only(copy.root / "results"):
        log = ended(SHORT, copy, 2)
    assert str(copy.root / "results") in log and len(log.strip().splitlines()) == 1


# Files


@pytest.mark.parametrize(
    ("name", "content", "command", "message"),
    [
        ("preprocessed/{d}/nnUNetPlans.json", "{", SHORT, "nnUNetPlans.json cannot be read as JSON"),
        ("preprocessed/{d}/nnUNetPlans.json", "[]", SHORT, "nnUNetPlans.json holds no nnU-Net plans"),
        ("preprocessed/{d}/nnUNetPlans.json", "{", "hiendmae_plan -d 901", "nnUNetPlans.json cannot be read as JSON"),
        ("preprocessed/{d}/nnUNetPlans.json", None, "hiendmae_pack -d 901", "nnUNetPlans.json does not exist"),
        ("raw/{d}/dataset.json", "{", "hiendmae_plan_and_preprocess -d 901", "dataset.json cannot be read as JSON"),
        ("raw/{d}/dataset.json", "{}", "hiendmae_plan_and_preprocess -d 901", "lacks channel_names and file_ending"),
        ("raw/{d}/dataset.json", None, "hiendmae_plan_and_preprocess -d 901", "dataset.json does not exist"),
        ("preprocessed/{d}/splits_final.json", "{", "hiendmae_benchmark plan -o {o} -d 901 -labels 1 -arms nnunet",
         "splits_final.json cannot be read as JSON"),
    ],
)  # fmt: skip
def test_damaged_descriptions_are_named(
    copy: World, name: str, content: str | None, command: str, message: str
) -> None:
    file = copy.root / name.format(d=DATASET)
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_text(content, encoding="utf-8")
    log = ended(command.format(o=copy.root / "bench"), copy, 2)
    assert message in log and str(file) in log


@pytest.mark.slow
def test_a_missing_volume_is_one_case_less(copy: World) -> None:
    volumes(copy)[0].unlink()
    assert "5 cases of" in ended(SHORT, copy, 0)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["empty", "folder", "text"])
def test_a_volume_that_is_none(copy: World, damage: str) -> None:
    for file in volumes(copy):
        file.unlink()
        if damage == "folder":
            file.mkdir()
        else:
            file.write_text("" if damage == "empty" else "not a volume", encoding="utf-8")
    log = ended(SHORT, copy, 2)
    assert "Cannot read" in log and ".b2nd" in log and "Preprocess this case again" in log


# Voxels


def test_nan_voxels_are_found(copy: World) -> None:
    for file in volumes(copy):
        rewrite(file, lambda v: np.where(np.arange(v.shape[-1]) % 8 == 3, np.nan, v))
    log = ended(SHORT, copy, 1)
    assert "The loss is not finite at step 1" in log and f"{DATASET}/phantom_" in log


@pytest.mark.slow
def test_constant_volumes_train(copy: World) -> None:
    """Nothing to learn, and nothing that breaks: every target is 0."""
    for file in volumes(copy):
        rewrite(file, np.zeros_like)
    log = ended(SHORT, copy, 0)
    assert "predicting each patch's mean: 0.0000" in log and "nan" not in log


@pytest.mark.slow
@pytest.mark.parametrize("value", [-32768.0, 32767.0])
def test_extreme_intensities_train(copy: World, value: float) -> None:
    """Metal and padding: the window clips them."""
    for file in volumes(copy):
        rewrite(file, lambda v: np.where(np.arange(v.shape[-1]) % 5 == 0, value, v))
    log = ended(SHORT, copy, 0)
    assert "Encoder weights" in log and "nan" not in log


@pytest.mark.slow
def test_one_case_smaller_than_a_crop(copy: World) -> None:
    for file in volumes(copy)[1:]:
        file.unlink()
    rewrite(volumes(copy)[0], lambda v: v[:, :20, :13, :9])
    log = ended(SHORT.replace("-crop_size 24 24 24", "-crop_size 32 32 32"), copy, 0)
    assert "1 cases of" in log and "Encoder weights" in log


@pytest.mark.slow
def test_no_case_at_all(copy: World) -> None:
    for file in volumes(copy):
        file.unlink()
    assert "holds no preprocessed .b2nd volumes" in ended(SHORT, copy, 2)
    shutil.rmtree(copy.root / "raw" / DATASET / "imagesTr")
    log = ended("hiendmae_plan_and_preprocess -d 901", copy, 2)
    assert len(log.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_data_set_named_twice_counts_once(world: World) -> None:
    log = ended(f"{SHORT.replace('-d 901', f'-d 901 {DATASET} 901')} -run twice", world, 0)
    assert "6 cases of Dataset901_TestPhantom (" in log


def test_data_sets_in_different_states_are_told_apart(copy: World) -> None:
    """One is preprocessed, the other only planned, or not even that."""
    other = copy.root / "preprocessed" / "Dataset903_Other"
    other.mkdir()
    log = ended(SHORT.replace("-d 901", "-d 901 903"), copy, 2)
    assert f"{other / 'nnUNetPlans.json'} does not exist" in log
    shutil.copy(copy.root / "preprocessed" / DATASET / "nnUNetPlans.json", other)
    log = ended(SHORT.replace("-d 901", "-d 901 903"), copy, 2)
    assert f"{other / VOLUMES} holds no preprocessed .b2nd volumes" in log


# Memory


# What is imported late must be there before memory gets tight: an import that fails says anything but that.
LITTLE_MEMORY = """
import resource, sys
import nnunetv2.utilities.plans_handling.plans_handler, torch._dynamo
import pretraining.commands.pretrain as cli
here = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (here + 2**30, here + 2**30))
cli.main()
"""


def test_out_of_memory_is_told_in_a_sentence(world: World) -> None:
    flags = f"-d 901 {SMALL} -steps 2 -batch_size 3000 -val_every 1 -run big".replace(
        "-num_workers 1", "-num_workers 0"
    )
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, *flags.split()], env=world.env, capture_output=True, encoding="utf-8",
        check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("hiendmae_pretrain: error: the memory of this machine is full.") and "-batch_size" in line
    assert "Traceback" not in done.stderr
