"""plan, run and report as real commands on synthetic CT: two arms, one label budget."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import World
from processes import descendants, start, wait_for

from nnunetv2_hiendmae.benchmark.shifts import SHIFTS
from pretraining.phantom import write_phantoms

pytestmark = pytest.mark.slow  # real trainings: one to four minutes on two cores

DATASET = "Dataset903_Bench"
TINY = {"patch_size": [8, 8, 8], "embed_dim": 24, "depth": 2, "num_heads": 2, "taps": [0, 1]}
PLAN = (
    "hiendmae_benchmark plan -o {out} -name bench -d 903 -labels 2 -arms nnunet scratch -num_epochs 1 "
    "-num_iterations_per_epoch 1 -num_val_iterations_per_epoch 1 -patch_size 16 16 16 -batch_size 2 -device cpu"
)


def fold_folders(world: World) -> dict[str, Path]:
    """Folder of the run of each arm."""
    found = {p.parent.parent.name: p.parent for p in (world.root / "results").rglob("fold_*/hiendmae_run.json")}
    arms = {name: name.split("_bench_")[1].split("__")[0] for name in found if "_bench_" in name}
    return {arm: found[name] for name, arm in arms.items()}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Path]:
    """A planned benchmark whose first run, nnU-Net's, is finished and whose second is not started."""
    world = World(tmp_path_factory.mktemp("bench"))
    write_phantoms(world.root / "raw", DATASET, num_training=6, num_test=0, spacing=(12.0, 12.0, 14.0))
    world.run("nnUNetv2_plan_and_preprocess -d 903 -c 3d_fullres -np 1 -npfp 1")
    out = world.root / "out"
    said = world.run(PLAN.format(out=out))
    assert "2 runs in" in said and "1 new splits for label budgets" in said
    grid = json.loads((out / "grid.json").read_text(encoding="utf-8"))
    grid["arms"][1] |= {"settings": {"architecture": TINY, "feature_size": 4}, "num_epochs": 2}
    (out / "grid.json").write_text(json.dumps(grid))
    said = world.run(f"hiendmae_benchmark plan -o {out} -grid {out}/grid.json")
    assert "0 new splits" in said and "but scratch: num_epochs=2" in said
    world.run(f"hiendmae_benchmark run -o {out} -part_id 0 -num_parts 2")
    return world, out


def report(bench: tuple[World, Path], ok: bool) -> str:
    world, out = bench
    return world.run(f"hiendmae_benchmark report -o {out}", ok=ok)


def test_commands_are_plain_nnunet(bench: tuple[World, Path]) -> None:
    _, out = bench
    lines = (out / "commands.sh").read_text(encoding="utf-8").splitlines()
    assert lines[1] == (
        f"nnUNetv2_train {DATASET} 3d_fullres 5 -tr nnUNetTrainerBudget -p nnUNetPlans_bench_nnunet -device cpu"
    )
    assert len(lines) == 3 and "#SBATCH --array=1-2" in (out / "commands.slurm").read_text(encoding="utf-8")


def test_missing_run_is_shown_and_told(bench: tuple[World, Path]) -> None:
    said = report(bench, ok=False)
    assert "2 labels/seed 0/scratch: MISSING: not started" in said and "Traceback" not in said
    _, out = bench
    assert "missing (0/1 runs)" in (out / "report.md").read_text(encoding="utf-8")
    rows = list(csv.DictReader((out / "runs.csv").read_text(encoding="utf-8").splitlines()))
    assert [(r["arm"], r["status"]) for r in rows] == [("nnunet", "finished"), ("scratch", "MISSING")]


def test_finished_report(bench: tuple[World, Path]) -> None:
    """All runs made, the report is complete, says the same everywhere, and is the same when made again."""
    world, out = bench
    world.run(f"hiendmae_benchmark run -o {out}")
    assert "$ nnUNetv2_train" not in world.run(f"hiendmae_benchmark run -o {out}")  # nothing is left to do
    report(bench, ok=True)
    folders = fold_folders(world)
    summary = json.loads((folders["nnunet"] / "validation" / "summary.json").read_text(encoding="utf-8"))
    rows = {r["organ"]: r for r in csv.DictReader((out / "dice.csv").read_text(encoding="utf-8").splitlines())}
    assert rows["mean"]["nnunet"] == f"{summary['foreground_mean']['Dice']:.3f}"
    assert rows["liver"]["nnunet"] == f"{summary['mean']['1']['Dice']:.3f}"
    page, text = (out / "report.html").read_text(encoding="utf-8"), (out / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|url\(", page) and page.count("data:image/svg+xml;base64,") >= 5
    figures = re.findall(r"^!\[.+\]\((\w+\.svg)\)$", text, re.MULTILINE)
    assert len(figures) == len(list(out.glob("*.svg"))) >= 5
    assert all((out / name).read_text(encoding="utf-8").rstrip().endswith("</svg>") for name in figures)
    for name in ("dice", "nsd", "hd95", "comparisons", "cost", "runs"):
        for row in csv.reader((out / f"{name}.csv").read_text(encoding="utf-8").splitlines()):
            assert all(value in text and f">{html.escape(value)}<" in page for value in row if value)
    record = json.loads((folders["scratch"] / "hiendmae_run.json").read_text(encoding="utf-8"))
    assert record["parameters"] > 10_000 and record["seconds_per_volume"] > 0 and record["peak_memory_mb"] > 100
    assert "| num_epochs | 1 | 2 | differs |" in text
    assert "| augmentation |" in text and re.search(r"\| augmentation \| (\w+) \| \1 \| same \|", text)
    before = {file.name: file.read_bytes() for file in out.glob("*.*")}
    for pattern in ("*.csv", "*.svg", "report.*", "provenance.json"):
        for file in out.glob(pattern):
            file.unlink()
    report(bench, ok=True)
    assert {file.name: file.read_bytes() for file in out.glob("*.*")} == before


def test_robustness(bench: tuple[World, Path]) -> None:
    """Changed scans are predicted once; unchanged ones get the report's Dice; a lost network is told."""
    world, out = bench
    command = f"hiendmae_benchmark robustness -o {out}"
    assert world.run(command).count(": Dice ") == 2 * len(SHIFTS)
    rows = list(csv.DictReader((out / "robustness.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["change"] for row in rows] == [shift.name for shift in SHIFTS]
    report(bench, ok=True)
    dice = {r["organ"]: r for r in csv.DictReader((out / "dice.csv").read_text(encoding="utf-8").splitlines())}
    assert all(rows[0][arm] == dice["mean"][arm] for arm in ("nnunet", "scratch"))
    assert all(row[arm][0] in "+-" for row in rows[1:] for arm in ("nnunet", "scratch"))
    scores = list(csv.DictReader((out / "robustness_cases.csv").read_text(encoding="utf-8").splitlines()))
    assert len({row["dice"] for row in scores if row["arm"] == "nnunet"}) > len(SHIFTS)  # the scans did change
    assert {row["organ"] for row in scores} == set(dice) - {"mean"}
    before = (out / "robustness.md").read_bytes()
    assert ": Dice " not in world.run(command) and (out / "robustness.md").read_bytes() == before
    network = fold_folders(world)["nnunet"] / "checkpoint_final.pth"
    network.rename(network.with_suffix(".away"))
    said = world.run(command, ok=False)
    network.with_suffix(".away").rename(network)
    assert "checkpoint_final.pth was removed" in said and "Traceback" not in said
    assert "MISSING" in (out / "robustness.md").read_text(encoding="utf-8")


def raise_dice(folder: Path) -> None:
    file = folder / "validation" / "summary.json"
    summary = json.loads(file.read_text(encoding="utf-8"))
    for entry in summary["metric_per_case"]:
        entry["metrics"]["1"]["Dice"] = 0.99
    summary["mean"]["1"]["Dice"] = 0.99
    file.write_text(json.dumps(summary))


def raise_mean(folder: Path) -> None:
    file = folder / "validation" / "summary.json"
    summary = json.loads(file.read_text(encoding="utf-8"))
    summary["mean"]["3"]["Dice"] = 0.99
    file.write_text(json.dumps(summary))


def drop_case(folder: Path) -> None:
    file = folder / "validation" / "summary.json"
    summary = json.loads(file.read_text(encoding="utf-8"))
    summary["metric_per_case"] = summary["metric_per_case"][1:]
    file.write_text(json.dumps(summary))


def other_prediction(folder: Path) -> None:
    files = sorted(folder.glob("validation/*.nii.gz"))
    files[0].unlink()


@pytest.mark.parametrize(
    ("tamper", "messages"),
    [
        (raise_dice, ["summary.json CHANGED since its run finished", "label 1 in summary.json is not that of its"]),
        (raise_mean, ["summary.json CHANGED", "the mean Dice of label 3 is not the mean of its cases"]),
        (drop_case, ["summary.json CHANGED", "summary.json has other cases than the split: phantom_"]),
        (other_prediction, ["unreadable: FileNotFoundError"]),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_tampering_is_noticed(bench: tuple[World, Path], tamper, messages: list[str], recorded: bool) -> None:
    """Also in a run of plain commands, without a record, which the first report has seen."""
    world, out = bench
    folder = fold_folders(world)["nnunet"]
    backup = shutil.copytree(folder, world.root / "backup")
    try:
        if not recorded:
            (folder / "hiendmae_run.json").unlink()
            (out / "provenance.json").unlink(missing_ok=True)
            world.run(f"hiendmae_benchmark report -o {out}")
        tamper(folder)
        for _ in range(2):  # a second report must not get used to it
            said = report(bench, ok=False)
            line = next(line for line in said.splitlines() if line.startswith(DATASET) and "nnunet: CHANGED" in line)
            for message in messages:
                assert (message if recorded else message.replace("its run finished", "the first report")) in line
    finally:
        shutil.rmtree(folder)
        shutil.move(backup, folder)
    assert "0.99" not in (out / "dice.csv").read_text(encoding="utf-8")


def test_archived_run_keeps_its_scores(bench: tuple[World, Path]) -> None:
    """A run folder without checkpoints and predictions gives the same numbers, and its files are still watched."""
    world, out = bench
    report(bench, ok=True)
    dice, folder = (out / "dice.csv").read_bytes(), fold_folders(world)["nnunet"]
    backup = shutil.copytree(folder, world.root / "backup")
    try:
        for file in (*folder.glob("checkpoint_*.pth"), *folder.glob("validation/*.nii.gz")):
            file.unlink()
        report(bench, ok=True)
        assert (out / "dice.csv").read_bytes() == dice
        assert "kept without predictions" in (out / "report.md").read_text(encoding="utf-8")
        assert "$ nnUNetv2_train" not in world.run(f"hiendmae_benchmark run -o {out} -part_id 0 -num_parts 2")
        file = folder / "hiendmae_surface.json"
        file.write_text(file.read_text(encoding="utf-8").replace('"nsd": 0', '"nsd": 1', 1))
        assert "hiendmae_surface.json CHANGED since an earlier report" in report(bench, ok=False)
        raise_dice(folder)
        assert "summary.json CHANGED since its run finished" in report(bench, ok=False)
        (folder / "validation" / "summary.json").unlink()
        assert "though an earlier report or run had one" in report(bench, ok=False)
    finally:
        shutil.rmtree(folder)
        shutil.move(backup, folder)


def test_edited_surface_scores_are_measured_again(bench: tuple[World, Path]) -> None:
    """While the predictions are there they decide, whatever the kept file says."""
    world, out = bench
    report(bench, ok=True)
    nsd, file = (out / "nsd.csv").read_bytes(), fold_folders(world)["nnunet"] / "hiendmae_surface.json"
    text = file.read_text(encoding="utf-8")
    scores = json.loads(text)
    for case in scores["cases"].values():
        case["labels"]["1"]["nsd"] = 0.99
    file.write_text(json.dumps(scores), encoding="utf-8")
    report(bench, ok=True)
    assert (out / "nsd.csv").read_bytes() == nsd and json.loads(file.read_text(encoding="utf-8")) == json.loads(text)


@contextmanager
def planned_otherwise(bench: tuple[World, Path], old: str, new: str) -> Iterator[None]:
    """The grid edited and planned again, as it was afterwards."""
    world, out = bench
    text = (out / "grid.json").read_text(encoding="utf-8")
    assert old in text
    try:
        (out / "grid.json").write_text(text.replace(old, new), encoding="utf-8")
        world.run(f"hiendmae_benchmark plan -o {out} -grid {out}/grid.json")
        yield
    finally:
        (out / "grid.json").write_text(text, encoding="utf-8")
        world.run(f"hiendmae_benchmark plan -o {out} -grid {out}/grid.json")


def test_plain_runs_of_other_plans_are_noticed(bench: tuple[World, Path]) -> None:
    """A run of the plain commands has no record; nnU-Net's own copy of its plans tells under which it was trained."""
    world, out = bench
    record = fold_folders(world)["scratch"] / "hiendmae_run.json"
    recorded = record.read_bytes()
    try:
        record.unlink()
        report(bench, ok=True)
        with planned_otherwise(bench, '"feature_size": 4', '"feature_size": 8'):
            assert "scratch: CHANGED: it was made with other plans than the grid has now" in report(bench, ok=False)
            said = world.run(f"hiendmae_benchmark run -o {out} -part_id 1 -num_parts 2", ok=False)
            assert "it was made with other plans than the grid has now" in said and not record.is_file()
        world.run(f"hiendmae_benchmark run -o {out} -part_id 1 -num_parts 2")
        assert json.loads(record.read_text(encoding="utf-8"))["versions"] == {}  # nobody knows
        debug = record.with_name("debug.json")
        told = debug.read_text(encoding="utf-8")
        debug.write_text(told.replace('"num_epochs": "2"', '"num_epochs": "7"'), encoding="utf-8")
        assert "it was made with num_epochs=7, the grid has 2" in report(bench, ok=False)
        debug.write_text(told, encoding="utf-8")
    finally:
        record.write_bytes(recorded)
    report(bench, ok=True)


def test_sigterm_ends_the_training_and_one_process_has_a_folder(bench: tuple[World, Path]) -> None:
    """What was started does not go on alone, and nothing else trains in its folder meanwhile."""
    world, out = bench
    grid = json.loads((out / "grid.json").read_text(encoding="utf-8")) | {"name": "long", "num_epochs": 1000}
    long = world.root / "long"
    long.mkdir(exist_ok=True)
    (long / "grid.json").write_text(json.dumps(grid), encoding="utf-8")
    world.run(f"hiendmae_benchmark plan -o {long} -grid {long}/grid.json")
    process = start(world, f"hiendmae_benchmark run -o {long} -part_id 0 -num_parts 2")
    wait_for(process, "$ nnUNetv2_train")
    deadline = time.monotonic() + 120
    while not (trainings := descendants(process.pid, "nnUNetv2_train")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    said = world.run(f"hiendmae_benchmark run -o {long} -part_id 0 -num_parts 2")
    assert "Another process is at work in" in said and "$ nnUNetv2_train" not in said
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; the same command continues" in said, said
    assert not any(Path(f"/proc/{pid}").exists() for pid in trainings)


def test_interrupted_and_unevaluated_runs_are_finished(bench: tuple[World, Path]) -> None:
    world, out = bench
    folder = fold_folders(world)["nnunet"]
    (folder / "validation" / "summary.json").unlink()
    assert "nnunet: MISSING: no summary.json, though an earlier report or run had one" in report(bench, ok=False)
    assert "-device cpu --val" in world.run(f"hiendmae_benchmark run -o {out}")
    (folder / "validation" / "summary.json").unlink()
    (folder / "checkpoint_final.pth").rename(folder / "checkpoint_latest.pth")
    assert "-device cpu --c" in world.run(f"hiendmae_benchmark run -o {out}")
    report(bench, ok=True)


def test_failures_are_loud(bench: tuple[World, Path]) -> None:
    """Other plans than a run was made with are refused, and the other runs are not kept from being made."""
    world, out = bench
    with planned_otherwise(bench, '"batch_size": 2', '"batch_size": 3'):
        said = world.run(f"hiendmae_benchmark run -o {out} -part_id 0 -num_parts 2", ok=False)
        assert "it was made with other plans than the grid has now" in said and "Traceback" not in said
        assert "it was made with other plans than the grid has now" in report(bench, ok=False)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("plan -o x", "plan needs -d DATASET, or -grid FILE."),
        ("plan -o x -d 903 -arms unet", "-arms unet: there are nnunet, resenc_l"),
        ("plan -o x -d 903 -arms nnunet resenc_l", "nnUNetResEncUNetLPlans.json does not exist"),
        ("plan -o x -d 903 -labels 9 -arms nnunet", "needs more than the 4 training cases"),
        ("plan -o x -d 903 -arms nnunet -c 3d_lowres", "has no configuration 3d_lowres; it has 2d, 3d_fullres"),
        ("plan -o x -d 903 -arms plain_mae", "-arms plain_mae needs -plain_mae FILE"),
        ("run -o nowhere", "grid.json does not exist. Write one with 'hiendmae_benchmark plan'."),
        ("run -o nowhere -part_id 2", "-part_id 2 must be 0 to 0"),
        ("report -o nowhere -tolerance_mm 0", "-tolerance_mm 0.0 must be a positive number"),
    ],
)
def test_refused_in_one_line(bench: tuple[World, Path], command: str, message: str) -> None:
    said = bench[0].run(f"hiendmae_benchmark {command}", ok=False)
    assert message in said and "Traceback" not in said
    assert not Path("x").exists()
