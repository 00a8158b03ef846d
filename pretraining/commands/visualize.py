"""``hiendmae_visualize``: pictures of what a pre-training learned."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn

from nnunetv2_hiendmae.checks import check_count
from nnunetv2_hiendmae.command import CommandParser, run_command

EXAMPLES = """Examples:
  hiendmae_visualize -run nnUNet_results/Dataset500_X/HiEndMAE__HiEndMAEPlans__3d_fullres/large_p12_500 \\
      -i ct.nii.gz -o pictures
  hiendmae_visualize -run weights.pth -i ct.nii.gz -o pictures     encoder only: no reconstruction
  hiendmae_visualize -run RUN -d 500 -case X_001 -o pictures       a preprocessed case

Open pictures/index.html in a browser; reconstruction.nii.gz in 3D Slicer.
"""


def parser() -> CommandParser:
    """All flags."""
    p = CommandParser(
        prog="hiendmae_visualize",
        usage="hiendmae_visualize -run RUN_FOLDER -i ct.nii.gz -o pictures [-voxel X Y Z] [-device cuda] [...]",
        description="Reconstruction, attention and features of a pre-trained network on one CT: PNG, HTML, NIfTI.",
        examples=EXAMPLES,
    )
    p.add_argument("-run", required=True, type=Path, metavar="PATH", help="folder of a run, or a weights file")
    p.add_argument(
        "-i", type=Path, metavar="CT", help="a CT in HU: NIfTI, NRRD or MHA, or a folder of one DICOM series"
    )
    p.add_argument("-d", metavar="DATASET", help="instead of -i: a preprocessed data set, by name or id")
    p.add_argument("-case", metavar="NAME", help="with -d: which case")
    p.add_argument("-p", metavar="PLANS", help="with -d: plans [those of the run]")
    p.add_argument("-o", required=True, type=Path, metavar="FOLDER", help="for the pictures; made if it is not there")
    p.add_argument(
        "-voxel", type=int, nargs=3, metavar=("X", "Y", "Z"),
        help="voxel of the CT, counted from 0, for attention and slices [the middle of the body]",
    )  # fmt: skip
    p.add_argument(
        "-spacing", type=float, nargs=3, metavar="MM",
        help="with -i: voxel size for the network, slices first [that of the pre-training]",
    )  # fmt: skip
    p.add_argument("-seed", type=int, default=0, help="of the masks and of the random weights [0]")
    p.add_argument("-device", default="cpu", choices=("cpu", "cuda", "mps"), help="[cpu]")
    return p


def check(args: argparse.Namespace) -> None:
    """``ValueError`` for flags that do not go together."""
    if (args.i is None) == (args.d is None):
        raise ValueError("name one CT: a file with -i, or a preprocessed case with -d DATASET -case NAME.")
    if (args.d is None) != (args.case is None):
        raise ValueError("-d and -case go together: -d DATASET -case NAME.")
    if args.p is not None and args.d is None:
        raise ValueError("-p goes with -d; a CT given with -i needs no plans.")
    if args.spacing is not None and (args.d is not None or not all(0.1 <= mm <= 100 for mm in args.spacing)):
        raise ValueError("-spacing goes with -i: three numbers in mm (0.1 to 100), slices first.")
    there = next(folder for folder in (args.o.absolute(), *args.o.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"-o {args.o}: {there} is a file; name a folder.")
    if not os.access(there, os.W_OK):
        raise ValueError(f"-o {args.o}: {there} may not be written to; name another folder.")
    check_count("seed", args.seed, 0)


def run(args: argparse.Namespace) -> None:
    """What the command does. ``ValueError`` for a user's mistake, ``OSError`` if pictures cannot be written."""
    check(args)
    print("loading the network and the CT ...", flush=True)
    from pretraining.visualize.visualize import Request, visualize  # slow to import: flags first

    request = Request(
        run=args.run,
        output=args.o,
        image=args.i,
        dataset=args.d,
        case=args.case,
        plans=args.p,
        voxel=args.voxel and tuple(args.voxel),
        spacing=args.spacing and tuple(args.spacing),
        seed=args.seed,
        device=args.device,
    )
    visualize(request)


def main() -> NoReturn:
    """Entry point."""
    run_command(parser(), run, "pictures that were finished are kept")
