"""``hiendmae_plan_and_preprocess``: nnU-Net's plans and preprocessed volumes for data sets without labels."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import NoReturn

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunetv2_hiendmae.checks import check_count
from nnunetv2_hiendmae.command import CommandParser, run_command
from nnunetv2_hiendmae.files import dataset_names, preprocessed_root, read_plans
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW, channel_lines, plan_intensities
from pretraining.prepare.preprocess import (
    CONFIGURATION,
    REPLAN,
    UNFINISHED,
    Spacing,
    make_plans,
    plan_spacing,
    preprocess,
    volume_folder,
)
from pretraining.prepare.provenance import write_manifest
from pretraining.prepare.quality import Gate
from pretraining.prepare.raw import Failure, RawDataSet
from pretraining.processes import usable_cores

EXAMPLES = """Examples:
  hiendmae_plan_and_preprocess -d 500                        1.5 mm isotropic, HU window -175…250
  hiendmae_plan_and_preprocess -d 500 501 -spacing 3 3 3 -p HiEndMAE3mmPlans
  hiendmae_plan_and_preprocess -d 500 --plan_only            on a cluster: plan once, then
  hiendmae_plan_and_preprocess -d 500 -num_parts 10 -part_id 3

Cases that are done are checked and skipped; one bad case does not stop the others.
"""


def parser() -> CommandParser:
    """All flags."""
    p = CommandParser(
        prog="hiendmae_plan_and_preprocess",
        usage="hiendmae_plan_and_preprocess -d 500 [501 ...] [-spacing MM MM MM] [-np N] [-num_parts N -part_id I] "
        "[--no_quality_gate]",
        description="Plan and preprocess data sets of images only; labels, where present, are ignored.",
        examples=EXAMPLES,
    )
    p.add_argument("-d", nargs="+", required=True, metavar="DATASET", help="data set names or ids")
    p.add_argument(
        "-spacing",
        nargs="+",
        metavar="MM",
        help="three numbers, slices first, or median [that of existing plans, else 1.5 1.5 1.5]",
    )
    p.add_argument("-p", default="HiEndMAEPlans", metavar="PLANS", help="name of the plans [HiEndMAEPlans]")
    p.add_argument("-np", type=int, default=usable_cores(), help="processes [one a usable core]")
    p.add_argument("-num_parts", type=int, default=1, help="split the cases over so many commands [1]")
    p.add_argument("-part_id", type=int, default=0, help="which part this command does, from 0 [0]")
    p.add_argument("--no_quality_gate", action="store_true", help="take CT channels whose voxels cannot be HU, too")
    p.add_argument("--plan_only", action="store_true", help="fingerprint and plans, no volumes")
    return p


def parse_spacing(values: list[str] | None) -> Spacing:
    """``median``, three positive numbers, or None where none was given. ``ValueError`` otherwise."""
    if values is None:
        return None
    if values == ["median"]:
        return "median"
    try:
        numbers = tuple(float(v) for v in values)
    except ValueError:
        numbers = ()
    if len(numbers) != 3 or not all(0.1 <= n <= 100 for n in numbers):
        raise ValueError(f"-spacing {' '.join(values)}: give three numbers in mm (0.1 to 100), or median.")
    return numbers


def run(args: argparse.Namespace) -> int:
    """What the command does; 1 if cases were left out. ``ValueError`` for a user's mistake."""
    check_count("np", args.np)
    check_count("num_parts", args.num_parts)
    if not 0 <= args.part_id < args.num_parts:
        raise ValueError(f"-part_id {args.part_id} must be 0 to {args.num_parts - 1} (-num_parts {args.num_parts}).")
    if "__" in args.p or not args.p:
        raise ValueError(f"-p '{args.p}' must not be empty or contain '__'.")
    spacing = parse_spacing(args.spacing)
    if spacing is not None and args.num_parts > 1 and not args.plan_only:
        raise ValueError("-spacing belongs to the command that plans (--plan_only); the parts follow the plans.")
    left_out = sum(run_dataset(RawDataSet.open(name), spacing, args) for name in dataset_names(args.d))
    return 1 if left_out else 0


def run_dataset(raw: RawDataSet, spacing: Spacing, args: argparse.Namespace) -> int:
    """One data set; returns the number of cases left out."""
    plans_file = preprocessed_root() / raw.folder.name / f"{args.p}.json"
    print(f"{raw.folder.name}: {len(raw.images)} cases", flush=True)
    failures = {f.case: f for f in raw.incomplete}
    gate = None if args.no_quality_gate else Gate()
    if args.plan_only or args.num_parts == 1:
        failures |= {f.case: f for f in make_plans(raw, plans_file, spacing, args.np, gate)}
    elif not plans_file.is_file():
        raise ValueError(f"{plans_file} does not exist. Plan once before the parts: the same command with --plan_only.")
    done = 0
    if not args.plan_only:
        done = run_part(raw, plans_file, args, failures, gate)
        finished = nnUNetDatasetBlosc2.get_identifiers(str(volume_folder(plans_file)))
        write_manifest(plans_file, raw.folder, raw.description, set(raw.images).intersection(finished), args.part_id)
    for failure in failures.values():
        print(f"LEFT OUT {failure.file}: {failure.reason}")
    print_channels(plans_file, raw.channels)
    mm = " × ".join(f"{value:g}" for value in plan_spacing(plans_file))
    print(f"{raw.folder.name}: {done} cases preprocessed, {len(failures)} left out. Plans: {plans_file} ({mm} mm)")
    return len(failures)


def print_channels(plans_file: Path, names: list[str]) -> None:
    """What pre-training gets of each channel."""
    plans = PlansManager(read_plans(plans_file, REPLAN))
    configuration = plans.get_configuration(CONFIGURATION).configuration
    print(*channel_lines(plan_intensities(plans.plans, configuration, DEFAULT_WINDOW, names), names), sep="\n")


def run_part(
    raw: RawDataSet, plans_file: Path, args: argparse.Namespace, failures: dict[str, Failure], gate: Gate | None
) -> int:
    """Preprocess this command's cases, noting failures; returns how many are done."""
    done = 0
    count = len(list(raw.images)[args.part_id :: args.num_parts])
    with tqdm(total=count, unit="case", disable=not sys.stderr.isatty()) as bar:
        for result in preprocess(raw, plans_file, args.np, (args.part_id, args.num_parts), gate):
            bar.update()
            if isinstance(result, Failure):
                failures[result.case] = result
            else:
                done += 1
    if args.num_parts == 1:
        shutil.rmtree(volume_folder(plans_file) / UNFINISHED, ignore_errors=True)
    return done


def main() -> NoReturn:
    """Entry point: 0 if every case went in, 1 if some were left out."""
    run_command(parser(), run, "finished cases are kept, the same command goes on with the others")
