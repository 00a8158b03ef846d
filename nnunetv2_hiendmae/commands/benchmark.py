"""``hiendmae_benchmark``: plan, run and report a comparison with nnU-Net."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import NoReturn

from nnunetv2_hiendmae.benchmark.grid import GRID_FILE, Grid, parse_labels, read_grid
from nnunetv2_hiendmae.checks import check_count
from nnunetv2_hiendmae.command import CommandParser, run_command
from nnunetv2_hiendmae.files import preprocessed_folder
from nnunetv2_hiendmae.nnunet.settings import BUDGET

EXAMPLES = """Examples:
  hiendmae_benchmark plan -o bench -d 17 -labels 1 5 10% all -seeds 0 1 2 -weights weights.pth
  hiendmae_benchmark plan -o bench -grid bench/grid.json     (after editing it)
  hiendmae_benchmark run -o bench [-part_id 0 -num_parts 4]
  hiendmae_benchmark report -o bench
  hiendmae_benchmark robustness -o bench                     (test cases turned, scaled, noisy, cut off)
  hiendmae_benchmark probe -d 17 -w weights.pth              (no training: a linear map of the encoder's tokens)
"""


def parser() -> CommandParser:
    """Four verbs on a benchmark's folder, ``-o``, and one that trains nothing."""
    p = CommandParser(
        prog="hiendmae_benchmark",
        description="Compare Hi-End-MAE with nnU-Net's own trainers under one budget.",
        examples=EXAMPLES,
    )
    verbs = p.add_subparsers(dest="verb", required=True, metavar="{plan,run,report,robustness,probe}")
    add_plan_flags(verbs.add_parser("plan", help="write grid, label budgets, plans and commands"))
    r = verbs.add_parser("run", help="run what is not finished")
    r.add_argument("-part_id", type=int, default=0, metavar="N", help="this part [0]")
    r.add_argument("-num_parts", type=int, default=1, metavar="N", help="parts that share the runs [1]")
    c = verbs.add_parser("report", help="Markdown, CSV and HTML from what was run")
    c.add_argument("-tolerance_mm", type=float, default=2.0, metavar="MM", help="of the surface Dice [2]")
    verbs.add_parser("robustness", help="Dice that finished networks lose on changed scans")
    for verb in verbs.choices.values():
        verb.add_argument("-o", required=True, type=Path, metavar="FOLDER", help="the benchmark's folder")
    b = verbs.add_parser("probe", help="what a linear map finds in the tokens of weights, beside random ones")
    b.add_argument("-d", required=True, metavar="DATASET", help="labelled, preprocessed data set, by name or id")
    b.add_argument("-w", required=True, nargs="+", type=Path, metavar="FILE", help="weights of any form that is read")
    b.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="of the pre-training's spacing [nnUNetPlans]")
    b.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="[3d_fullres]")
    b.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="[cuda]")
    b.add_argument("-o", type=Path, metavar="FILE", help="also write the table as CSV")
    return p


def add_plan_flags(p: argparse.ArgumentParser) -> None:
    """Flags of ``plan``: a grid file, or the fields of one with the default arms."""
    p.add_argument("-grid", type=Path, metavar="FILE", help="grid.json to plan; the flags below then do not apply")
    p.add_argument("-name", metavar="NAME", help="of the grid, part of the plans' names [that of the folder]")
    p.add_argument("-d", dest="datasets", nargs="+", metavar="DATASET", help="data set names or ids")
    p.add_argument("-c", dest="configurations", nargs="+", metavar="CONFIGURATION", help="[3d_fullres]")
    p.add_argument(
        "-f", dest="folds", nargs="+", type=int, metavar="FOLD", help="folds whose validation cases are the test [0]"
    )
    p.add_argument("-labels", nargs="+", metavar="N", help="label budgets: cases, percent (10%%), all [all]")
    p.add_argument("-seeds", nargs="+", type=int, metavar="N", help="label subsets drawn for each budget [0]")
    p.add_argument("-p", metavar="PLANS", help="plans of all default arms but ResEnc-L [nnUNetPlans]")
    p.add_argument("-weights", metavar="FILE", help="of the Hi-End-MAE arms [as the trainer finds them]")
    p.add_argument("-arms", nargs="+", metavar="ARM", help="default arms and controls, the reference first [all six]")
    p.add_argument("-plain_mae", metavar="FILE", help="weights of the control plain_mae")
    p.add_argument("-primus_hiendmae", metavar="FILE", help="Primus weights of the arm primus_hiendmae")
    p.add_argument("-num_epochs", type=int, metavar="N", help="of every arm [each trainer's own]")
    p.add_argument("-num_iterations_per_epoch", type=int, metavar="N", help="of every arm [each trainer's own]")
    p.add_argument("-num_val_iterations_per_epoch", type=int, metavar="N", help="of every arm [each trainer's own]")
    p.add_argument("--no_mirroring", action="store_true", default=None, help="for left and right organs; every arm")
    p.add_argument("--no_augmentation", action="store_true", default=None, help="for short budgets; every arm")
    p.add_argument("-patch_size", type=int, nargs=3, metavar="N", help="of every arm [that of its plans]")
    p.add_argument("-batch_size", type=int, metavar="N", help="of every arm [that of its plans]")
    p.add_argument("-device", choices=("cuda", "cpu", "mps"), help="[cuda]")
    p.add_argument(
        "--allow_overlap", action="store_true", help="also if test cases were in the pre-training; reports say so"
    )


def grid_of(args: argparse.Namespace) -> Grid:
    """The grid that the flags of ``plan`` describe. ``ValueError`` for a user's mistake."""
    own = {k: v for k, v in vars(args).items() if k not in ("verb", "o", "grid", "allow_overlap") and v is not None}
    if args.grid is not None:
        if own:
            flags = ", ".join(f"{name}={value}" for name, value in own.items())
            raise ValueError(f"-grid excludes {flags}; edit {args.grid} instead.")
        return read_grid(args.grid)
    from nnunetv2_hiendmae.benchmark.arms import default_arms  # not above, as below: help and mistakes at once

    if args.datasets is None:
        raise ValueError("plan needs -d DATASET, or -grid FILE.")
    arms = default_arms(
        own.pop("p", "nnUNetPlans"),
        own.pop("weights", None),
        budget=any(name in BUDGET for name in own),
        names=own.pop("arms", None),
        plain_mae=own.pop("plain_mae", None),
        primus_hiendmae=own.pop("primus_hiendmae", None),
    )
    return Grid(
        name=own.pop("name", args.o.resolve().name),
        datasets=tuple(preprocessed_folder(d).name for d in own.pop("datasets")),
        configurations=tuple(own.pop("configurations", ("3d_fullres",))),
        folds=tuple(own.pop("folds", (0,))),
        labels=tuple(parse_labels(word) for word in own.pop("labels", ("all",))),
        arms=arms,
        **own,
    )


def plan_verb(args: argparse.Namespace) -> int:
    """Write the grid and what it needs; say what differs between the arms."""
    from nnunetv2_hiendmae.benchmark.fair import other_encoders
    from nnunetv2_hiendmae.benchmark.overlap import overlap_lines
    from nnunetv2_hiendmae.benchmark.plan import COMMANDS_FILE, differences_text, plan

    grid, added = plan(grid_of(args), args.o, args.allow_overlap)
    print(differences_text(grid))
    for line in overlap_lines(grid, args.o):
        print(line)
    for line in other_encoders(grid):
        print(f"WARNING: {line}")
    print(f"{len(grid.runs())} runs in {args.o / GRID_FILE}; {added} new splits for label budgets.")
    print(f"Train with 'hiendmae_benchmark run -o {args.o}', or with the plain commands in {args.o / COMMANDS_FILE}.")
    return 0


def planned_grid(folder: Path) -> Grid:
    """The grid in a benchmark's folder. ``ValueError`` if there is none, or it was edited and not planned again."""
    from nnunetv2_hiendmae.benchmark.arms import check_planned

    grid = read_grid(folder / GRID_FILE)
    check_planned(grid, folder)
    return grid


def run_verb(args: argparse.Namespace) -> int:
    """Run what is not finished; 1 if a run failed."""
    from nnunetv2_hiendmae.benchmark.run import ends_as_ctrl_c, run_part

    check_count("num_parts", args.num_parts)
    if not 0 <= args.part_id < args.num_parts:
        raise ValueError(f"-part_id {args.part_id} must be 0 to {args.num_parts - 1} (-num_parts {args.num_parts}).")
    grid = planned_grid(args.o)
    with ends_as_ctrl_c():
        failures = run_part(grid, args.part_id, args.num_parts, args.o / "logs")
    for line in failures:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failures else 0


def report_verb(args: argparse.Namespace) -> int:
    """Write the report; 1 if a run is missing or changed."""
    from nnunetv2_hiendmae.benchmark.report import report

    if not 0 < args.tolerance_mm < math.inf:
        raise ValueError(f"-tolerance_mm {args.tolerance_mm} must be a positive number.")
    failures = report(planned_grid(args.o), args.o, args.tolerance_mm)
    for line in failures:
        print(line, file=sys.stderr)
    print(f"Report in {args.o / 'report.html'} and {args.o / 'report.md'}.")
    return 1 if failures else 0


def robustness_verb(args: argparse.Namespace) -> int:
    """Predict changed test cases and write what was lost; 1 if a run cannot be predicted."""
    from nnunetv2_hiendmae.benchmark.robustness import robustness

    failures = robustness(planned_grid(args.o), args.o)
    for line in failures:
        print(f"MISSING {line}", file=sys.stderr)
    print(f"Dice lost on changed scans in {args.o / 'robustness.md'}.")
    return 1 if failures else 0


def probe_verb(args: argparse.Namespace) -> int:
    """Print what a linear map finds in the tokens of each file, and of random weights."""
    import torch

    from nnunetv2_hiendmae.probe.files import probe_file, table, write_csv

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("-device cuda: torch finds no CUDA device. Use -device cpu.")
    rows = [row for file in args.w for row in probe_file(file, args.d, args.p, args.c, torch.device(args.device))]
    print(table(rows))
    if args.o is not None:
        write_csv(rows, args.o)
    return 0


def benchmark(args: argparse.Namespace) -> int:
    """The verb that was asked for; 1 if a run failed, is missing or changed."""
    verbs = {
        "plan": plan_verb,
        "run": run_verb,
        "report": report_verb,
        "robustness": robustness_verb,
        "probe": probe_verb,
    }
    return verbs[args.verb](args)


def main() -> NoReturn:
    """Entry point."""
    run_command(parser(), benchmark, "the same command continues")
