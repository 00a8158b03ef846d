"""``hiendmae_demo``: the whole path on a synthetic CT data set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from nnunetv2_hiendmae.checks import check_count
from nnunetv2_hiendmae.command import CommandParser, run_command

EXAMPLES = """Examples:
  hiendmae_demo                    three to five minutes on two CPU cores; open ./hiendmae_demo/index.html
  hiendmae_demo -i ct.nii.gz       the demo's networks on a CT of yours; runs the demo first if need be
"""


def parser() -> CommandParser:
    p = CommandParser(
        prog="hiendmae_demo",
        usage="hiendmae_demo [-o FOLDER] [-i CT] [-device cpu] [-seed N]",
        description="Run the whole path, with the commands a user would type, on a synthetic CT data set.",
        examples=EXAMPLES,
    )
    p.add_argument("-o", type=Path, default=Path("hiendmae_demo"), metavar="FOLDER", help="scratch [./hiendmae_demo]")
    p.add_argument("-i", type=Path, metavar="CT", help="a CT in HU to look at: a file, or a folder of one DICOM series")
    p.add_argument("-device", default="cpu", choices=("cpu", "cuda", "mps"), help="[cpu]")
    p.add_argument("-seed", type=int, default=0, help="of the phantoms and the pre-training [0]")
    return p


def run(args: argparse.Namespace) -> None:
    """What the command does."""
    if args.o.is_file():
        raise ValueError(f"-o {args.o} is a file; name a folder.")
    if args.i is not None and not args.i.exists():
        raise ValueError(f"-i {args.i} does not exist.")
    check_count("seed", args.seed, 0)
    from pretraining.demo.demo import Request, demo  # slow to import: flags first

    demo(Request(out=args.o.absolute(), device=args.device, seed=args.seed, image=args.i))


def main() -> NoReturn:
    """Entry point."""
    run_command(parser(), run, "the same command continues")
