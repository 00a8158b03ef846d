"""``hiendmae_doctor``: is everything there, and how to fix it if not."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

import torch

from nnunetv2_hiendmae.command import CommandParser, run_command
from pretraining.config import PRESETS
from pretraining.doctor.environment import (
    check_device,
    check_discovery,
    check_folders,
    check_preset,
    check_torchvision,
    check_versions,
)
from pretraining.doctor.finding import Finding

EXAMPLES = """Examples:
  hiendmae_doctor                               this machine and installation
  hiendmae_doctor -d 17                         and data set 17, its plans, and the weights it would start from
  hiendmae_doctor -d 500 -preset tiny -device cpu

Exit code 0: no problem (there may be warnings); 1: problems.
"""


def parser() -> CommandParser:
    """All flags."""
    p = CommandParser(
        prog="hiendmae_doctor",
        usage="hiendmae_doctor [-d DATASET] [-p PLANS] [-c CONFIGURATION] [-preset PRESET] [-device cuda]",
        description="Check installation, folders, device, data and weights; each problem comes with its remedy.",
        examples=EXAMPLES,
    )
    p.add_argument("-d", metavar="DATASET", help="data set name or id")
    p.add_argument("-p", metavar="PLANS", help="plans name [HiEndMAEPlans if there, else nnUNetPlans]")
    p.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="plans configuration [3d_fullres]")
    p.add_argument("-preset", default="large_p12", choices=PRESETS, help="of hiendmae_pretrain [large_p12]")
    p.add_argument("-device", choices=("cuda", "cpu", "mps"), help="[cuda if there is one]")
    return p


def findings(args: argparse.Namespace) -> Iterator[Finding]:
    """Every check, the quick ones first."""
    yield from check_folders()
    yield from check_versions()
    yield from check_device(args.device)
    yield from check_preset(args.preset, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.d is not None:
        from pretraining.doctor.dataset import check_dataset

        yield from check_dataset(args.d, args.p, args.c)
    yield from check_torchvision()
    yield from check_discovery()


def doctor(args: argparse.Namespace) -> int:
    """Print every finding; 1 if there are problems."""
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    counts = {"ok": 0, "warning": 0, "problem": 0}
    for finding in findings(args):
        counts[finding.level] += 1
        print(finding.text(colours), flush=True)
    print(f"{counts['ok']} ok, {counts['warning']} warnings, {counts['problem']} problems")
    return 1 if counts["problem"] else 0


def main() -> NoReturn:
    """Entry point."""
    run_command(parser(), doctor, "nothing was changed")
