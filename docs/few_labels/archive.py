"""Keep the run folders of a benchmark in little space: ``python archive.py BENCHMARK_FOLDER TARGET``.

Data, predictions and optimizer states are left out. Networks of the grid, arms and label budgets in ``KEEP_NETWORKS``
are kept in half precision; ``nnUNetv2_predict`` takes them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from nnunetv2_hiendmae.benchmark.arms import fold_folder, plans_file
from nnunetv2_hiendmae.benchmark.grid import read_grid
from nnunetv2_hiendmae.benchmark.record import FINAL, SUMMARY
from nnunetv2_hiendmae.benchmark.run import state_of
from nnunetv2_hiendmae.command import CommandParser
from nnunetv2_hiendmae.folders import preprocessed_folder, results_folder

# grid, arm, labels
KEEP_NETWORKS = [("few", arm, n) for arm in ("hiendmae", "plain_mae", "scratch") for n in (1, 4)]
KEEP_NETWORKS += [("aug", arm, n) for arm in ("hiendmae_10k", "plain_mae_10k", "scratch") for n in (1, 4)]
WANTED = ("trainer_name", "init_args", "inference_allowed_mirroring_axes")


def slim_checkpoint(source: Path, target: Path) -> None:
    """What prediction needs of a checkpoint."""
    checkpoint = torch.load(source, map_location="cpu", weights_only=False)  # our own file
    halved: dict[int, torch.Tensor] = {}  # by address: modules that stand under two names are kept once
    network = {
        k: halved.setdefault(v.data_ptr(), v.half() if v.is_floating_point() else v)
        for k, v in checkpoint["network_weights"].items()
    }
    torch.save({**{k: checkpoint[k] for k in WANTED}, "network_weights": network}, target)


def archive(benchmark: Path, target: Path) -> None:
    grid = read_grid(benchmark / "grid.json")
    for run in grid.runs():
        source = fold_folder(grid, run)
        if state_of(source) != "finished":
            print(f"{run.name}: not finished, left out")
            continue
        folder = target / "results" / source.relative_to(results_folder())
        (folder / "validation").mkdir(parents=True, exist_ok=True)
        for file in (*source.glob("*.json"), *source.glob("training_log_*.txt"), source / SUMMARY):
            shutil.copy(file, folder / file.relative_to(source))
        for name in ("dataset.json", "plans.json"):
            shutil.copy(source.parent / name, folder.parent / name)
        if (grid.name, run.arm.name, run.labels) in KEEP_NETWORKS:
            slim_checkpoint(source / FINAL, folder / FINAL)
        data = target / "preprocessed" / run.dataset
        data.mkdir(parents=True, exist_ok=True)
        shutil.copy(plans_file(grid, run), data)
        for name in ("dataset.json", "splits_final.json", "hiendmae_label_budgets.json"):
            shutil.copy(preprocessed_folder(run.dataset) / name, data / name)


if __name__ == "__main__":
    p = CommandParser(description=__doc__)
    for name in ("benchmark_folder", "target"):
        p.add_argument(name, type=Path)
    args = p.parse_args()
    try:
        archive(args.benchmark_folder, args.target)
    except ValueError as error:
        p.error(str(error))
