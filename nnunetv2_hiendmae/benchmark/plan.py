"""From a grid to what training needs: label budgets, plans, and plain commands for a shell or SLURM."""

from __future__ import annotations

import shlex
from pathlib import Path

from nnunetv2_hiendmae.benchmark.arms import configuration_of, differences, train_command, write_plans
from nnunetv2_hiendmae.benchmark.fair import check_fair, with_choices_fixed
from nnunetv2_hiendmae.benchmark.grid import GRID_FILE, Grid
from nnunetv2_hiendmae.benchmark.overlap import OVERLAP_FILE, check_overlap
from nnunetv2_hiendmae.benchmark.splits import add_label_budgets, check_labels, write_json
from nnunetv2_hiendmae.files import atomic_file, preprocessed_folder

COMMANDS_FILE = "commands.sh"
SLURM_FILE = "commands.slurm"

SLURM = """#!/bin/bash
# One task a training. Add what your cluster wants (partition, time, GPU), then: sbatch {file}
#SBATCH --job-name=hiendmae_{name}
#SBATCH --array=1-{count}
set -euo pipefail
commands=(
{commands}
)
eval "${{commands[$((SLURM_ARRAY_TASK_ID - 1))]}}"
"""


def write_text(file: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_file(file) as out:
        out.write(text.encode())


def plan(grid: Grid, folder: Path, allow_overlap: bool = False) -> tuple[Grid, int]:
    """Write everything that the grid's runs need, and the grid, into ``folder``.

    Safe to repeat, also while runs are under way: what exists and is right is kept.

    Args:
        grid: what to compare.
        folder: of the benchmark.
        allow_overlap: plan also where test cases were in the pre-training; every report then says so.

    Returns:
        The grid with all choices fixed, and how many splits are new.

    Raises:
        ValueError: test cases that were in the pre-training, folds that split a patient, data, plans,
            trainers or weights that are missing, and whatever a grid can have wrong.
    """
    grid = with_choices_fixed(grid)
    check_fair(grid)
    for dataset in grid.datasets:
        if preprocessed_folder(dataset).name != dataset:
            raise ValueError(f"The grid's data set '{dataset}' must be named {preprocessed_folder(dataset).name}.")
        for arm in grid.arms:
            file = write_plans(grid, dataset, arm)
            for configuration in grid.configurations:
                identifier = configuration_of(file, configuration)["data_identifier"]
                if not (preprocessed_folder(dataset) / identifier).is_dir():
                    raise ValueError(
                        f"Arm {arm.name}: {preprocessed_folder(dataset) / identifier} does not exist. Run "
                        f"'nnUNetv2_preprocess -d {dataset} -plans_name {arm.plans} -c {configuration}' first."
                    )
                check_labels(preprocessed_folder(dataset), identifier)
    overlap = check_overlap(grid, {d: identifier_of(grid, d) for d in grid.datasets}, allow_overlap)
    added = sum(
        add_label_budgets(preprocessed_folder(d), identifier_of(grid, d), grid.folds, grid.labels, grid.seeds)
        for d in grid.datasets
    )
    lines = list(dict.fromkeys(shlex.join(train_command(grid, run)) for run in grid.runs()))
    folder.mkdir(parents=True, exist_ok=True)  # last, so that a refused plan leaves nothing
    write_json(folder / OVERLAP_FILE, overlap)
    write_text(folder / GRID_FILE, grid.to_json())
    write_text(folder / COMMANDS_FILE, "\n".join(["set -euo pipefail", *lines, ""]))
    quoted = "\n".join(f"  {shlex.quote(line)}" for line in lines)
    text = SLURM.format(file=folder / SLURM_FILE, name=grid.name, count=len(lines), commands=quoted)
    write_text(folder / SLURM_FILE, text)
    return grid, added


def identifier_of(grid: Grid, dataset: str) -> str:
    """Folder of the preprocessed data from whose cases nnU-Net would make its splits."""
    file = write_plans(grid, dataset, grid.arms[0])
    return str(configuration_of(file, grid.configurations[0])["data_identifier"])


def differences_text(grid: Grid) -> str:
    """What differs between the arms, and what they share, for every data set and configuration."""
    lines = []
    for dataset in grid.datasets:
        for configuration in grid.configurations:
            table = differences(grid, dataset, configuration)
            lines.append(f"{dataset}, {configuration}:")
            for name in next(iter(table.values())):
                values = {arm: row[name] for arm, row in table.items()}
                if len(set(values.values())) == 1:
                    lines.append(f"  same for all arms: {name}: {next(iter(values.values()))}")
                else:
                    lines.append(f"  differs: {name}")
                    lines += [f"    {arm:<14} {value}" for arm, value in values.items()]
    budget = ", ".join(f"{name}={value}" for name, value in grid.budget.items()) or "each trainer's own"
    lines.append(f"budget of every arm: {budget}")
    lines += [f"  but {a.name}: num_epochs={a.num_epochs}" for a in grid.arms if a.num_epochs is not None]
    return "\n".join(lines)
