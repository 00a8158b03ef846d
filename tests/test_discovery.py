"""nnU-Net finds our classes, and the two packages depend on each other in one direction only."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nnunetv2
import pytest
from conftest import World
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

import nnunetv2_hiendmae

PACKAGE = Path(nnunetv2_hiendmae.__file__).parent


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("trainer", "nnUNetTrainerHiEndMAE"),
        ("trainer", "nnUNetTrainerHiEndMAE_scratch"),
        ("benchmark.trainer", "nnUNetTrainerBudget"),
        ("benchmark.trainer", "nnUNetPrimusBudget"),
        ("benchmark.trainer", "nnUNetPrimusV2Budget"),
    ],
)
def test_nnunet_finds_the_trainer_a_plain_import_gives(module: str, name: str) -> None:
    # nnUNetv2_train and nnUNetPredictor both resolve the trainer through this function.
    assert recursive_find_trainer_class_by_name(name) is getattr(
        importlib.import_module(f"nnunetv2_hiendmae.{module}"), name
    )


@pytest.mark.parametrize(
    ("folder", "name", "module"),
    [
        ("experiment_planning", "HiEndMAEPlanner", "nnunetv2_hiendmae.nnunet.planner"),
        ("preprocessing/normalization", "HUWindowNormalization", "nnunetv2_hiendmae.nnunet.normalization"),
    ],
)
def test_nnunet_finds_planner_and_normalization(folder: str, name: str, module: str) -> None:
    where = os.path.join(nnunetv2.__path__[0], folder)
    found = recursive_find_python_class(where, name, f"nnunetv2.{folder.replace('/', '.')}")
    assert found is getattr(importlib.import_module(module), name)


def test_ext_trainer_door_gives_the_same_class() -> None:
    # Where nnunetv2 is a source checkout, the door folder is named in nnUNet_extTrainer.
    found = recursive_find_python_class(str(PACKAGE / "doors" / "trainer"), "nnUNetTrainerHiEndMAE", None)
    assert found is importlib.import_module("nnunetv2_hiendmae.nnunet.trainer").nnUNetTrainerHiEndMAE


@pytest.mark.slow
def test_a_class_that_nnunet_renames_hides_nothing_of_ours(world: World, pretrained: Path) -> None:
    """Another nnU-Net may lack its Primus trainers: ours are found, train, continue to validation, and predict."""
    site = world.root / "no_primus"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(
        "import sys\nsys.modules['nnunetv2.training.nnUNetTrainer.primus.primus_trainers'] = None\n", encoding="utf-8"
    )
    env = {"PYTHONPATH": str(site), "HIENDMAE_WEIGHTS": str(pretrained)}
    assert "ModuleNotFoundError" in world.run("nnUNetv2_train 901 3d_fullres 0 -tr nnUNetPrimusBudget", ok=False, **env)
    world.run(
        "hiendmae_plan -d 901 -plans_name noprimus --epochs 1 --num_iterations_per_epoch 1 "
        "--num_val_iterations_per_epoch 1 --feature_size 4 -patch_size 16 16 16 -batch_size 2",
        **env,
    )
    world.run("nnUNetv2_train 901 3d_fullres 0 -tr nnUNetTrainerHiEndMAE -p noprimus -device cpu", **env)
    images = world.root / "raw" / "Dataset901_TestPhantom" / "imagesTr"
    one = world.root / "one_image"
    one.mkdir()
    shutil.copy(sorted(images.glob("*.nii.gz"))[0], one)
    world.run(
        f"nnUNetv2_predict -i {one} -o {world.root / 'noprimus_out'} -d 901 -c 3d_fullres -f 0 -p noprimus "
        "-tr nnUNetTrainerHiEndMAE -device cpu --disable_tta -npp 1 -nps 1",
        **env,
    )
    assert list((world.root / "noprimus_out").glob("*.nii.gz"))


def test_using_weights_never_imports_making_them() -> None:
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "pretraining" for name in names), file


def test_package_imports_where_pretraining_is_absent() -> None:
    modules = [".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts) for p in PACKAGE.rglob("*.py")]
    code = f"import sys; sys.modules['pretraining'] = None\nfor m in {modules!r}: __import__(m)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
