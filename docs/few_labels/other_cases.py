"""The networks of a grid on cases that the benchmark never saw.

    python other_cases.py grid.json IMAGES LABELS WORK

Predicts the cases in IMAGES (names as nnU-Net wants them, ``case_0000.nii.gz``) with every network that ``run.sh``
trained for the grid (nnU-Net's variables as for ``run.sh``) and prints Dice, surface Dice, HD95 and the paired
differences by the rules of ``hiendmae_benchmark report``. LABELS has the references, ``case.nii.gz``, WORK gets the
predictions; started again, it goes on where it was. A network that is not there counts as missing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from nnunetv2_hiendmae.benchmark.arms import fold_folder, plans_name
from nnunetv2_hiendmae.benchmark.collect import METRICS, Result, Score
from nnunetv2_hiendmae.benchmark.grid import Grid, Run, read_grid
from nnunetv2_hiendmae.benchmark.record import FINAL
from nnunetv2_hiendmae.benchmark.surface import Diagonals, surface_scores
from nnunetv2_hiendmae.benchmark.tables import Table, comparison_table, comparisons, metric_table
from nnunetv2_hiendmae.command import CommandParser
from nnunetv2_hiendmae.files import read_json, results_folder

TOLERANCE_MM = 2.0  # as hiendmae_benchmark report


def scored(grid: Grid, run: Run, images: Path, references: Path, work: Path) -> Result:
    """Predict and score the cases with the network of one run."""
    trained = fold_folder(grid, run)
    folder = work / trained.relative_to(results_folder())
    result = Result(run=run, folder=folder, train_cases=0)
    if not (trained / FINAL).is_file():
        result.status = "missing"
        return result
    dataset = read_json(trained.parent / "dataset.json")
    organs = {str(label): name for name, label in dataset["labels"].items() if label}
    ending = dataset["file_ending"]
    cases = sorted(file.name.removesuffix(ending) for file in references.glob(f"*{ending}"))
    without = [case for case in cases if not (images / f"{case}_0000{ending}").is_file()]
    if not cases or without:
        raise ValueError(f"{images} has no image of {without[0]}" if cases else f"{references} has no *{ending}")
    out = folder / "validation"  # where the surface metrics look for predictions
    out.mkdir(parents=True, exist_ok=True)
    for name in ("dataset.json", "plans.json"):
        shutil.copy(trained.parent / name, folder.parent)
    if not all((out / f"{case}{ending}").is_file() for case in cases):
        model = ["-d", run.dataset, "-c", run.configuration, "-tr", run.arm.trainer, "-p", plans_name(grid, run.arm)]
        options = ["-f", trained.name.removeprefix("fold_"), "-device", grid.device, "-npp", "1", "-nps", "1"]
        predict = Path(sys.executable).with_name("nnUNetv2_predict")
        command = [predict, "-i", images, "-o", out, *model, *options, "--continue_prediction"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    for case, scores in surface_scores(folder, cases, list(organs), references, TOLERANCE_MM, Diagonals()).items():
        result.scores += [Score(case=case, organ=organs[key], **values) for key, values in scores.items()]
    return result


def printed(table: Table) -> str:
    """A table of the report, without the columns that are the same for all."""
    rows = [table.header, *table.rows]
    return f"{table.title}\n" + "\n".join(" | ".join(row[2:]) for row in rows) + "\n"


def main() -> None:
    p = CommandParser(description=__doc__)
    for name in ("grid", "images", "labels", "work"):
        p.add_argument(name, type=Path)
    args = p.parse_args()
    try:
        grid = read_grid(args.grid)
        results = [scored(grid, run, args.images, args.labels, args.work) for run in grid.runs()]
    except ValueError as error:
        p.error(str(error))
    except subprocess.CalledProcessError as error:
        p.exit(1, f"{p.prog}: error: {error}\n")
    for metric in METRICS:
        print(printed(metric_table(grid, results, metric, TOLERANCE_MM)))
    print(printed(comparison_table(grid, comparisons(grid, results))))


if __name__ == "__main__":
    main()
