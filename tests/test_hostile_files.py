"""Weights are data: a file that would run code, or ask for a machine's whole memory, is refused in one line."""

from __future__ import annotations

import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import World
from processes import RUNS, SMALL, ended

from nnunetv2_hiendmae.weights.file import load_weights, save_weights


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def write_torch(file: Path, content: Any) -> None:
    torch.save(content, file)


def write_old_torch(file: Path, content: Any) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


def write_pickle(file: Path, content: Any) -> None:
    file.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [write_torch, write_old_torch, write_pickle])
def test_a_pickle_given_as_weights_runs_nothing(world: World, tmp_path: Path, write) -> None:
    mark, file = tmp_path / "mark", tmp_path / "weights.pth"
    write(file, {"format": "hiendmae_weights", "version": 1, "header": {}, "encoder": Hostile(mark)})
    ct = next((world.root / "raw").rglob("*_0000.nii.gz"))
    for command in (
        f"hiendmae_import_weights {file} -o {tmp_path / 'out.pth'}",
        f"hiendmae_plan -d 901 -plans_name hostile --weights {file}",
        f"hiendmae_visualize -run {file} -i {ct} -o {tmp_path / 'pictures'}",
        f"hiendmae_share push -i {file} -repo lab/name",
    ):
        log = ended(command, world, 2)
        assert "is not a file of plain tensors" in log, log
    assert not mark.exists()
    with suppress(RuntimeError):
        torch.load(file, weights_only=False)  # what is refused above does run
    assert mark.exists()


def test_a_pickle_given_to_the_trainer_and_the_doctor(world: World, tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "weights.pth"
    torch.save(Hostile(mark), file)
    env = {"HIENDMAE_WEIGHTS": str(file), "nnUNet_results": str(tmp_path)}
    command = "nnUNetv2_train 901 3d_fullres 0 -tr nnUNetTrainerHiEndMAE -device cpu"
    assert "it holds objects of posix.system" in ended(command, world, 1, **env)
    assert "is not a file of plain tensors" in ended("hiendmae_doctor -preset tiny -device cpu -d 901", world, 1, **env)
    assert not mark.exists()


def test_a_pickle_given_as_checkpoint(world: World, tmp_path: Path) -> None:
    folder = world.root / RUNS / "hostile"
    folder.mkdir(parents=True)
    torch.save({"step": 1, "config": Hostile(tmp_path / "mark")}, folder / "checkpoint_latest.pth")
    command = f"hiendmae_pretrain -d 901 {SMALL} -steps 4 -batch_size 2 -run hostile --c"
    assert "is not a file of plain tensors" in ended(command, world, 2)
    torch.save({"step": 1}, folder / "checkpoint_latest.pth")
    assert "is no checkpoint of hiendmae_pretrain" in ended(command, world, 2)
    assert not (tmp_path / "mark").exists()
    shutil.rmtree(folder)


def test_names_that_leave_the_folder_are_not_followed(world: World, pretrained: Path, tmp_path: Path) -> None:
    """nnU-Net's own command installs shared models; its zip reader keeps every file below its folder."""
    (tmp_path / "results").mkdir()
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("../../outside.txt", "x")
        archive.writestr("/outside_too.txt", "x")
    env = {"nnUNet_results": str(tmp_path / "results")}
    world.run(f"nnUNetv2_install_pretrained_model_from_zip {tmp_path / 'model.zip'}", **env)
    assert not (tmp_path / "outside.txt").exists() and not (tmp_path.parent / "outside.txt").exists()
    assert not Path("/outside_too.txt").exists()
    assert "must be USER/NAME" in ended(f"hiendmae_share pull -repo ../.. -o {tmp_path / 'w.pth'}", world, 2)


HUGE = 10**9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": {"depth": HUGE}}, "different architectures"),
        ({"architecture": {"embed_dim": 6 * HUGE}}, "different architectures"),
        ({"architecture": {"patch_size": [HUGE, 8, 8]}}, "different architectures"),
        ({"architecture": {"mlp_ratio": 1e9}}, "shapes contradict each other"),
        ({"architecture": {"depth": "12"}}, "all must be positive"),
        ({"architecture": {"taps": [3, 6, HUGE]}}, "name blocks beyond depth"),
        ({"architecture": {"colour": 1}}, "Unknown architecture keys ['colour']"),
        ({"img_size": [HUGE, 24, 40]}, "tokens, more than"),
        ({"architecture": {"num_heads": 0}}, "all must be positive"),
        ({"architecture": {"num_heads": -1}}, "all must be positive"),
        ({"img_size": "all"}, "must be three positive integers"),
        ({"spacing": {"X": "thin"}}, "could not convert"),
        ({"datasets": ["X"]}, "sound weights file"),
        ({"window_hu": [250, -175]}, "window_hu=(250, -175) is empty"),
        ({"window_hu": None}, "sound weights file"),
    ],
)
def test_headers_that_lie_are_refused_before_anything_is_built(
    pretrained: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    data = torch.load(pretrained, weights_only=True)
    header = {**data["header"], **change}
    if "architecture" in change:
        header["architecture"] = {**data["header"]["architecture"], **change["architecture"]}
    torch.save({**data, "header": header}, tmp_path / "lie.pth")
    before = time.monotonic()
    with pytest.raises(ValueError, match=r"lie.pth is no sound weights file") as refusal:
        load_weights(tmp_path / "lie.pth")
    assert message in str(refusal.value)
    assert time.monotonic() - before < 5  # a network of that size would take longer, and the memory


def test_missing_header_entries_are_named(pretrained: Path, tmp_path: Path) -> None:
    data = torch.load(pretrained, weights_only=True)
    for key in ("architecture", "window_hu", "img_size", "sha256"):
        header = {k: v for k, v in data["header"].items() if k != key}
        torch.save({**data, "header": header}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=f"no sound weights file: KeyError: '{key}'"):
            load_weights(tmp_path / "w.pth")
    data["encoder"]["norm.weight"] = data["encoder"]["norm.weight"][:5].clone()
    save_weights(tmp_path / "w.pth", data["encoder"], data["header"])
    with pytest.raises(ValueError, match=r"norm.weight \(5,\) instead of \(192,\)"):
        load_weights(tmp_path / "w.pth")
