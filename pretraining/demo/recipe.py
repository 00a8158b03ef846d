"""What the demo does: its sizes, and the commands that a user would type."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.checks import Size

UNLABELLED, LABELLED = "Dataset998_PhantomsUnlabelled", "Dataset999_Phantoms"
PRETRAINED, SCRATCH = "nnUNetTrainerHiEndMAE", "nnUNetTrainerHiEndMAE_scratch"
PLANS = "DemoPlans"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes that a device gets through in five minutes."""

    voxel_mm: float
    preset: str
    num_unlabelled: int = 20
    num_labelled: int = 5
    """nnU-Net's fold 0 trains on four of them and validates on the fifth."""
    num_test: int = 4
    pretrain_steps: int
    pretrain_batch: int
    crop_size: Size
    """Of pre-training, voxels."""
    patch_size: Size
    """Of fine-tuning, voxels ``(z, y, x)``."""
    batch_size: int
    feature_size: int
    initial_lr: float
    layer_decay: float
    epochs: int
    iterations: int
    """An epoch."""
    loaders: int
    """``nnUNet_n_proc_DA``."""


CPU = Recipe(
    voxel_mm=7,
    preset="pico",
    pretrain_steps=200,
    pretrain_batch=4,
    crop_size=(24, 24, 24),
    patch_size=(24, 24, 24),
    batch_size=2,
    feature_size=12,
    initial_lr=1.5e-3,
    layer_decay=0.9,
    epochs=9,
    iterations=28,
    loaders=0,
)
CUDA = Recipe(
    voxel_mm=5,
    preset="nano",
    pretrain_steps=2000,
    pretrain_batch=32,
    crop_size=(32, 32, 32),
    patch_size=(40, 40, 48),
    batch_size=4,
    feature_size=24,
    initial_lr=2e-3,
    layer_decay=0.9,
    epochs=25,
    iterations=40,
    loaders=2,
)
RECIPES = {"cpu": CPU, "mps": CPU, "cuda": CUDA}


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command line, and how to see how far it is: by files, or by lines in them."""

    text: str
    files: str
    """Glob below the demo's folder."""
    line: str = ""
    """Lines with this are counted; empty: the files are."""
    total: int = 1
    """The count when it is finished."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Commands that run at the same time."""

    name: str
    what: str
    """One sentence for the user."""
    makes: tuple[str, ...]
    """Globs below the demo's folder: removed before the step starts again."""
    commands: tuple[Command, ...]
    threads: int = 1
    """At least so many a command: PyTorch convolves single images slowly with one."""


def settings(recipe: Recipe, device: str, seed: int) -> dict[str, Any]:
    """What makes two demos the same, as plain data."""
    sizes = {name: list(getattr(recipe, name)) for name in ("crop_size", "patch_size")}
    return {**asdict(recipe), **sizes, "device": device, "seed": seed}


def steps(recipe: Recipe, device: str, seed: int, out: Path) -> list[Step]:
    """Everything after the phantoms, in order."""
    return [
        prepare(recipe),
        pretrain(recipe, device, seed),
        plan(recipe),
        fine_tune(recipe, device),
        *predict(recipe, device, out),
    ]


def prepare(recipe: Recipe) -> Step:
    mm = " ".join([f"{recipe.voxel_mm:g}"] * 3)
    return Step(
        name="prepare",
        what="Both data sets are brought to one voxel size and one intensity window.",
        makes=("nnUNet_preprocessed",),
        commands=(
            Command(
                text=f"hiendmae_plan_and_preprocess -d 998 -spacing {mm} -np 1",
                files=f"nnUNet_preprocessed/{UNLABELLED}/*/*.b2nd",
                total=recipe.num_unlabelled,
            ),
            Command(
                text="nnUNetv2_plan_and_preprocess -d 999 -pl HiEndMAEPlanner -c 3d_fullres -np 1 -npfp 1 "
                f"-overwrite_target_spacing {mm}",
                files=f"nnUNet_preprocessed/{LABELLED}/*/*.pkl",
                total=recipe.num_labelled,
            ),
        ),
    )


def pretrain(recipe: Recipe, device: str, seed: int) -> Step:
    return Step(
        name="pretrain",
        what="Three quarters of each crop are hidden; the network learns to rebuild them. No labels.",
        makes=(f"nnUNet_results/{UNLABELLED}",),
        commands=(
            Command(
                text=f"hiendmae_pretrain -d 998 -preset {recipe.preset} -device {device} "
                f"-steps {recipe.pretrain_steps} -batch_size {recipe.pretrain_batch} "
                f"-crop_size {' '.join(map(str, recipe.crop_size))} "
                f"-val_every {recipe.pretrain_steps // 4} -preview_epochs 0 --no_augmentation "
                f"-num_workers {recipe.loaders} -seed {seed}",
                files=f"nnUNet_results/{UNLABELLED}/*/*/metrics.jsonl",
                line="crops_per_s",
                total=-(-recipe.pretrain_steps // 10),
            ),
        ),
    )


def plan(recipe: Recipe) -> Step:
    patch = " ".join(map(str, recipe.patch_size))
    return Step(
        name="plan",
        what="Settings of the fine-tuning go into nnU-Net's plans.",
        makes=(f"nnUNet_preprocessed/{LABELLED}/{PLANS}.json",),
        commands=(
            Command(
                text=f"hiendmae_plan -d 999 -p HiEndMAEPlans -plans_name {PLANS} -patch_size {patch} "
                f"-batch_size {recipe.batch_size} --architecture {recipe.preset} --feature_size {recipe.feature_size} "
                f"--epochs {recipe.epochs} --num_iterations_per_epoch {recipe.iterations} "
                f"--num_val_iterations_per_epoch 1 --initial_lr {recipe.initial_lr:g} "
                f"--layer_decay {recipe.layer_decay:g} --no_augmentation --batch_dice",
                files=f"nnUNet_preprocessed/{LABELLED}/{PLANS}.json",
            ),
        ),
    )


def fine_tune(recipe: Recipe, device: str) -> Step:
    return Step(
        name="fine_tune",
        what=f"nnU-Net learns six organs from {recipe.num_labelled - 1} labelled phantoms, once from the pre-trained "
        "encoder, once from scratch.",
        makes=(f"nnUNet_results/{LABELLED}",),
        commands=tuple(
            Command(
                text=f"nnUNetv2_train 999 3d_fullres 0 -p {PLANS} -tr {trainer} -device {device}",
                files=f"nnUNet_results/{LABELLED}/{trainer}__*/fold_0/training_log_*.txt",
                line="Epoch time",
                total=recipe.epochs,
            )
            for trainer in (PRETRAINED, SCRATCH)
        ),
        threads=2,
    )


def predict(recipe: Recipe, device: str, out: Path) -> tuple[Step, Step]:
    """Test cases segmented, and compared with their labels."""
    raw, predictions = out / "nnUNet_raw" / LABELLED, out / "predictions"
    return (
        Step(
            name="predict",
            what=f"Both networks segment {recipe.num_test} phantoms that neither has seen.",
            makes=("predictions",),
            commands=tuple(
                Command(
                    text=prediction(raw / "imagesTs", predictions / trainer, trainer, device),
                    files=f"predictions/{trainer}/*.nii.gz",
                    total=recipe.num_test,
                )
                for trainer in (PRETRAINED, SCRATCH)
            ),
            threads=2,
        ),
        Step(
            name="evaluate",
            what="Dice of every organ: 1 is the truth, 0 is nothing of it.",
            makes=("predictions/*/summary.json",),
            commands=tuple(
                Command(
                    text=f"nnUNetv2_evaluate_folder {quoted(raw / 'labelsTs')} {quoted(predictions / trainer)} "
                    f"-djfile {quoted(raw / 'dataset.json')} "
                    f"-pfile {quoted(predictions / trainer / 'plans.json')} -np 1",
                    files=f"predictions/{trainer}/summary.json",
                )
                for trainer in (PRETRAINED, SCRATCH)
            ),
        ),
    )


def prediction(images: Path, into: Path, trainer: str, device: str) -> str:
    """The command line that segments a folder."""
    return (
        f"nnUNetv2_predict -i {quoted(images)} -o {quoted(into)} -d 999 -c 3d_fullres -f 0 -p {PLANS} -tr {trainer} "
        f"-device {device} --disable_tta -step_size 0.7 -npp 1 -nps 1"
    )


def quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))
