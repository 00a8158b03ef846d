"""Keep the comparison of ``run.sh`` in little space: ``python archive.py WORK TARGET``, WORK being where it ran.

``TARGET/runs.tar.xz`` gets the run folders and plans that the reports are made from, the predictions, and the table of
single cases of each report; no data, networks or logs. ``TARGET/report*`` get the reports that follow from it, with
one figure each. The same runs give the same bytes.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from nnunetv2_hiendmae.benchmark.arms import fold_folder, plans_file
from nnunetv2_hiendmae.benchmark.grid import Grid, read_grid
from nnunetv2_hiendmae.benchmark.overlap import OVERLAP_FILE
from nnunetv2_hiendmae.benchmark.record import SUMMARY
from nnunetv2_hiendmae.benchmark.run import state_of
from nnunetv2_hiendmae.command import CommandParser
from nnunetv2_hiendmae.files import preprocessed_folder, results_folder

ARCHIVE = "runs.tar.xz"
FIGURE = "dice_over_labels_"
CASES = "cases.csv"


def run_files(grid: Grid) -> Iterator[tuple[str, Path]]:
    """Names in the archive and the files of a grid's finished runs and of the plans that they were trained under."""
    for run in grid.runs():
        folder, data = fold_folder(grid, run), preprocessed_folder(run.dataset)
        if state_of(folder) != "finished":
            print(f"{run.name}: not finished, left out")
            continue
        model = [folder.parent / name for name in ("dataset.json", "plans.json")]
        for file in (*folder.glob("*.json"), folder / SUMMARY, *model):
            yield f"results/{file.relative_to(results_folder()).as_posix()}", file
        for file in folder.glob("validation/*.nii.gz"):  # apart: a report would measure them anew, without references
            yield f"predictions/{file.relative_to(results_folder()).as_posix()}".removesuffix(".gz"), file
        shared = [data / name for name in ("dataset.json", "splits_final.json", "hiendmae_label_budgets.json")]
        for file in (plans_file(grid, run), *shared):
            yield f"preprocessed/{run.dataset}/{file.name}", file


def write_archive(files: dict[str, Path], target: Path) -> None:
    """A tar.xz of files by their names in it, without dates and owners; .nii.gz as .nii, which takes less space."""
    preset = 9 | lzma.PRESET_EXTREME
    with lzma.open(target, "wb", preset=preset) as out, tarfile.open(fileobj=out, mode="w") as tar:
        for name in sorted(files):
            content = files[name].read_bytes()
            if files[name].suffix == ".gz":
                content = gzip.decompress(content)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def read_archive(file: Path, folder: Path) -> None:
    """Unpack ``results``, ``predictions``, ``preprocessed`` and ``report*``."""
    with tarfile.open(file) as tar:
        tar.extractall(folder, filter="data")


def report_again(unpacked: Path, made: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """The report of the runs in ``unpacked``, with the grid of the one that was ``made`` and what that had seen."""
    out.mkdir(parents=True, exist_ok=True)
    for file in (made / "grid.json", made / "provenance.json", *made.glob(OVERLAP_FILE)):
        shutil.copy(file, out)
    env = os.environ | {f"nnUNet_{name}": str(unpacked / name) for name in ("raw", "preprocessed", "results")}
    command = [Path(sys.executable).with_name("hiendmae_benchmark"), "report", "-o", out]
    return subprocess.run(command, env=env, capture_output=True, encoding="utf-8", check=False)


def keep_report(made: Path, target: Path) -> None:
    """The report without its pages of HTML, single cases and all figures but one; ``report.md`` shows that one."""
    target.mkdir(parents=True, exist_ok=True)
    tables = [file for file in made.glob("*.csv") if file.name != CASES]
    for file in (*tables, *made.glob(f"{FIGURE}*.svg"), *made.glob(OVERLAP_FILE), made / "provenance.json"):
        shutil.copy(file, target)
    lines = (made / "report.md").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("![") or f"]({FIGURE}" in line]
    (target / "report.md").write_text("".join(kept), encoding="utf-8")


def archive(work: Path, target: Path) -> None:
    """The comparisons of a finished ``run.sh``.

    Raises:
        ValueError, OSError: a comparison or a file of its report is not there.
    """
    comparisons = sorted(grid.parent for grid in work.glob("few_labels*/grid.json"))
    if not comparisons:
        raise ValueError(f"{work} has no few_labels*/grid.json; run.sh makes them where it is started.")
    names = {made: made.name.replace("few_labels", "report") for made in comparisons}
    files = {f"{name}/{CASES}": made / CASES for made, name in names.items()}
    for made in comparisons:
        files |= run_files(read_grid(made / "grid.json"))
    target.mkdir(parents=True, exist_ok=True)
    write_archive(files, target / ARCHIVE)
    with TemporaryDirectory() as folder:
        read_archive(target / ARCHIVE, Path(folder))
        for made, name in names.items():
            print(report_again(Path(folder), made, Path(folder) / name).stderr, end="")
            keep_report(Path(folder) / name, target / name)


if __name__ == "__main__":
    p = CommandParser(description=__doc__)
    for name in ("work", "target"):
        p.add_argument(name, type=Path)
    args = p.parse_args()
    try:
        archive(args.work, args.target)
    except (ValueError, OSError) as error:
        p.error(str(error))
