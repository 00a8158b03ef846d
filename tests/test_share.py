"""Sharing: the hub's real client against a stand-in, and nnU-Net's own zip files in a fresh place."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import SimpleITK as sitk
from conftest import DATASET, World
from hub_stand_in import TOKEN, Hub, stand_in

from nnunetv2_hiendmae.weights.file import Weights, load_weights
from nnunetv2_hiendmae.weights.model_card import model_card

REPO = "lab/ct-encoder"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with stand_in() as server:
        yield server


def env(hub: Hub, tmp_path: Path, token: str = TOKEN) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip


def test_push_then_pull(world: World, pretrained: Path, hub: Hub, tmp_path: Path) -> None:
    log = world.run(f"hiendmae_share push -i {pretrained} -repo {REPO} --private", **env(hub, tmp_path))
    assert f"Pushed to {hub.url}/{REPO}" in log and hub.private == {REPO: True}
    assert hub.files[f"{REPO}/encoder_weights.pth"] == pretrained.read_bytes()
    card = hub.files[f"{REPO}/README.md"].decode()
    weights = load_weights(pretrained)
    assert card.startswith("---\nlicense: other\n") and weights.sha256 in card
    assert f"| {DATASET} | 6 |" in card and "Not a medical device" in card and "10.1016/j.media.2025.103770" in card
    target = tmp_path / "weights.pth"
    log = world.run(f"hiendmae_share pull -repo {REPO} -o {target}", **env(hub, tmp_path))
    assert weights.sha256 in log and target.read_bytes() == pretrained.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "hf") == ["weights.pth"]


@pytest.mark.slow
def test_what_goes_wrong_is_told_in_a_line(world: World, pretrained: Path, hub: Hub, tmp_path: Path) -> None:
    hub.files[f"{REPO}/encoder_weights.pth"] = b"no weights"
    target = tmp_path / "weights.pth"
    for command, settings, message in (
        (f"push -i {pretrained} -repo {REPO}", {"token": "hf_bad"}, "Log in with 'hf auth login'"),
        (f"push -i {tmp_path / 'none.pth'} -repo {REPO}", {}, "none.pth does not exist"),
        (f"push -i {pretrained} -repo nonsense", {}, "must be USER/NAME"),
        (f"pull -repo lab/other -o {target}", {}, "404"),
        (f"pull -repo {REPO} -o {target}", {}, "is not a file of plain tensors"),
        (f"pull -repo {REPO} -o {tmp_path / 'no' / 'w.pth'}", {}, "The folder of -o"),
    ):
        log = world.run(f"hiendmae_share {command}", ok=False, **env(hub, tmp_path, **settings))
        assert message in log and log.count("\n") == 1, log
    assert not target.exists() and not list(tmp_path.glob(".hiendmae_*"))


def test_card_of_a_manifest() -> None:
    """What provenance says is in the card, and cannot break its table."""
    header = {
        "architecture": {"embed_dim": 24}, "window_hu": [-175, 250], "sha256": "abc",
        "spacing": {"Dataset510_A": [3, 2, 2]},
        "datasets": [{"name": "Dataset510_A", "cases": 7}],
        "provenance": [
            {"dataset": "Dataset510_A", "licence": "CC0 | <b>", "reference": "doi", "excluded_overlap": ["17"]}
        ],
    }  # fmt: skip
    card = model_card(Weights(Path("w.pth"), {}, header), "a/b", "cc0-1.0")
    assert "| Dataset510_A | 7 | 3 × 2 × 2 | CC0 \\| &lt;b> | doi | 17 |" in card and "license: cc0-1.0" in card


def test_card_of_another_programs_weights() -> None:
    """What they saw, their licence and whom to cite is theirs, not ours; an encoder that is not finished says so."""
    header = {
        "architecture": {"embed_dim": 24}, "window_hu": [-175, 250], "sha256": "abc",
        "datasets": [{"name": "Dataset745_OpenMind", "cases": 9}], "normalization": ["ZScoreNormalization"],
        "source": "Primus checkpoint of BaseEvaMAETrainer", "source_citations": ["Wald et al."],
        "licence": "CC BY-NC 4.0",
    }  # fmt: skip
    card = model_card(Weights(Path("w.pth"), {}, header), "a/b", "other")
    for words in ("Primus checkpoint of BaseEvaMAETrainer", "ZScoreNormalization", "- Wald et al.", "| CC BY-NC 4.0 |"):
        assert words in card
    assert "no other modality" not in card and "Encoder of a Hi-End-MAE pre-training" not in card
    half = {name: header[name] for name in ("architecture", "window_hu", "sha256")} | {"unfinished": "step 3 of 9"}
    card = model_card(Weights(Path("w.pth"), {}, half), "a/b", "other")
    assert "unfinished: step 3 of 9" in card and "no other modality" in card


@pytest.mark.slow
def test_zip_predicts_elsewhere(world: World, pretrained: Path, tmp_path: Path) -> None:
    """nnU-Net's export and install carry our model; it predicts the same without weights file and variables."""
    weights = tmp_path / "moved.pth"
    shutil.copy(pretrained, weights)
    short = "--epochs 1 --num_iterations_per_epoch 1 --num_val_iterations_per_epoch 1 --feature_size 4"
    world.run(f"hiendmae_plan -d 901 -plans_name nnUNetPlans_zip {short} --weights {weights}")
    model = "-d 901 -c 3d_fullres -f 0 -tr nnUNetTrainerHiEndMAE -p nnUNetPlans_zip"
    world.run("nnUNetv2_train 901 3d_fullres 0 -tr nnUNetTrainerHiEndMAE -p nnUNetPlans_zip -device cpu")
    archive = tmp_path / "model.zip"
    model_flags = model.replace("-d 901 ", "-d 901 -o " + str(archive) + " ")
    world.run(f"nnUNetv2_export_model_to_zip {model_flags}")
    weights.unlink()
    elsewhere = World(tmp_path / "elsewhere")
    (elsewhere.root / "results").mkdir(parents=True)
    images = world.root / "raw" / DATASET / "imagesTs"
    elsewhere.run(f"nnUNetv2_install_pretrained_model_from_zip {archive}", HOME=str(elsewhere.root))
    for place, name in ((world, "here"), (elsewhere, "there")):
        flags = f"-i {images} -o {tmp_path / name} {model} -device cpu --disable_tta -npp 1 -nps 1"
        place.run(f"nnUNetv2_predict {flags} -chk checkpoint_final.pth", HOME=str(tmp_path))
    (here,) = (tmp_path / "here").glob("*.nii.gz")
    there = tmp_path / "there" / here.name
    assert (
        sitk.GetArrayFromImage(sitk.ReadImage(str(here))) == sitk.GetArrayFromImage(sitk.ReadImage(str(there)))
    ).all()
