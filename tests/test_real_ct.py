"""Long: real CT under nnU-Net's default plans and under ours, with weights of our own and of the authors' kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import World, shared_folder

SHORT = "--epochs 1 --num_iterations_per_epoch 2 --num_val_iterations_per_epoch 1 --feature_size 4 --no_mirroring"
TRAINER = "nnUNetTrainerHiEndMAE"

pytestmark = pytest.mark.slow


def link(world: World, dataset: str, cases: int) -> Path:
    """Some cases of a real data set, linked into the world's raw folder; its preprocessed folder."""
    source, target = shared_folder() / "data" / dataset, world.root / "raw" / dataset
    images = sorted((source / "imagesTr").glob("*.nii.gz"))[:cases]
    for kind in ("imagesTr", "labelsTr"):
        (target / kind).mkdir(parents=True)
    for image in images:
        (target / "imagesTr" / image.name).symlink_to(image)
        label = image.name.replace("_0000.", ".")
        (target / "labelsTr" / label).symlink_to(source / "labelsTr" / label)
    description = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    (target / "dataset.json").write_text(json.dumps({**description, "numTraining": len(images)}))
    return world.root / "preprocessed" / dataset


def plans_of(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["configurations"]["3d_fullres"]


def train_and_predict(world: World, dataset: str, fold: str, plans: str, **env: str) -> str:
    """Fine-tune on the shortest schedule, predict one training image without the weights; the training's log."""
    number = dataset[len("Dataset") :].split("_")[0]
    log = world.run(f"nnUNetv2_train {number} 3d_fullres {fold} -tr {TRAINER} -p {plans} -device cpu", **env)
    image = next((world.root / "raw" / dataset / "imagesTr").iterdir())
    images, out = world.root / f"images_{plans}", world.root / f"out_{plans}"
    images.mkdir()
    (images / image.name).symlink_to(image.resolve())
    world.run(
        f"nnUNetv2_predict -i {images} -o {out} -d {number} -c 3d_fullres -f {fold} -tr {TRAINER} -p {plans} "
        "-device cpu --disable_tta -npp 1 -nps 1"
    )
    assert (out / image.name.replace("_0000.", ".")).is_file()
    return log


def test_own_weights_under_default_plans(tmp_path: Path) -> None:
    """Dataset501: patch 80 × 128 × 128, not divisible by 12, anisotropic, clipped at -106 HU."""
    world = World(tmp_path)
    folder = link(world, "Dataset501_OpenKBP", 6)
    world.run("nnUNetv2_plan_and_preprocess -d 501 -c 3d_fullres -np 2 -npfp 2", nnUNet_def_n_proc="2")
    assert plans_of(folder, "nnUNetPlans")["patch_size"] == [80, 128, 128]
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["kbp_001", "kbp_002"], "val": ["kbp_004"]}]))
    world.run("hiendmae_pretrain -d 501 -preset tiny -device cpu -steps 4 -val_every 4 -num_workers 1")
    world.run(f"hiendmae_plan -d 501 {SHORT}")
    log = train_and_predict(world, "Dataset501_OpenKBP", "0", "nnUNetPlans_hiendmae")
    assert "clip images to channel 0: -106…1754 HU, which cuts into the window -175…250 HU" in log


@pytest.mark.parametrize(
    ("dataset", "cases", "fold"), [("Dataset501_OpenKBP", 5, "0"), ("Dataset503_TrunkMultiOrgan", 1, "all")]
)
def test_authors_weights_under_both_plans(tmp_path: Path, dataset: str, cases: int, fold: str) -> None:
    """The authors' patch of 12 divides neither nnU-Net's patches nor most volumes."""
    world = World(tmp_path)
    folder, number = link(world, dataset, cases), dataset[len("Dataset") :].split("_")[0]
    checkpoint, weights = shared_folder() / "reference" / "golden" / "p12_ckpt.pth", tmp_path / "weights.pth"
    world.run(f"hiendmae_import_weights {checkpoint} -o {weights} -num_heads 4")
    world.run(f"nnUNetv2_plan_and_preprocess -d {number} -c 3d_fullres -np 2 -npfp 2")
    # 3 mm instead of 1.5 mm: an eighth of the tiles to predict.
    planner = f"nnUNetv2_plan_and_preprocess -d {number} -c 3d_fullres -np 2 -npfp 2 -pl HiEndMAEPlanner"
    world.run(f"{planner} -overwrite_target_spacing 3 3 3")
    ours = plans_of(folder, "HiEndMAEPlans")
    assert (ours["patch_size"], ours["normalization_schemes"]) == ([96, 96, 96], ["HUWindowNormalization"])
    for plans in ("nnUNetPlans", "HiEndMAEPlans"):
        world.run(f"hiendmae_plan -d {number} -p {plans} --weights {weights} {SHORT}")
        log = train_and_predict(world, dataset, fold, f"{plans}_hiendmae")
        assert f"{weights} (named by the plans)" in log
        # 503 has lungs among its organs, so its default plans keep the window; ours always do.
        assert ("cuts into the window" in log) == (plans == "nnUNetPlans" and "501" in dataset)
