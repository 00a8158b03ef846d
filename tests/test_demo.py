"""``hiendmae_demo``: its phantoms, how it continues and fails, its page; the whole of it is slow."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import DATASET, World

from nnunetv2_hiendmae.checks import Failed
from pretraining.demo import demo as demo_module
from pretraining.demo import run
from pretraining.demo.demo import check_machine, write_phantoms
from pretraining.demo.page import COLOURS, ORGANS, dice, pictures
from pretraining.demo.phantoms import LABELS, make_phantom
from pretraining.demo.recipe import CPU, PRETRAINED, Command, Step, settings, steps
from pretraining.demo.run import environment, keep_or_clear, own_folder, run_step
from pretraining.visualize.cases import case_of, read_ct
from pretraining.visualize.page import write_page
from pretraining.visualize.source import open_source
from pretraining.visualize.views import Orientation

MEAN_HU = {"liver": (70, 170), "spleen": (100, 190), "kidneys": (80, 230), "spine": (120, 350), "aorta": (120, 320),
           "lungs": (-900, -600)}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_a_phantom_has_every_organ_with_its_density(seed: int) -> None:
    hu, labels = make_phantom(np.random.default_rng(seed), 7)
    assert hu.shape == labels.shape and len(set(hu.shape)) > 1
    assert set(np.unique(labels)) == set(LABELS.values())
    for organ, (low, high) in MEAN_HU.items():
        assert low < hu[labels == LABELS[organ]].mean() < high, organ
    assert -1024 <= hu.min() < -950 and 200 < hu.max() < 1000
    assert labels[:, :, : hu.shape[2] // 2][labels[:, :, : hu.shape[2] // 2] == LABELS["liver"]].size > 500  # the right
    assert not (labels[:, :, : hu.shape[2] // 2] == LABELS["spleen"]).any()
    edges = hu[:, 0], hu[:, :, 0], hu[:, :, -1]
    assert all(edge.mean() < -900 for edge in edges)  # air around the body


def test_phantoms_follow_the_seed_and_the_voxel_size() -> None:
    one, again, other = (make_phantom(np.random.default_rng(seed), 7)[0] for seed in (1, 1, 2))
    assert np.array_equal(one, again) and (one.shape != other.shape or not np.array_equal(one, other))
    finer = make_phantom(np.random.default_rng(1), 5)[0]
    assert np.allclose(np.multiply(finer.shape, 5), np.multiply(one.shape, 7), atol=7)


def test_phantoms_are_an_nnunet_data_set(tmp_path: Path) -> None:
    recipe = replace(CPU, num_unlabelled=2, num_labelled=1, num_test=1)
    own_folder(tmp_path / "d")
    for _ in range(2):  # the second time all is there
        write_phantoms(recipe, 0, tmp_path / "d")
    raw = tmp_path / "d" / "nnUNet_raw"
    assert len(list(raw.glob("Dataset998_*/imagesTr/*_0000.nii.gz"))) == 2
    assert not list(raw.glob("Dataset998_*/labelsTr"))
    assert [len(list(raw.glob(f"Dataset999_*/{k}/*.nii.gz"))) for k in ("imagesTr", "labelsTs")] == [1, 1]


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="the folder holds other files"):
        own_folder(tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_other_settings_start_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, kept, said in ((0, False, ""), (0, True, "what is finished is kept"), (1, False, "starting anew")):
        own_folder(tmp_path)
        keep_or_clear(tmp_path, settings(CPU, "cpu", seed))
        assert (tmp_path / "nnUNet_raw").exists() == kept
        assert said in capsys.readouterr().out
        (tmp_path / "nnUNet_raw").mkdir(exist_ok=True)


def step(*commands: str) -> Step:
    return Step(
        name="x",
        what="Something happens.",
        makes=("made",),
        commands=tuple(Command(text=c, files="made/*") for c in commands),
    )


def test_a_step_is_done_once_and_an_unfinished_one_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "half").touch()
    env = environment(tmp_path, 0)
    run_step(step(f"mkdir {tmp_path}/made"), tmp_path, env)
    assert os.listdir(tmp_path / "made") == []  # the half is gone
    (tmp_path / "made" / "whole").touch()
    run_step(step(f"mkdir {tmp_path}/made"), tmp_path, env)
    assert "done before" in capsys.readouterr().out and (tmp_path / "made" / "whole").exists()


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("raise OSError(28, 'No space left on device')", "the disk is full"),
        ("raise MemoryError", "the memory is full"),
        ("import os; os.kill(os.getpid(), 9)", "the memory is full"),
        ("raise RuntimeError('Failed to find C compiler')", "a C compiler is missing"),
        ("raise ValueError('the third')", "ValueError: the third"),
    ],
)
def test_a_failed_command_ends_the_others_and_is_told_in_one_line(tmp_path: Path, script: str, told: str) -> None:
    (tmp_path / "script.py").write_text(script)
    with pytest.raises(Failed, match=told) as failed:
        run_step(step(f"{sys.executable} {tmp_path}/script.py", "sleep 100"), tmp_path, environment(tmp_path, 0))
    assert "\n" not in str(failed.value) and "x_0.log" in str(failed.value)
    assert not run.is_done(tmp_path, "x")


def test_a_users_nnunet_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_results", "nnUNet_wandb_enabled", "nnUNet_compile", "nnUNet_extTrainer", "HIENDMAE_WEIGHTS"):
        monkeypatch.setenv(name, "mine")
    env = environment(tmp_path, 0)
    assert env["nnUNet_results"] == str(tmp_path / "nnUNet_results") and env["nnUNet_extTrainer"] == "mine"
    assert env["nnUNet_compile"] == "f" and not {"nnUNet_wandb_enabled", "HIENDMAE_WEIGHTS"} & set(env)


def test_what_would_end_it_later_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_machine(tmp_path, "cpu")
    monkeypatch.setattr(demo_module, "free_memory", lambda: 1.0)
    with pytest.raises(ValueError, match=r"1\.0 GiB of memory are free"):
        check_machine(tmp_path, "cpu")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"0\.0 GiB are free there"):
        check_machine(tmp_path / "new" / "folder", "cpu")
    from pretraining.doctor import environment as doctor

    monkeypatch.setattr(doctor, "version", lambda name: "2.1.0" if name == "torch" else "99")
    with pytest.raises(ValueError, match=r"torch 2\.1\.0 is installed; torch>=2\.6 is needed.* pip install"):
        check_machine(tmp_path, "cpu")


def test_the_page_needs_nothing_but_itself(world: World, pretrained: Path, tmp_path: Path) -> None:
    source = open_source(pretrained.parent, torch.device("cpu"))
    ct = next((world.root / "raw" / DATASET / "imagesTr").glob("*_0000.nii.gz"))
    case = read_ct(ct, source.spacings[0], source.window_hu)
    labels = (case.volume > 0.6).astype(np.uint8) * LABELS["kidneys"]
    gallery = pictures(source, case, {"truth": labels, "pre-trained": labels}, 0)
    assert len(gallery.panels) == 5 and len(COLOURS) == len(LABELS) == len(ORGANS) + 1
    write_page([gallery], Orientation.of(case.frame), case.window_hu, "title", [], tmp_path / "x.html", "<i>", "</i>")
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(", text) and 'type="range"' in text
    painted = gallery.panels[3].image(Orientation.of(case.frame), "axial", gallery.voxel[0])
    assert (painted[..., 0].astype(int) - painted[..., 2] > 40).any()  # kidneys are yellow


def test_a_ct_that_lies_otherwise_is_turned(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(make_phantom(np.random.default_rng(0), 7)[0])
    image.SetSpacing((7, 7, 7))
    upright = case_of(sitk.DICOMOrient(image, "LPS"), "a", (7, 7, 7), (-175, 250))
    turned = case_of(sitk.DICOMOrient(sitk.DICOMOrient(image, "RAS"), "LPS"), "a", (7, 7, 7), (-175, 250))
    assert np.array_equal(upright.volume, turned.volume)


def test_commands_are_those_of_the_readme(tmp_path: Path) -> None:
    words = [c.text.split()[0] for s in steps(CPU, "cpu", 0, tmp_path) for c in s.commands]
    assert words == [
        "hiendmae_plan_and_preprocess", "nnUNetv2_plan_and_preprocess", "hiendmae_pretrain", "hiendmae_plan",
        "nnUNetv2_train", "nnUNetv2_train", "nnUNetv2_predict", "nnUNetv2_predict",
        "nnUNetv2_evaluate_folder", "nnUNetv2_evaluate_folder",
    ]  # fmt: skip


@pytest.mark.slow
def test_demo_finds_every_organ(tmp_path: Path) -> None:
    out, world = tmp_path / "demo", World(tmp_path)
    log = world.run(f"hiendmae_demo -o {out}")
    assert all(value >= 0.8 for value in dice(out)[PRETRAINED].values()), log
    assert (out / "index.html").stat().st_size > 100_000
    ct = next((out / "nnUNet_raw").glob("*/imagesTs/*.nii.gz"))
    assert "done before" in world.run(f"hiendmae_demo -o {out}")
    assert "nnUNetv2_train" not in world.run(f"hiendmae_demo -o {out} -i {ct}")
    assert (out / "your_ct.html").stat().st_size > 100_000
    assert not any((tmp_path / kind).exists() for kind in ("raw", "preprocessed", "results"))
