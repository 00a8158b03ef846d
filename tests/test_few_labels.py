"""The few-label comparisons: their reports follow from the archived run folders, and run.sh makes the last."""

from __future__ import annotations

import csv
import json
import lzma
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import shared_folder
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunetv2_hiendmae.benchmark.arms import plans_name, trainer_class
from nnunetv2_hiendmae.benchmark.grid import read_grid
from nnunetv2_hiendmae.benchmark.overlap import OVERLAP_FILE
from nnunetv2_hiendmae.benchmark.record import FINAL, count_parameters
from nnunetv2_hiendmae.benchmark.shifts import SHIFTS
from nnunetv2_hiendmae.files import read_json
from nnunetv2_hiendmae.nnunet.padding import PadWithAir
from nnunetv2_hiendmae.nnunet.trainer import nnUNetTrainerHiEndMAE

KEPT = Path(__file__).parents[1] / "docs" / "few_labels"
sys.path.insert(0, str(KEPT))

from archive import (  # noqa: E402 - a script beside the reports
    ARCHIVE,
    keep_report,
    read_archive,
    report_again,
    run_files,
    write_archive,
)
from second_region import auc, dice, ellipsoid, measure  # noqa: E402


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``results``, ``preprocessed`` and ``report*`` of the archive of the comparisons on development cases."""
    folder = tmp_path_factory.mktemp("runs")
    read_archive(KEPT / ARCHIVE, folder)
    return folder


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the comparison on test cases, with predictions."""
    folder = tmp_path_factory.mktemp("tested")
    read_archive(KEPT / "test" / ARCHIVE, folder)
    return folder


@pytest.fixture(scope="module")
def controls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the controls on test cases."""
    folder = tmp_path_factory.mktemp("controls")
    read_archive(KEPT / "controls" / ARCHIVE, folder)
    return folder


def made(work: Path, grid: str = "grid.json", kept: str = "report") -> Path:
    """A folder as ``run.sh`` leaves it, with what the kept report had seen."""
    folder = work / Path(kept).name.replace("report", "few_labels")
    folder.mkdir()
    shutil.copy(KEPT / grid, folder / "grid.json")
    for file in (KEPT / kept / "provenance.json", *(KEPT / kept).glob(OVERLAP_FILE)):
        shutil.copy(file, folder)
    return folder


LONGER = [
    pytest.param("grid_long.json", "report_long", marks=pytest.mark.slow),
    pytest.param("grid_augmented.json", "report_augmented", marks=pytest.mark.slow),
    pytest.param("grid_controls_cpu.json", "controls/report_controls_cpu", marks=pytest.mark.slow),
    pytest.param("grid_one_label_cpu.json", "controls/report_one_label_cpu", marks=pytest.mark.slow),
]
FIXTURES = {"test": "tested", "controls": "controls"}  # by the folder that a report is kept in


@pytest.mark.parametrize(
    ("grid", "kept"), [("grid.json", "report"), ("grid_test_cpu.json", "test/report_test_cpu"), *LONGER]
)
def test_report_follows_from_the_kept_runs(
    grid: str, kept: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    runs = request.getfixturevalue(FIXTURES.get(Path(kept).parent.name, "runs"))
    out, again = tmp_path / "out", tmp_path / "again"
    done = report_again(runs, made(tmp_path, grid, kept), out)
    assert done.returncode == 0, done.stderr
    assert (out / "cases.csv").read_bytes() == (runs / Path(kept).name / "cases.csv").read_bytes()
    keep_report(out, again)
    files = {file.name: file for file in (KEPT / kept).iterdir() if file.name != "other_cases.txt"}
    assert {file.name for file in again.iterdir()} == set(files) and len(files) > 8
    for name, file in files.items():
        if file.suffix != ".svg":  # drawn a little differently by another matplotlib
            assert (again / name).read_bytes() == file.read_bytes(), name


def test_archive_is_made_again_from_what_is_in_it(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All run folders of the three grids and nothing else: no network, no log, and the same bytes."""
    for kind in ("preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(runs / kind))
    files = {f"{folder.name}/cases.csv": folder / "cases.csv" for folder in runs.glob("report*")}
    for grid in ("grid", "grid_long", "grid_augmented"):
        files |= run_files(read_grid(KEPT / f"{grid}.json"))
    assert sorted(files) == sorted(f.relative_to(runs).as_posix() for f in runs.rglob("*") if f.is_file())
    assert len(files) == 357 and not [name for name in files if name.endswith(".pth")]
    write_archive(files, tmp_path / ARCHIVE)
    again, kept = (lzma.decompress((folder / ARCHIVE).read_bytes()) for folder in (tmp_path, KEPT))
    assert again == kept


@pytest.mark.parametrize(
    ("archive", "name"), [("tested", "test_cpu"), ("controls", "controls_cpu"), ("controls", "one_label_cpu")]
)
def test_kept_predictions_have_the_dice_of_the_report(archive: str, name: str, request: pytest.FixtureRequest) -> None:
    """Counted anew, voxel by voxel, for every network, test case and organ."""
    tested: Path = request.getfixturevalue(archive)
    labels = shared_folder() / "data" / "Dataset504_OpenKBPTest"
    organs = {name: label for name, label in read_json(labels / "dataset.json")["labels"].items() if label}
    references = {f.name.removesuffix(".nii.gz"): voxels(f) for f in (labels / "labelsTr").glob("*.nii.gz")}
    grid = read_grid(KEPT / f"grid_{name}.json")
    entries = read_json(tested / "preprocessed" / grid.datasets[0] / "hiendmae_label_budgets.json")
    index = {(str(e["cases"]), str(e["seed"])): e["index"] for e in entries}
    trainers = {arm.name: f"{arm.trainer}__{plans_name(grid, arm)}" for arm in grid.arms}
    counted = {}
    with (tested / f"report_{name}" / "cases.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            fold = f"fold_{index[row['labels'], row['seed']]}"
            folder = tested / "predictions" / grid.datasets[0] / f"{trainers[row['arm']]}__3d_fullres" / fold
            prediction = folder / "validation" / f"{row['case']}.nii"
            if prediction not in counted:
                counted[prediction] = voxels(prediction)
            ours, theirs = (a == organs[row["organ"]] for a in (counted[prediction], references[row["case"]]))
            assert float(row["dice"]) == pytest.approx(2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()))
    kept = [file for t in trainers.values() for file in tested.glob(f"predictions/*/{t}__*/*/validation/*.nii")]
    assert len(references) == 16 and set(counted) == set(kept)


def test_robustness_follows_from_its_cases(controls: Path) -> None:
    """Unchanged scans have the Dice of the report's predictions, and the table has the means over cases."""
    with lzma.open(KEPT / "controls" / "robustness_cases.csv.xz", "rt", encoding="utf-8") as file:
        scores = {
            (r["arm"], r["change"], r["case"], r["organ"], r["labels"], r["seed"]): float(r["dice"])
            for r in csv.DictReader(file)
        }
    with (controls / "report_controls_cpu" / "cases.csv").open(encoding="utf-8") as file:
        reported = [
            (scores.get((r["arm"], "unchanged", r["case"], r["organ"], r["labels"], r["seed"])), float(r["dice"]))
            for r in csv.DictReader(file)
        ]
    assert [a for a, _ in reported if a is not None] == pytest.approx([b for a, b in reported if a is not None])
    assert sum(a is not None for a, _ in reported) == 2 * 16 * 5
    rows = list(csv.DictReader((KEPT / "controls" / "robustness.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["change"] for row in rows] == [shift.name for shift in SHIFTS]
    for arm in ("hiendmae", "nnunet_time"):
        means = [np.mean([v for k, v in scores.items() if k[:2] == (arm, row["change"])]) for row in rows]
        told = [float(row[arm].split(" ")[0]) for row in rows]
        assert told == pytest.approx([means[0], *(mean - means[0] for mean in means[1:])], abs=0.0006)


def voxels(file: Path) -> np.ndarray:
    """The labels of a volume."""
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    return array


@pytest.mark.parametrize(("grid", "augmented"), [("grid", False), ("grid_long", False), ("grid_augmented", True)])
def test_all_arms_are_augmented_alike(
    grid: str, augmented: bool, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nnU-Net did not record the transforms of these runs: what the trainers make of the kept plans is the evidence."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_preprocessed", str(runs / "preprocessed"))
    planned = read_grid(KEPT / f"{grid}.json")
    folder = runs / "preprocessed" / planned.datasets[0]
    made = set()
    for arm in planned.arms:
        plans, dataset = (read_json(folder / f"{name}.json") for name in (plans_name(planned, arm), "dataset"))
        plans["continue_training"] = False  # as nnUNetv2_train
        trainer = trainer_class(arm.trainer)(plans, "3d_fullres", 0, dataset, torch.device("cpu"))
        if isinstance(trainer, nnUNetTrainerHiEndMAE):  # as when it is initialised, with whatever weights
            trainer.settings = trainer.settings.resolved_scratch()
        rotation, dummy_2d, patch_size, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        transforms = trainer.get_training_transforms(
            trainer.configuration_manager.patch_size, rotation, None, axes, dummy_2d,
            use_mask_for_norm=trainer.configuration_manager.use_mask_for_norm, is_cascaded=False,
            foreground_labels=trainer.label_manager.foreground_labels, regions=None, ignore_label=None,
        )  # fmt: skip
        steps = [step for step in transforms.transforms if not isinstance(step, PadWithAir)]
        made.add(f"{list(patch_size)} {steps}")
    (only,) = made
    assert ("GaussianNoiseTransform" in only) == augmented and "MirrorTransform" not in only


def test_differences_of_other_cases_are_those_of_their_means() -> None:
    tables = (KEPT / "report_augmented" / "other_cases.txt").read_text(encoding="utf-8").split("\n\n")
    means = {line.split(" | ")[0]: line.split(" | ")[2:] for line in tables[0].splitlines() if " | mean | " in line}
    differences = [line.split(" | ") for line in tables[3].splitlines() if " | dice | " in line]
    assert len(means) == 2 and len(differences) == 4
    for row, (labels, _, _, cases, difference, interval, *_) in enumerate(differences):
        reference, *others = (float(cell.split(" (")[0]) for cell in means[labels])
        low, high = (float(bound) for bound in interval.split(" … "))
        assert abs(others[row % 2] - reference - float(difference)) < 0.0016 and cases == "14"  # three rounded numbers
        assert low < float(difference) < high


def test_changed_and_missing_summaries_are_noticed(runs: Path, tmp_path: Path) -> None:
    changed, out = tmp_path / "runs", tmp_path / "out"
    shutil.copytree(runs, changed)
    first, second = sorted(changed.glob("results/*/*_few_hiendmae__*/fold_*/validation/summary.json"))[:2]
    first.write_text(first.read_text(encoding="utf-8").replace('"Dice": 0.', '"Dice": 0.9', 1), encoding="utf-8")
    second.unlink()
    done = report_again(changed, made(tmp_path), out)
    assert done.returncode == 1
    assert done.stderr.count(": CHANGED: ") == 1 and "though an earlier report or run had one" in done.stderr
    rows = csv.DictReader((out / "runs.csv").read_text(encoding="utf-8").splitlines())
    assert {row["status"] for row in rows} == {"finished", "CHANGED", "MISSING"}


def network_of(model: Path) -> nn.Module:
    """The untrained network of a results folder, made as ``nnUNetv2_predict`` makes it."""
    plans = PlansManager(read_json(model / "plans.json"))
    trainer, _, configuration = model.name.split("__")
    labels = plans.get_label_manager(read_json(model / "dataset.json"))
    return trainer_class(trainer).build_network_architecture(
        plans, plans.get_configuration(configuration), 1, labels.num_segmentation_heads, False
    )


def test_networks_of_the_kept_plans_have_the_recorded_numbers(runs: Path) -> None:
    """Networks are not kept; those that the plans in the results describe have as many parameters as were counted."""
    records = sorted(runs.glob("results/*/*/fold_*/hiendmae_run.json"))
    assert len(records) == 78
    counted = {model: count_parameters(network_of(model).state_dict()) for model in {r.parents[1] for r in records}}
    for record in records:
        model = record.parents[1]
        map_of_intensities = 3 if "HiEndMAE" in model.name else 0  # was saved with the weights then
        assert read_json(record)["parameters"] == counted[model] + map_of_intensities, record


def test_figures_of_the_second_region(tmp_path: Path) -> None:
    """Of a tumour that is the ellipsoid itself, and of real ones, which lie 51 mm from every side."""
    tumour = ellipsoid((40, 70, 60), np.array([4.0, 2.0, 3.0]), 50)
    assert dice(tumour, tumour) == 1 and dice(tumour, ~tumour) == 0
    assert [auc(np.array(a), np.array([1, 2, 3, 4])) for a in ([9], [2], [0])] == [1, 0.375, 0]
    hu = np.where(tumour, 60, 20).astype(np.int16)
    for name, array in (("image", hu), ("label", tumour.astype(np.uint8))):
        volume = sitk.GetImageFromArray(array)
        volume.SetSpacing((3.0, 2.0, 4.0))
        sitk.WriteImage(volume, tmp_path / f"{name}.nii.gz")
    made = measure(tmp_path / "image.nii.gz", tmp_path / "label.nii.gz")
    assert made["dice"] == made["auc"] == 1 and (made["margins"] - 50 < 4).all() and (made["margins"] >= 50).all()
    data = shared_folder() / "data" / "Dataset502_Sarcoma"
    for case in ("sts_008", "sts_010"):
        real = measure(data / "imagesTr" / f"{case}_0000.nii.gz", data / "labelsTr" / f"{case}.nii.gz")
        assert (abs(real["margins"] - 51) < 2).all() and real["dice"] > 0.7 and 0.4 < real["auc"] < 0.6


@pytest.mark.slow
def test_other_cases(runs: Path, tmp_path: Path) -> None:
    """Networks predict volumes of the right kind, and one that is not there is shown as missing."""
    from pretraining.phantom import write_phantoms

    write_phantoms(tmp_path, "Dataset904_Other", num_training=2, num_test=0, spacing=(10.0, 10.0, 10.0))
    raw, here = tmp_path / "Dataset904_Other", tmp_path / "here"
    read_archive(KEPT / ARCHIVE, here)
    grid = read_json(KEPT / "grid.json") | {"labels": [1], "seeds": [0]}
    (tmp_path / "grid.json").write_text(json.dumps(grid), encoding="utf-8")
    for arm in grid["arms"][:3]:
        (model,) = here.glob(f"results/*/{arm['trainer']}__*_few_{arm['name']}__3d_fullres")
        network = {"trainer_name": arm["trainer"], "network_weights": network_of(model).state_dict()}
        network |= {"init_args": {"configuration": "3d_fullres"}, "inference_allowed_mirroring_axes": None}
        for fold in model.glob("fold_*"):
            torch.save(network, fold / FINAL)
    words = [KEPT / "other_cases.py", tmp_path / "grid.json", raw / "imagesTr", raw / "labelsTr", tmp_path / "work"]
    env = os.environ | {f"nnUNet_{kind}": str(here / kind) for kind in ("preprocessed", "results")}
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "work").rglob("*.nii.gz"))) == 2 * 3
    (mean,) = [line.split(" | ") for line in done.stdout.split("\n\n")[0].splitlines() if " | mean | " in line]
    assert [cell.startswith("missing") for cell in mean[2:]] == [False, False, False, True], mean


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_script_runs_from_raw_data_to_the_report(tmp_path: Path) -> None:
    """run.sh itself on phantoms, with fewer steps, epochs, labels and label subsets."""
    from pretraining.phantom import write_phantoms

    here, raw, work = (tmp_path / name for name in ("few_labels", "raw", "work"))
    for folder in (here, work):
        folder.mkdir()
    names = ("Dataset500_OpenKBPUnlabelled", "Dataset501_OpenKBP", "Dataset504_OpenKBPTest")
    for seed, (name, cases) in enumerate(zip(names, (3, 3, 1), strict=True)):
        write_phantoms(raw, name, num_training=cases, num_test=0, seed=10 * seed, spacing=(6.0, 6.0, 6.0))
    for folder in ("imagesTr", "labelsTr"):  # phantoms are numbered; patients of two sets have different names
        for file in (raw / names[2] / folder).iterdir():
            file.rename(file.with_name(f"test_{file.name}"))
    script = (KEPT / "run.sh").read_text(encoding="utf-8")
    assert script.count("-steps 10000") == 1
    (here / "run.sh").write_text(script.replace("-steps 10000", "-steps 2"), encoding="utf-8")
    shutil.copy(KEPT / "study_data.py", here)
    grid = read_json(KEPT / "grid_test_cpu.json")
    grid |= {"labels": [1], "seeds": [0], "num_epochs": 1, "num_iterations_per_epoch": 2}
    (here / "grid_test_cpu.json").write_text(json.dumps(grid), encoding="utf-8")

    env = os.environ | {f"nnUNet_{kind}": str(tmp_path / kind) for kind in ("raw", "preprocessed", "results")}
    env |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for name in ("nnUNet_n_proc_DA", "nnUNet_def_n_proc", "OMP_NUM_THREADS"):
        env.pop(name, None)
    done = subprocess.run(
        ["bash", here / "run.sh"], cwd=work, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    made = work / "few_labels_test_cpu"
    rows = list(csv.DictReader((made / "runs.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["status"] for row in rows] == ["finished"] * 4
    cases = {row["case"] for row in csv.DictReader((made / "cases.csv").read_text(encoding="utf-8").splitlines())}
    assert len(cases) == 1 and next(iter(cases)).startswith("test_")

    kept = tmp_path / "kept"
    done = subprocess.run(
        [sys.executable, KEPT / "archive.py", work, kept], env=env, capture_output=True, encoding="utf-8", check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (kept / "report_test_cpu" / "dice.csv").read_bytes() == (made / "dice.csv").read_bytes()


def test_the_recipes_differ_in_what_they_say() -> None:
    """The grid for a GPU adds two networks and was never run; the controls are trained and tested as the others."""
    cpu, gpu, controls = (read_grid(KEPT / f"grid_{name}.json") for name in ("test_cpu", "test_gpu", "controls_cpu"))
    assert replace(controls, name=cpu.name, arms=cpu.arms, labels=cpu.labels) == cpu
    assert controls.arms[0] == cpu.arms[0] and set(controls.labels) < set(cpu.labels)
    assert [arm.name for arm in controls.arms if arm.num_epochs] == ["hiendmae_long", "nnunet_time", "resenc_l_time"]
    one_label = read_grid(KEPT / "grid_one_label_cpu.json")
    assert replace(one_label, name=controls.name, arms=controls.arms, labels=controls.labels) == controls
    assert all(arm in controls.arms for arm in one_label.arms) and one_label.labels == (1,)
    assert [arm.name for arm in gpu.arms] == [arm.name for arm in cpu.arms] + ["resenc_l", "primus_m"]
    assert set(cpu.labels) < set(gpu.labels) and cpu.seeds == gpu.seeds == (0, 1, 2)
