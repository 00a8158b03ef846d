"""Long: the documentation's commands are copied and run, on phantoms and with what makes them small appended."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT, World

from pretraining.phantom import write_phantoms

BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
SPACING = (8.0, 8.0, 10.0)

# What is appended to a command: the last value of a flag counts.
APPENDED = {
    "hiendmae_pretrain": "-preset tiny -device cpu -steps 2 -batch_size 4 -crop_size 16 16 16 -num_workers 0 -run d$$",
    "hiendmae_plan": "--feature_size 4",
    "hiendmae_pack": "-np 1",
    "hiendmae_benchmark": "",
    "nnUNetv2_plan_and_preprocess": "-np 1 -npfp 1 -overwrite_target_spacing 8 8 8",
    "nnUNetv2_train": "-device cpu",
    "nnUNetv2_predict": "-device cpu --disable_tta -npp 1 -nps 1",
}
# Pages in an order in which each finds what it needs. Not here, because another test or CI runs it: pip, the demo
# (test_demo), the benchmark (test_benchmark), the authors' weights (test_import_weights), pictures (test_visualize),
# zip files and the hub (test_share), packing with the speed measurement (test_speed), the experiments (by hand, on
# real CT). The SLURM script and the export lines are not run.
PAGES = (
    "getting-started.md",
    "how-to/dicom-folders.md",
    "how-to/your-own-scans.md",
    "how-to/several-data-sets.md",
    "how-to/slurm.md",
    "how-to/few-labels.md",
    "reference/plans-block.md",
)
NOT_RUN = ("pip install", "export nnUNet_raw", "#!/bin/bash")

SHORT_TRAINING = """
import json, sys
from pathlib import Path
from nnunetv2_hiendmae.files import preprocessed_folder
name = sys.argv[sys.argv.index("-p") + 1] if "-p" in sys.argv else "nnUNetPlans"
file = preprocessed_folder(sys.argv[1]) / f"{name}.json"
plans = json.loads(file.read_text(encoding="utf-8"))
plan = plans["configurations"]["3d_fullres"]
plan["hiendmae"] = plan.get("hiendmae", {}) | {
    "num_epochs": 1, "num_iterations_per_epoch": 1, "num_val_iterations_per_epoch": 1, "feature_size": 4,
    "no_mirroring": True
}
plan["patch_size"], plan["batch_size"] = [16, 16, 16], 2
file.with_suffix(".own").write_bytes(file.read_bytes())
file.write_text(json.dumps(plans), encoding="utf-8")
"""


def write_wrappers(folder: Path) -> None:
    """Programs of the commands' names that call the real ones, made small."""
    folder.mkdir()
    real = Path(sys.executable).parent
    for name, flags in APPENDED.items():
        write_script(folder / name, f'exec {real / name} "$@" {flags}')
    train = (
        f'{sys.executable} -c \'{SHORT_TRAINING}\' "$@" && {real / "nnUNetv2_train"} "$@" {APPENDED["nnUNetv2_train"]}'
    )
    restore = 'for own in "$nnUNet_preprocessed"/*/*.own; do mv "$own" "${own%.own}.json"; done'
    write_script(folder / "nnUNetv2_train", f"{train}; code=$?; {restore}; exit $code")
    prepare = f'exec {real / "hiendmae_plan_and_preprocess"} "$@" -np 1'
    write_script(
        folder / "hiendmae_plan_and_preprocess",
        f'case "$*" in *-num_parts*) {prepare} ;; *) {prepare} -spacing 8 8 8 ;; esac',
    )
    write_script(folder / "hiendmae_ingest", f'exec {real / "hiendmae_ingest"} "$@" -i heap -np 1')
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2"
    write_script(folder / "torchrun", f'exec {launcher} "${{@:9}}" {APPENDED["hiendmae_pretrain"]}')


def write_script(file: Path, line: str) -> None:
    file.write_text(f"#!/bin/bash\n{line}\n", encoding="utf-8")
    file.chmod(0o755)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Labelled data set 17; 500, 501 and 502 without labels; a heap of scans."""
    root = tmp_path_factory.mktemp("docs")
    raw = root / "raw"
    write_phantoms(raw, "Dataset017_Organs", num_training=20, num_test=2, spacing=SPACING)
    for seed, number in enumerate((500, 501, 502), 1):
        folder = write_phantoms(raw, f"Dataset{number}_Scans", num_training=4, num_test=0, seed=seed, spacing=SPACING)
        shutil.rmtree(folder / "labelsTr")
    heap = write_phantoms(root, "heap", num_training=3, num_test=0, seed=9, spacing=SPACING)
    for unwanted in ("labelsTr", "dataset.json"):
        path = heap / unwanted
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_wrappers(root / "bin")
    shutil.copytree(raw / "Dataset017_Organs" / "imagesTs", root / "INPUT")
    return World(root)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_documented_commands_run(place: World) -> None:
    """In one place, one page after the other; each page's reader has data, and no pre-training of another page."""
    env = {**place.env, "HOST": "localhost", "SLURM_ARRAY_TASK_ID": "1"}
    env["PATH"] = f"{place.root / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin"
    ran = 0
    weights = place.root / "weights.pth"
    for page in PAGES:
        for run in (place.root / "results").glob("*/HiEndMAE__*"):
            shutil.rmtree(run)
        for block in BLOCK.findall((CHECKOUT / "docs" / page).read_text(encoding="utf-8")):
            if block.startswith(NOT_RUN):
                continue
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block], cwd=place.root, env=env, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, check=False, encoding="utf-8",
            )  # fmt: skip
            assert done.returncode == 0 and "Traceback" not in done.stdout, f"{page}\n{block}\n{done.stdout[-4000:]}"
            ran += 1
            made = next((place.root / "results").rglob("encoder_weights.pth"), None)
            if made and not weights.exists():
                shutil.copy(made, weights)
    assert ran >= 10
    assert len(list((place.root / "OUTPUT").glob("*.nii.gz"))) == 2
    commands = (place.root / "few" / "commands.sh").read_text(encoding="utf-8")
    assert commands.count("nnUNetv2_train") == 27
