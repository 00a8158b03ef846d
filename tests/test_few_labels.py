"""The comparison of docs/experiments.md, section 4: its report follows from the run folders that are kept beside it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnunetv2_hiendmae.benchmark.arms import plans_name, trainer_class
from nnunetv2_hiendmae.benchmark.grid import read_grid
from nnunetv2_hiendmae.benchmark.record import count_parameters
from nnunetv2_hiendmae.folders import read_json

KEPT = Path(__file__).parents[1] / "docs" / "few_labels"


def report(
    out: Path, grid: str = "grid.json", kept: str = "report", results: Path = KEPT / "results"
) -> subprocess.CompletedProcess[str]:
    """``hiendmae_benchmark report`` on the kept runs of a grid."""
    shutil.copy(KEPT / grid, out / "grid.json")
    shutil.copy(KEPT / kept / "provenance.json", out)
    env = os.environ | {"nnUNet_raw": str(out), "nnUNet_preprocessed": str(KEPT / "preprocessed")}
    command = [Path(sys.executable).with_name("hiendmae_benchmark"), "report", "-o", str(out)]
    return subprocess.run(
        command, env=env | {"nnUNet_results": str(results)}, capture_output=True, encoding="utf-8", check=False
    )


LONGER = [
    pytest.param("grid_long.json", "report_long", marks=pytest.mark.slow),
    pytest.param("grid_augmented.json", "report_augmented", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("grid", "kept"), [("grid.json", "report"), *LONGER])
def test_report_follows_from_the_kept_runs(grid: str, kept: str, tmp_path: Path) -> None:
    done = report(tmp_path, grid, kept)
    assert done.returncode == 0, done.stderr
    files = [*sorted((KEPT / kept).glob("*.csv")), KEPT / kept / "report.md"]
    assert len(files) > 7
    for file in files:
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("grid", "kept", "heading"),
    [
        ("grid.json", "report", "### Result"),
        ("grid_long.json", "report_long", "### Three times as long"),
        ("grid_augmented.json", "report_augmented", "### Longer pre-training and nnU-Net's augmentation"),
    ],
)
def test_written_tables_are_those_of_the_report(grid: str, kept: str, heading: str) -> None:
    """Section 4 of the experiments cannot drift from the report that it cites."""
    text = (KEPT.parent / "experiments.md").read_text(encoding="utf-8")
    section = text.split(f"\n{heading}\n")[1].split("\n### ")[0]
    written = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    names = {
        "plain_mae": "plain MAE",
        "plain_mae_10k": "plain MAE",
        "nnunet": "nnU-Net",
        "scratch_even": "scratch, one rate",
    }
    in_grid = [arm["name"] for arm in json.loads((KEPT / grid).read_text(encoding="utf-8"))["arms"]]
    for row in csv.DictReader((KEPT / kept / "dice.csv").read_text(encoding="utf-8").splitlines()):
        organ = row["organ"].replace("_", " ")
        arms = [row[arm] for arm in in_grid]
        assert [row["labels"], organ, *arms] in written
    for row in csv.DictReader((KEPT / kept / "comparisons.csv").read_text(encoding="utf-8").splitlines()):
        if row["metric"] != "hd95":
            arm = names.get(row["arm"], row["arm"])
            numbers = [row["difference"], row["95 % interval"], row["p (Holm)"]]
            assert [row["labels"], row["metric"], arm, *numbers] in written


def test_the_short_table_is_that_of_the_reports() -> None:
    text = (KEPT.parent / "experiments.md").read_text(encoding="utf-8")
    table = text.split("\nIn short ")[1].split("\n### ")[0]
    written = [line.strip("| ").split(" | ")[-5:] for line in table.splitlines() if line.startswith("|")][2:]
    rows = [
        row
        for kept in ("report", "report_long", "report_augmented")
        for row in csv.DictReader((KEPT / kept / "dice.csv").read_text(encoding="utf-8").splitlines())
        if row["organ"] == "mean"
    ]
    assert len(written) == len(rows) > 5
    for line, row in zip(written, rows, strict=True):
        means = [cell.split(" (")[0] for cell in list(row.values())[4:8]]
        assert [line[0], *(cell.split(" (")[0] for cell in line[1:])] == [row["labels"], *means]


@pytest.mark.parametrize(("grid", "augmented"), [("grid", False), ("grid_long", False), ("grid_augmented", True)])
def test_all_arms_are_augmented_alike(
    grid: str, augmented: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nnU-Net did not record the transforms of these runs: what the trainers make of the kept plans is the evidence."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_preprocessed", str(KEPT / "preprocessed"))
    planned = read_grid(KEPT / f"{grid}.json")
    folder = KEPT / "preprocessed" / planned.datasets[0]
    made = set()
    for arm in planned.arms:
        plans, dataset = (read_json(folder / f"{name}.json") for name in (plans_name(planned, arm), "dataset"))
        plans["continue_training"] = False  # as nnUNetv2_train
        trainer = trainer_class(arm.trainer)(plans, "3d_fullres", 0, dataset, torch.device("cpu"))
        rotation, dummy_2d, patch_size, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        transforms = trainer.get_training_transforms(
            trainer.configuration_manager.patch_size, rotation, None, axes, dummy_2d,
            use_mask_for_norm=trainer.configuration_manager.use_mask_for_norm, is_cascaded=False,
            foreground_labels=trainer.label_manager.foreground_labels, regions=None, ignore_label=None,
        )  # fmt: skip
        made.add(f"{list(patch_size)} {transforms}")
    (only,) = made
    assert ("GaussianNoiseTransform" in only) == augmented and "MirrorTransform" not in only


def test_written_other_cases_are_those_that_were_printed() -> None:
    text = (KEPT.parent / "experiments.md").read_text(encoding="utf-8")
    section = text.split("\n### Other cases\n")[1].split("\n### ")[0]
    printed = (KEPT / "report_augmented" / "other_cases.txt").read_text(encoding="utf-8").split("\n\n")
    means = [line.split(" | ") for line in printed[0].splitlines() if " | mean | " in line]
    differences = [line.split(" | ")[4:6] for line in printed[3].splitlines() if " | dice | " in line]
    assert len(means) == 2 and len(differences) == 4
    for row, (labels, _, *cells) in enumerate(means):
        for difference, interval in differences[2 * row : 2 * row + 2]:
            low, high = (float(v) for v in interval.split(" … "))
            cells.append(f"{-float(difference):.3f} ({-high:.3f} to {-low:.3f})")  # Hi-End-MAE minus the other
        assert f"| {labels} | {' | '.join(cells)} |" in section


def test_changed_and_missing_summaries_are_noticed(tmp_path: Path) -> None:
    results, out = tmp_path / "results", tmp_path / "out"
    shutil.copytree(KEPT / "results", results, ignore=shutil.ignore_patterns("*.pth", "*.txt"))
    out.mkdir()
    first, second = sorted(results.glob("*/*_few_hiendmae__*/fold_*/validation/summary.json"))[:2]
    first.write_text(first.read_text(encoding="utf-8").replace('"Dice": 0.', '"Dice": 0.9', 1), encoding="utf-8")
    second.unlink()
    done = report(out, results=results)
    assert done.returncode == 1
    assert done.stderr.count(": CHANGED: ") == 1 and "though an earlier report or run had one" in done.stderr
    rows = csv.DictReader((out / "runs.csv").read_text(encoding="utf-8").splitlines())
    assert {row["status"] for row in rows} == {"finished", "CHANGED", "MISSING"}


def test_kept_networks_are_those_of_the_plans() -> None:
    """Every kept network has the numbers that its record counted, and what nnU-Net's prediction reads."""
    files = sorted(KEPT.glob("results/*/*/fold_*/checkpoint_final.pth"))
    assert len(files) == 36
    for file in files:
        checkpoint = torch.load(file, map_location="cpu", weights_only=False)
        count = count_parameters(checkpoint["network_weights"])
        assert count == json.loads((file.parent / "hiendmae_run.json").read_text(encoding="utf-8"))["parameters"]
        assert checkpoint["trainer_name"] in file.parent.parent.name


@pytest.mark.slow
def test_other_cases(tmp_path: Path) -> None:
    """Kept networks predict volumes of the right kind, and what has no kept network is shown as missing."""
    from pretraining.phantom import write_phantoms

    write_phantoms(tmp_path, "Dataset904_Other", num_training=2, num_test=0, spacing=(10.0, 10.0, 10.0))
    raw = tmp_path / "Dataset904_Other"
    grid = json.loads((KEPT / "grid.json").read_text(encoding="utf-8"))
    (tmp_path / "grid.json").write_text(json.dumps(grid | {"labels": [1], "seeds": [0]}), encoding="utf-8")
    words = [KEPT / "other_cases.py", tmp_path / "grid.json", raw / "imagesTr", raw / "labelsTr", tmp_path / "work"]
    env = os.environ | {"nnUNet_preprocessed": str(KEPT / "preprocessed"), "nnUNet_results": str(KEPT / "results")}
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "work").rglob("*.nii.gz"))) == 2 * 3
    (mean,) = [line.split(" | ") for line in done.stdout.split("\n\n")[0].splitlines() if " | mean | " in line]
    assert [cell.startswith("missing") for cell in mean[2:]] == [False, False, False, True], mean


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_script_runs_from_raw_data_to_the_reports(tmp_path: Path) -> None:
    """run.sh itself on phantoms, with fewer steps, epochs, labels and label subsets."""
    from pretraining.phantom import write_phantoms

    here, raw, work = (tmp_path / name for name in ("few_labels", "raw", "work"))
    for folder in (here, work):
        folder.mkdir()
    write_phantoms(raw, "Dataset500_OpenKBPUnlabelled", num_training=3, num_test=0, spacing=(6.0, 6.0, 6.0))
    write_phantoms(raw, "Dataset501_OpenKBP", num_training=10, num_test=0, spacing=(6.0, 6.0, 6.0))
    script = (KEPT / "run.sh").read_text(encoding="utf-8")
    for steps in ("4000", "10000"):
        assert script.count(f" {steps}\n") == 2
        script = script.replace(f" {steps}\n", " 2\n")
    (here / "run.sh").write_text(script, encoding="utf-8")
    small = {"labels": [1], "seeds": [0], "num_epochs": 1, "num_iterations_per_epoch": 2}
    for file in KEPT.glob("grid*.json"):
        grid = json.loads(file.read_text(encoding="utf-8"))
        (here / file.name).write_text(json.dumps(grid | small), encoding="utf-8")

    env = os.environ | {f"nnUNet_{kind}": str(tmp_path / kind) for kind in ("raw", "preprocessed", "results")}
    env |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for name in ("nnUNet_n_proc_DA", "nnUNet_def_n_proc", "OMP_NUM_THREADS"):
        env.pop(name, None)
    done = subprocess.run(
        ["bash", here / "run.sh"], cwd=work, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    reports = sorted(work.glob("few_labels*/runs.csv"))
    assert len(reports) == 3
    for file in reports:
        rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
        assert [row["status"] for row in rows] == ["finished"] * len(rows) and len(rows) in (4, 5)
