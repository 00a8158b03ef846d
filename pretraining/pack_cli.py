"""``hiendmae_pack``: preprocessed data sets as one memory-mapped corpus."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from nnunetv2_hiendmae.command import CommandParser, check_count
from nnunetv2_hiendmae.folders import dataset_names, preprocessed_root
from pretraining.pack import pack, packed_bytes, verify
from pretraining.packed import PackedCorpus
from pretraining.preprocessed import DataSet, PreprocessedCorpus, default_plans

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
    p.add_argument("-window", type=float, nargs=2, default=(-175.0, 250.0), metavar="HU", help="[-175 250]")
    p.add_argument("-np", type=int, default=multiprocessing.cpu_count(), help="processes [one a core]")
    p.add_argument("--verify", action="store_true", help="compare every case of a packed corpus with its checksum")
    return p


def packed_folder(name: str) -> Path:
    """A path that exists as given, else a name in ``nnUNet_preprocessed``."""
    if Path(name).is_dir() or Path(name).is_absolute():
        return Path(name)
    return preprocessed_root() / name


def run_pack(args: argparse.Namespace) -> int:
    """Pack; returns the number of cases left out. ``ValueError`` for a user's mistake."""
    check_count("-np", args.np)
    window = (args.window[0], args.window[1])
    plans = args.p or default_plans(args.d)
    corpus = PreprocessedCorpus([DataSet.open(d, plans, args.c, window) for d in dataset_names(args.d)])
    for dataset in corpus.sources:
        if dataset.warning:
            print(f"WARNING: {dataset.warning}")
    ids = "_".join(d.name[len("Dataset") :].split("_")[0] for d in corpus.datasets)
    folder = packed_folder(args.o or f"HiEndMAE_packed_{ids}")
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


def main() -> NoReturn:
    """Entry point: exit 2 for a flag's mistake, 1 if cases are damaged or left out or the disk is full."""
    p = parser()
    args = p.parse_args()
    try:
        if not args.verify and not args.d:
            raise ValueError("name the data sets to pack (-d)")
        bad = run_verify(args) if args.verify else run_pack(args)
    except ValueError as error:
        p.exit(2, f"hiendmae_pack: error: {error}\n")
    except OSError as error:
        p.exit(1, f"hiendmae_pack: error: {error}; finished shards are kept, the same command goes on\n")
    except KeyboardInterrupt:
        p.exit(130, "hiendmae_pack: interrupted; the same command goes on with the missing shards\n")
    p.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
