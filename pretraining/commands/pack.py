"""``hiendmae_pack``: preprocessed data sets as one memory-mapped corpus."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from tqdm import tqdm

from nnunetv2_hiendmae.checks import check_count
from nnunetv2_hiendmae.command import CommandParser, run_command
from nnunetv2_hiendmae.files import dataset_ids
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW
from pretraining.data.b2nd import open_b2nd
from pretraining.data.open import packed_folder
from pretraining.data.pack import pack, packed_bytes, verify
from pretraining.data.packed import PackedCorpus
from pretraining.processes import usable_cores

EXAMPLES = """Examples:
  hiendmae_pack -d 500 501        8-bit voxels, one process a core
  hiendmae_pretrain -packed HiEndMAE_packed_500_501
  hiendmae_pack -o HiEndMAE_packed_500_501 --verify

Packing can be interrupted; the same command goes on with the shards that are missing.
"""


def parser() -> CommandParser:
    """All flags."""
    p = CommandParser(
        prog="hiendmae_pack",
        usage="hiendmae_pack -d 500 [501 ...] [-p PLANS] [-c CONFIGURATION] [-o NAME] [--verify]",
        description="Pack preprocessed data sets into one memory-mapped corpus of canonical intensities.",
        examples=EXAMPLES,
    )
    p.add_argument("-d", nargs="+", metavar="DATASET", help="data set names or ids")
    p.add_argument("-p", metavar="PLANS", help="plans name [HiEndMAEPlans where all have them, else nnUNetPlans]")
    p.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="plans configuration [3d_fullres]")
    p.add_argument("-o", metavar="NAME", help="folder, or its name in nnUNet_preprocessed [HiEndMAE_packed_<ids>]")
    p.add_argument("-bits", type=int, choices=(8, 16), default=8, help="of a voxel [8]")
    p.add_argument("-window_hu", type=float, nargs=2, default=DEFAULT_WINDOW, metavar="HU", help="[-175 250]")
    p.add_argument("-np", type=int, default=usable_cores(), help="processes [one a usable core]")
    p.add_argument("--verify", action="store_true", help="compare every case of a packed corpus with its checksum")
    return p


def run_pack(args: argparse.Namespace) -> int:
    """Pack; returns the number of cases left out. ``ValueError`` for a user's mistake."""
    check_count("np", args.np)
    corpus = open_b2nd(args.d, args.p, args.c, tuple(args.window_hu))
    for warning in corpus.warnings:
        print(f"WARNING: {warning}")
    folder = packed_folder(args.o or f"HiEndMAE_packed_{dataset_ids(d.name for d in corpus.datasets)}")
    print(f"{len(corpus)} cases to {folder}")
    failures: list[str] = []
    with tqdm(total=len(corpus), unit="case", disable=not sys.stderr.isatty()) as bar:
        for done, failures in pack(corpus, folder, args.bits, args.np):  # noqa: B007 - the last list is complete
            bar.update(done - bar.n)
    for line in failures:
        print(f"LEFT OUT: {line}")
    packed = PackedCorpus(folder)
    print(f"{len(packed)} cases of {packed_bytes(packed) / 2**30:.2f} GiB, {packed.bits} bits a voxel.")
    print(f"Train with: hiendmae_pretrain -packed {folder.name if not args.o else args.o}")
    return len(failures)


def run_verify(args: argparse.Namespace) -> int:
    """Returns the number of damaged cases."""
    if args.o is None:
        raise ValueError("--verify needs the packed corpus (-o).")
    corpus = PackedCorpus(packed_folder(args.o))
    problems = []
    for problem in tqdm(verify(corpus), total=len(corpus), unit="case", disable=not sys.stderr.isatty()):
        if problem:
            problems.append(problem)
            print(f"DAMAGED: {problem}")
    print(f"{len(corpus)} cases checked, {len(problems)} damaged.")
    return len(problems)


def run(args: argparse.Namespace) -> int:
    """What the command does; 1 if cases are damaged or left out."""
    if not args.verify and not args.d:
        raise ValueError("name the data sets to pack (-d)")
    return 1 if (run_verify(args) if args.verify else run_pack(args)) else 0


def main() -> NoReturn:
    """Entry point."""
    run_command(parser(), run, "finished shards are kept, the same command goes on with the others")
