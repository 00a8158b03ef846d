"""Which weights are taken when nobody names them: one finished pre-training, never a control, never one of several."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from nnunetv2_hiendmae.weights.file import WEIGHTS_FILE
from nnunetv2_hiendmae.weights.find import find_weights


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the runs of a data set, empty."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.delenv("HIENDMAE_WEIGHTS", raising=False)
    return tmp_path / "Dataset905_Found" / "HiEndMAE__nnUNetPlans__3d_fullres"


def finish(runs: Path, name: str, decoder: str | None = "hierarchical") -> Path:
    """A weights file with a header; those of the first versions named no decoder."""
    header = {"sha256": name, "steps": 7, "datasets": [{"name": "Dataset905_Found", "cases": 3}], "decoder": decoder}
    file = runs / name / WEIGHTS_FILE
    file.parent.mkdir(parents=True)
    torch.save({"header": {k: v for k, v in header.items() if v is not None}}, file)
    return file


@pytest.mark.parametrize("decoder", ["hierarchical", None])
def test_one_is_taken(runs: Path, decoder: str | None) -> None:
    one = finish(runs, "real", decoder)
    finish(runs, "a_later_control", "self_attention")
    finish(runs, "another_control", "last_layer")
    shutil.copytree(one.parent, runs / "the_same_again")
    (runs / "unfinished").mkdir()
    assert find_weights(None) == (one, "the only finished pre-training under nnUNet_results")


def test_several_are_named(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest is none to take, nor is a damaged one passed over."""
    files = [finish(runs, "real"), finish(runs, "nano_test")]
    (runs / "damaged").mkdir()
    (runs / "damaged" / WEIGHTS_FILE).write_bytes(b"no weights")
    with pytest.raises(ValueError, match="Several finished pre-trainings under nnUNet_results: ") as refused:
        find_weights(None)
    told = str(refused.value)
    assert all(f"{file} (Dataset905_Found, 7 steps, decoder hierarchical, 20" in told for file in files)
    assert "damaged" in told and "HIENDMAE_WEIGHTS=FILE" in told and "hiendmae_plan -d DATASET --weights FILE" in told
    assert find_weights(str(files[1])) == (files[1], "named by the plans")
    monkeypatch.setenv("HIENDMAE_WEIGHTS", str(files[0]))
    assert find_weights(str(files[1]))[0] == files[0]


def test_controls_alone_are_not_taken(runs: Path) -> None:
    finish(runs, "plain_mae", "self_attention")
    with pytest.raises(ValueError, match=r"are controls: .*plain_mae.* decoder self_attention"):
        find_weights(None)
