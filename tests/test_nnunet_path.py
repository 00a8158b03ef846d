"""Fine-tuning through nnU-Net's real commands: train, continue, validate, predict."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DATASET, World
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_hiendmae.nnunet.trainer import nnUNetTrainerHiEndMAE
from nnunetv2_hiendmae.weights.file import WEIGHTS_FILE, load_weights, save_weights

PLANS = "nnUNetPlans_hiendmae"
TRAIN = f"nnUNetv2_train 901 3d_fullres {{fold}} -tr nnUNetTrainerHiEndMAE -p {PLANS} -device cpu"
SHORT = "--epochs 2 --num_iterations_per_epoch 2 --num_val_iterations_per_epoch 1 --feature_size 4"


def results(world: World, trainer: str = "nnUNetTrainerHiEndMAE", plans: str = PLANS) -> Path:
    return world.root / "results" / DATASET / f"{trainer}__{plans}__3d_fullres"


@pytest.fixture(scope="module")
def trained(world: World, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Fold 0 trained for two epochs, in results of its own with one pre-training; the log says what was loaded."""
    place = World(tmp_path_factory.mktemp("trained"))
    for kind in ("raw", "preprocessed"):
        (place.root / kind).symlink_to(world.root / kind)
    weights = place.root / pretrained.relative_to(world.root)
    shutil.copytree(pretrained.parent, weights.parent)
    place.run(f"hiendmae_plan -d 901 {SHORT}")
    log = place.run(TRAIN.format(fold=0))
    sha256 = load_weights(pretrained).sha256
    assert f"{weights} (the only finished pre-training under nnUNet_results), sha256 {sha256}" in log
    assert "dropped: cls_token; fresh: pos_embed (sine-cosine), the whole segmentation decoder" in log
    return place


def test_results_say_how_they_were_made(trained: World, pretrained: Path) -> None:
    block = json.loads((results(trained) / "plans.json").read_text(encoding="utf-8"))["configurations"]["3d_fullres"][
        "hiendmae"
    ]
    weights = load_weights(pretrained)
    assert block["architecture"] == weights.header["architecture"]
    assert block["weights_sha256"] == weights.sha256
    assert (block["num_epochs"], block["feature_size"], block["window_hu"]) == (2, 4, [-175.0, 250.0])
    assert json.loads((results(trained) / "fold_0" / "validation" / "summary.json").read_text(encoding="utf-8"))[
        "foreground_mean"
    ]


def test_organs_start_rare(trained: World) -> None:
    """Four iterations of training do not take the head far from where it starts: even odds would be 0."""
    file = results(trained) / "fold_0" / "checkpoint_final.pth"
    bias = torch.load(file, weights_only=False)["network_weights"]["head.seg_layers.0.bias"]
    assert abs(bias[0]) < 0.01 and (bias[1:] - math.log(0.02)).abs().max() < 0.01


def test_continue_validate_predict_without_weights(trained: World, pretrained: Path) -> None:
    """``--c``, ``--val`` and predict with the weights file moved away and no variable but nnU-Net's three."""
    fold = results(trained) / "fold_0"
    every = list((trained.root / "results").rglob(pretrained.name))  # other tests pre-train too
    for file in every:
        file.rename(file.with_name("moved_away"))
    try:
        trained.run(f"hiendmae_plan -d 901 {SHORT.replace('--epochs 2', '--epochs 3')}")
        shutil.copy(fold / "checkpoint_final.pth", fold / "checkpoint_latest.pth")
        (fold / "checkpoint_final.pth").unlink()
        assert "Epoch 2" in trained.run(TRAIN.format(fold=0) + " --c")
        (fold / "validation" / "summary.json").unlink()
        trained.run(TRAIN.format(fold=0) + " --val")
        assert (fold / "validation" / "summary.json").is_file()
        raw, out = trained.root / "raw" / DATASET, trained.root / "predictions"
        trained.run(
            f"nnUNetv2_predict -i {raw}/imagesTs -o {out} -d 901 -c 3d_fullres -f 0 -tr nnUNetTrainerHiEndMAE "
            f"-p {PLANS} -device cpu --disable_tta -npp 1 -nps 1"
        )
        assert len(list(out.glob("*.nii.gz"))) == 1
        log = trained.run(TRAIN.format(fold=1), ok=False)
        assert "No Hi-End-MAE weights found" in log and "Traceback" not in log
    finally:
        for file in every:
            file.with_name("moved_away").rename(file)


@pytest.mark.slow
def test_fold_all_and_weights_from_the_environment(trained: World, pretrained: Path, tmp_path: Path) -> None:
    copy = shutil.copy(pretrained, tmp_path / "elsewhere.pth")
    log = trained.run(TRAIN.format(fold="all"), HIENDMAE_WEIGHTS=str(copy))
    assert f"{copy} (named by the environment variable HIENDMAE_WEIGHTS)" in log
    assert (results(trained) / "fold_all" / "checkpoint_final.pth").is_file()


def test_folds_of_different_networks_are_refused(trained: World) -> None:
    trained.run(f"hiendmae_plan -d 901 {SHORT.replace('--feature_size 4', '--feature_size 6')}")
    try:
        log = trained.run(TRAIN.format(fold=1), ok=False)
        assert "hold another network than fold 1 would" in log and "Traceback" not in log
    finally:
        trained.run(f"hiendmae_plan -d 901 {SHORT}")


@pytest.mark.slow
def test_folds_start_from_the_same_weights(trained: World, pretrained: Path, tmp_path: Path) -> None:
    """Another fold takes the weights of the first, is refused others, and any choice is the user's to make."""
    ours, base = load_weights(pretrained), results(trained)
    other = tmp_path / "other.pth"
    encoder = {name: tensor + 1e-3 for name, tensor in ours.encoder.items()}
    sha256 = save_weights(other, encoder, ours.header)
    log = trained.run(TRAIN.format(fold=1), ok=False, HIENDMAE_WEIGHTS=str(other))
    assert "fold_0" in log and f" in {base} started from" in log  # other tests may have trained other folds
    assert f"sha256 {ours.sha256}" in log and f"sha256 {sha256}" in log
    assert "HIENDMAE_WEIGHTS=FILE" in log and "hiendmae_plan -plans_name NAME" in log and "Traceback" not in log
    (first,) = (trained.root / "results").rglob(WEIGHTS_FILE)
    second = first.parent.with_name("later") / first.name
    second.parent.mkdir()
    shutil.copy(other, second)  # a later pre-training
    try:
        log = trained.run(TRAIN.format(fold="all").replace(PLANS, "nnUNetPlans"), ok=False)
        assert "Several finished pre-trainings under nnUNet_results" in log and "later" in log and "6 steps" in log
        log = trained.run(TRAIN.format(fold=1))
        assert f"{base}/plans.json, as for fold_" in log and f"sha256 {ours.sha256}" in log
    finally:
        shutil.rmtree(second.parent)


def test_scratch_needs_no_weights(trained: World) -> None:
    (file,) = (trained.root / "results").rglob(WEIGHTS_FILE)
    file.rename(file.with_name("moved_away"))
    try:
        log = trained.run(TRAIN.format(fold=0).replace("HiEndMAE ", "HiEndMAE_scratch "))
    finally:
        file.with_name("moved_away").rename(file)
    assert "Training from random initialisation." in log


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-p nnUNetPlans -configuration", "unrecognized arguments"),
        ("--epochs 0", "-num_epochs 0 must be an integer of at least 1"),
        ("--epochs many", "invalid int value: 'many'"),
        ("--architecture huge", "Unknown architecture 'huge'"),
        ("--weights nowhere.pth", "The weights file nowhere.pth does not exist."),
        ("--layer_decay 2", "-layer_decay 2.0 must be in (0, 1]"),
        ("-p NoPlans", "NoPlans.json does not exist. Run 'nnUNetv2_plan_and_preprocess"),
        ("-plans_name a__b", "must not be empty or contain '__'"),
        ("-plans_name nnUNetPlans", "was not written by hiendmae_plan"),
    ],
)
def test_plan_refuses_in_one_line(world: World, flags: str, message: str) -> None:
    log = world.run(f"hiendmae_plan -d 901 {flags}", ok=False)
    assert message in log and "Traceback" not in log


def test_plans_of_nnunet_with_our_name_are_not_overwritten(world: World) -> None:
    folder = world.root / "preprocessed" / DATASET
    plans = (folder / "nnUNetPlans.json").read_text(encoding="utf-8").replace("nnUNetPlans", "hiendmae_iso")
    (folder / "hiendmae_iso.json").write_text(plans, encoding="utf-8")
    log = world.run("hiendmae_plan -d 901 -p nnUNetPlans -plans_name hiendmae_iso", ok=False)
    assert "was not written by hiendmae_plan" in log
    assert (folder / "hiendmae_iso.json").read_text(encoding="utf-8") == plans
    (folder / "hiendmae_iso.json").unlink()


@pytest.mark.slow
def test_2d_configuration_is_refused(world: World, pretrained: Path) -> None:
    world.run("nnUNetv2_preprocess -d 901 -c 2d -np 1")
    log = world.run("nnUNetv2_train 901 2d 0 -tr nnUNetTrainerHiEndMAE -device cpu", ok=False)
    assert "is a 3D network; train the 2d configuration with nnUNetTrainer" in log and "Traceback" not in log


def test_a_checkpoint_by_any_argument_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's versions differ in it."""
    given: list[object] = []
    monkeypatch.setattr(nnUNetTrainer, "load_checkpoint", lambda self, checkpoint: given.append(checkpoint))
    for call in ({"filename_or_checkpoint": "a"}, {"checkpoint": "a"}):
        trainer = nnUNetTrainerHiEndMAE.__new__(nnUNetTrainerHiEndMAE)
        trainer.load_checkpoint(**call)
        assert trainer._resuming
    trainer.load_checkpoint("a")
    assert given == ["a"] * 3
