"""``hiendmae_ingest``: a raw data set for nnU-Net from a heap of scans."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from nnunetv2_hiendmae.checks import check_count
from nnunetv2_hiendmae.command import CommandParser, run_command
from nnunetv2_hiendmae.files import alone_in, raw_folder, raw_root, read_json
from pretraining.prepare.exclude import Exclusion, Judge, read_exclusions, write_exclusions
from pretraining.prepare.find import Source
from pretraining.prepare.ingest import ingest, look_at_excluded
from pretraining.prepare.provenance import mark_excluded
from pretraining.prepare.quality import Gate
from pretraining.prepare.report import REPORT, THUMBNAILS, draw_sheets
from pretraining.processes import process_pool, usable_cores

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
    p.add_argument("-np", type=int, default=usable_cores(), help="processes [one a usable core]")
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


def exclusions_of(folder: Path, datasets: list[str], processes: int) -> list[Exclusion]:
    """Every scan to keep out: those of earlier calls, and what the data sets named now or then hold by now.

    Training and test images both. A data set that an earlier call named may be gone; what was noted of it stays.
    """
    known = {(e.dataset, e.image): e for e in read_exclusions(folder)}
    named = {raw_folder(dataset): dataset for dataset in datasets}
    earlier = {raw_root() / name: name for name, _ in known}
    tasks = []
    for raw in sorted({**earlier, **named}):
        images = sorted(f for part in ("imagesTr", "imagesTs") for f in (raw / part).glob("*_[0-9][0-9][0-9][0-9].*"))
        if not images and raw in named:
            raise ValueError(f"--exclude_overlap {named[raw]}: {raw} holds no images.")
        for image in images:
            source = Source(f"{image.parent.name}/{image.name}", (str(image),))
            old = known.get((raw.name, source.name))
            if old is None or old.stamp != source.stamp:
                tasks.append((raw.name, source))
    with process_pool(min(processes, max(len(tasks), 1))) as pool:
        new = pool.map(look_at_excluded, *zip(*tasks, strict=True)) if tasks else iter(())
        try:
            for made in tqdm(new, total=len(tasks), desc="to keep out", disable=not sys.stderr.isatty()):
                if isinstance(made, str):
                    raise ValueError(f"--exclude_overlap: {made}")
                known[made.dataset, made.image] = made
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return list(known.values())


def run(args: argparse.Namespace) -> int:
    """What the command does; 1 if something was refused. ``ValueError`` for a user's mistake."""
    heap = Path(args.i)
    if not heap.is_dir():
        raise ValueError(f"-i {heap} is no folder.")
    check_count("np", args.np)
    folder = output_folder(args.d, args.n)
    exclusions = exclusions_of(folder, args.exclude_overlap, args.np)
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder, "Wait for its end."):
        return run_alone(args, heap, folder, exclusions)


def refuse_other_heap(file: Path, heap: Path) -> None:
    """``ValueError`` for another heap than that of earlier calls, whose scans of the same names it would replace."""
    before = read_json(file, "Remove it.").get("input") if file.is_file() else None
    if before is not None and os.path.realpath(before) != os.path.realpath(heap):
        raise ValueError(
            f"-i {heap}: {file.parent.name} was made from {before}, and files of the same names would replace each "
            f"other. Give this heap another -d, or link both into one folder. If it is the same heap in another place, "
            f"remove {file}."
        )


def run_alone(args: argparse.Namespace, heap: Path, folder: Path, exclusions: list[Exclusion]) -> int:
    """``run`` in a folder that no other process touches."""
    settings = folder / "ingest_settings.json"
    judge, looked_at = Judge(folder, exclusions), set[str]()
    if judge.report.rows:  # a slip of the hand that found nothing binds nobody
        refuse_other_heap(settings, heap)
    gate = None if args.no_quality_gate else Gate()
    write_exclusions(folder, exclusions)
    excluded = sorted({e.dataset for e in exclusions})
    settings.write_text(
        json.dumps({"input": str(heap.absolute()), "exclude_overlap": excluded, "gate": gate is not None})
    )
    with tqdm(unit="scan", disable=not sys.stderr.isatty()) as bar:
        for row in ingest(heap, folder, args.n, gate, args.np, judge):
            bar.update()
            looked_at.add(row.input)
            if row.status == "refused":
                bar.write(f"REFUSED {row.input}: {row.reason}".encode(errors="replace").decode(), file=sys.stdout)
    report = judge.report
    accepted, refused = report.select("accepted"), report.select("refused")
    if not report.rows:
        raise ValueError(f"-i {heap} holds no files.")
    for line in mark_excluded(folder.name, {row.case for row in refused}):
        print(line)
    for status, rows in (("accepted", accepted), ("refused", refused)):
        draw_sheets(rows, folder / THUMBNAILS, status, looked_at)
    print(f"{len(accepted)} accepted, {len(refused)} refused. Table: {folder / REPORT}")
    if accepted:
        print(f"Next: hiendmae_plan_and_preprocess -d {args.d}")
    return 1 if refused else 0


def main() -> NoReturn:
    """Entry point: 0 if everything went in, 1 if something was refused."""
    run_command(parser(), run, "what was accepted is kept, the same command goes on")
