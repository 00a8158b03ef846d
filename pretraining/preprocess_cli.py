"""``hiendmae_plan_and_preprocess``: nnU-Net's plans and preprocessed volumes for data sets without labels."""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
from pathlib import Path
from typing import NoReturn

from nnunetv2.paths import nnUNet_preprocessed
from tqdm import tqdm

from pretraining.preprocess import CONFIGURATION, UNFINISHED, Failure, find_images, is_done, make_plans, preprocess
from pretraining.provenance import write_manifest

EXAMPLE = """examples:
  hiendmae_plan_and_preprocess -d 500                        1.5 mm isotropic, HU window -175…250
  hiendmae_plan_and_preprocess -d 500 501 -spacing 3 3 3 -p HiEndMAE3mmPlans
  hiendmae_plan_and_preprocess -d 500 --plan_only            on a cluster: plan once, then
  hiendmae_plan_and_preprocess -d 500 -num_parts 10 -part_id 3

Cases that are done are checked and skipped; one bad case does not stop the others.
"""


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = argparse.ArgumentParser(
        prog="hiendmae_plan_and_preprocess",
        usage="hiendmae_plan_and_preprocess -d 500 [501 ...] [-spacing X Y Z] [-np N] [-num_parts N -part_id I]",
        description="Plan and preprocess data sets of images only; labels, where present, are ignored.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("-d", nargs="+", required=True, metavar="DATASET", help="data set names or ids")
    p.add_argument(
        "-spacing", nargs="+", default=["1.5"] * 3, metavar="MM", help="three numbers, or median [1.5 1.5 1.5]"
    )
    p.add_argument("-p", default="HiEndMAEPlans", metavar="PLANS", help="name of the plans [HiEndMAEPlans]")
    p.add_argument("-np", type=int, default=multiprocessing.cpu_count(), help="processes [one a core]")
    p.add_argument("-num_parts", type=int, default=1, help="split the cases over so many commands [1]")
    p.add_argument("-part_id", type=int, default=0, help="which part this command does, from 0 [0]")
    p.add_argument("--plan_only", action="store_true", help="fingerprint and plans, no volumes")
    return p


def parse_spacing(values: list[str]) -> str | tuple[float, ...]:
    """``median`` or three positive numbers. ``ValueError`` otherwise."""
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
    """Returns the number of cases left out. ``ValueError`` for a user's mistake."""
    if args.np < 1 or args.num_parts < 1 or not 0 <= args.part_id < args.num_parts:
        raise ValueError(f"-np {args.np} -num_parts {args.num_parts} -part_id {args.part_id}: impossible values.")
    if "__" in args.p or not args.p:
        raise ValueError(f"-p '{args.p}' must not be empty or contain '__'.")
    if not nnUNet_preprocessed.is_set():
        raise ValueError("The environment variable nnUNet_preprocessed is not set; it names the preprocessed data.")
    spacing = parse_spacing(args.spacing)
    return sum(run_dataset(dataset, spacing, args) for dataset in dict.fromkeys(args.d))


def run_dataset(dataset: str, spacing: str | tuple[float, ...], args: argparse.Namespace) -> int:
    """One data set; returns the number of cases left out."""
    raw, description, images = find_images(dataset)
    output = Path(str(nnUNet_preprocessed)) / raw.name
    plans_file = output / f"{args.p}.json"
    print(f"{raw.name}: {len(images)} cases", flush=True)
    failures: dict[str, Failure] = {}
    if args.num_parts > 1 and not args.plan_only and not plans_file.is_file():
        raise ValueError(f"{plans_file} does not exist. Plan once before the parts: the same command with --plan_only.")
    if args.plan_only or args.num_parts == 1:
        plans_file, unreadable = make_plans(dataset, output, spacing, args.p, args.np)
        failures |= {f.case: f for f in unreadable}
    done: set[str] = set()
    if not args.plan_only:
        part = (args.part_id, args.num_parts)
        count = len(list(images)[args.part_id :: args.num_parts])
        bar = tqdm(total=count, unit="case", disable=not sys.stderr.isatty())
        for result in preprocess(dataset, plans_file, args.np, part):
            bar.update()
            if isinstance(result, Failure):
                failures[result.case] = result
            else:
                done.add(result)
        bar.close()
        folder = output / f"{args.p}_{CONFIGURATION}"
        everything = {case for case in images if case in done or is_done(folder, case)}
        write_manifest(output, raw, description, args.p, everything)
        if args.num_parts == 1:
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    for failure in failures.values():
        print(f"LEFT OUT {failure.file}: {failure.reason}")
    print(f"{raw.name}: {len(done)} cases preprocessed, {len(failures)} left out. Plans: {plans_file}")
    return len(failures)


def main() -> NoReturn:
    """Entry point: 0 if every case went in, 1 if some were left out or the disk is full, 2 for a flag's mistake."""
    p = parser()
    args = p.parse_args()
    try:
        left_out = run(args)
    except ValueError as error:
        p.exit(2, f"{p.prog}: error: {error}\n")
    except OSError as error:
        p.exit(
            1, f"{p.prog}: error: {error} ({nnUNet_preprocessed}). Finished cases are kept; the same command goes on\n"
        )
    except KeyboardInterrupt:
        p.exit(130, f"{p.prog}: interrupted; the same command goes on with the cases that are missing\n")
    p.exit(1 if left_out else 0)


if __name__ == "__main__":
    main()
