"""``hiendmae_ingest``: a raw data set for nnU-Net from a heap of scans."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from nnunetv2_hiendmae.command import CommandParser, check_count
from nnunetv2_hiendmae.folders import raw_folder, raw_root
from pretraining.ingest.ingest import Aborted, hash_dataset, ingest
from pretraining.ingest.quality import Gate
from pretraining.ingest.report import REPORT, THUMBNAILS, Report, draw_sheets, read_rows

EXAMPLES = """Examples:
  hiendmae_ingest -i /data/scans -d 510 -n Abdomen
  hiendmae_ingest -i /data/scans -d 510 -n Abdomen --exclude_overlap 17     keep scans of Dataset017 out

NIfTI, NRRD, MHA and DICOM are read; nothing is moved or deleted. Interrupted? The same command goes on.
"""


def parser() -> CommandParser:
    """All flags."""
    p = CommandParser(
        prog="hiendmae_ingest",
        usage="hiendmae_ingest -i FOLDER -d ID -n NAME [--exclude_overlap DATASET ...] [-np N] [--no_quality_gate]",
        description="Make an nnU-Net raw data set without labels from a heap of CT scans.",
        examples=EXAMPLES,
    )
    p.add_argument("-i", required=True, metavar="FOLDER", help="scans, in any folders below")
    p.add_argument("-d", required=True, type=int, metavar="ID", help="number of the new data set")
    p.add_argument("-n", required=True, metavar="NAME", help="its name")
    p.add_argument(
        "--exclude_overlap", "--exclude-overlap", nargs="+", default=[], metavar="DATASET",
        help="raw data sets whose scans are refused here, so that test scans do not leak into pre-training",
    )  # fmt: skip
    p.add_argument("--no_quality_gate", action="store_true", help="accept whatever can be read; duplicates are refused")
    p.add_argument("-np", type=int, default=multiprocessing.cpu_count(), help="processes [one a core]")
    return p


def output_folder(number: int, name: str) -> Path:
    """``nnUNet_raw/DatasetXXX_Name``. ``ValueError`` if that is impossible or taken."""
    if not 1 <= number <= 999 or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_\-]*", name) or "__" in name:
        raise ValueError(f"-d {number} must be 1…999, and -n '{name}' of letters, digits, '-' and single '_'.")
    folder = raw_root() / f"Dataset{number:03d}_{name}"
    others = [p.name for p in raw_root().glob(f"Dataset{number:03d}_*") if p.name != folder.name]
    if others:
        raise ValueError(f"-d {number} is taken by {others[0]}.")
    if folder.exists() and not (folder / REPORT).is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and was not made by hiendmae_ingest.")
    return folder


def ingested_hashes(folder: Path) -> dict[str, str]:
    """Content hashes of what was ingested into other data sets, from their reports."""
    reports = [file for file in sorted(raw_root().glob(f"Dataset*/{REPORT}")) if file.parent != folder]
    rows = ((file.parent.name, row) for file in reports for row in read_rows(file))
    return {row.sha256: f"{name}/{row.case}" for name, row in rows if row.status == "accepted"}


def known_hashes(datasets: list[str]) -> dict[str, str]:
    """Content hashes of the data sets to keep out, training and test images."""
    known: dict[str, str] = {}
    for dataset in datasets:
        folder = raw_folder(dataset)
        images = sorted(f for part in ("imagesTr", "imagesTs") for f in (folder / part).glob("*_0000.*"))
        if not images:
            raise ValueError(f"--exclude_overlap {dataset}: {folder} holds no images.")
        quiet = not sys.stderr.isatty()
        known |= dict(hash_dataset(tqdm(images, desc=folder.name, disable=quiet), folder.name))
    return known


def run(args: argparse.Namespace) -> int:
    """Returns the number of refused inputs. ``ValueError`` for a user's mistake."""
    heap = Path(args.i)
    if not heap.is_dir():
        raise ValueError(f"-i {heap} is no folder.")
    check_count("-np", args.np)
    folder = output_folder(args.d, args.n)
    known = ingested_hashes(folder) | known_hashes(args.exclude_overlap)
    gate = None if args.no_quality_gate else Gate()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ingest_settings.json").write_text(
        json.dumps({"input": str(heap.absolute()), "exclude_overlap": args.exclude_overlap, "gate": gate is not None})
    )
    with tqdm(unit="scan", disable=not sys.stderr.isatty()) as bar:
        for row in ingest(heap, folder, args.n, gate, args.np, known):
            bar.update()
            if row.status == "refused":
                bar.write(f"REFUSED {row.input}: {row.reason}".encode(errors="replace").decode(), file=sys.stdout)
    report = Report(folder)
    accepted, refused = report.select("accepted"), report.select("refused")
    for status, rows in (("accepted", accepted), ("refused", refused)):
        draw_sheets(rows, folder / THUMBNAILS, status)
    print(f"{len(accepted)} accepted, {len(refused)} refused. Table: {folder / REPORT}")
    if accepted:
        print(f"Next: hiendmae_plan_and_preprocess -d {args.d}")
    return len(refused)


def main() -> NoReturn:
    """Entry point: 0 if everything went in, 1 if something was refused or the disk is full, 2 for a flag's mistake."""
    p = parser()
    args = p.parse_args()
    try:
        refused = run(args)
    except ValueError as error:
        p.exit(2, f"hiendmae_ingest: error: {error}\n")
    except (Aborted, OSError) as error:
        p.exit(1, f"hiendmae_ingest: error: {error}. What was accepted is kept; the same command goes on\n")
    except KeyboardInterrupt:
        p.exit(130, "hiendmae_ingest: interrupted; the same command goes on\n")
    p.exit(1 if refused else 0)


if __name__ == "__main__":
    main()
