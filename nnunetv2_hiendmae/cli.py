"""``hiendmae_plan``: fine-tuning settings as nnU-Net plans of another name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from batchgenerators.utilities.file_and_folder_operations import save_json

from nnunetv2_hiendmae.command import CommandParser, check_count
from nnunetv2_hiendmae.folders import preprocessed_folder, read_plans
from nnunetv2_hiendmae.patch import with_patch_size
from nnunetv2_hiendmae.settings import BLOCK, FineTuneSettings
from nnunetv2_hiendmae.weights import load_weights

# Settings that are no single number or string on the command line, or that only the trainer writes.
ALIASES = {"num_epochs": ["--epochs"]}
NOT_FLAGS = ("weights_sha256",)

EXAMPLES = """Examples:
  hiendmae_plan -d 17 --weights weights.pth --epochs 100
  nnUNetv2_train 17 3d_fullres 0 -p nnUNetPlans_hiendmae -tr nnUNetTrainerHiEndMAE
"""


def make_plans(
    source: dict[str, Any],
    plans_name: str,
    settings: dict[str, Any],
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Plans like ``source`` under another name, with ``settings`` in the block of every 3D configuration.

    The preprocessed data stay those of the source: each configuration keeps its ``data_identifier``.
    ``patch_size`` (voxels, ``(z, y, x)``) and ``batch_size`` replace those of every 3D configuration.

    Raises:
        ValueError: impossible name, settings or sizes.
    """
    if "__" in plans_name or not plans_name:
        raise ValueError(
            f"-plans_name '{plans_name}' must not be empty or contain '__' (nnU-Net splits folders there)."
        )
    if batch_size is not None:
        check_count("-batch_size", batch_size)
    configurations = {}
    for name, configuration in source["configurations"].items():
        block = {**configuration.get(BLOCK, {}), **settings}
        FineTuneSettings(**block)
        if name != "2d":
            configuration = {**configuration, BLOCK: block}
            if patch_size is not None and "patch_size" in configuration:  # else inherited
                configuration = with_patch_size(configuration, patch_size)
            if batch_size is not None and "batch_size" in configuration:
                configuration["batch_size"] = batch_size
        configurations[name] = configuration
    return {**source, "plans_name": plans_name, "configurations": configurations}


def parser() -> CommandParser:
    """One flag a setting: its name, with one dash or two."""
    p = CommandParser(
        prog="hiendmae_plan",
        usage="hiendmae_plan -d 17 [-p nnUNetPlans] [-plans_name NAME] [--weights FILE] [--epochs 100] [...]",
        description="Write fine-tuning settings into new plans, made from existing ones without preprocessing again.",
        examples=EXAMPLES,
    )
    p.add_argument("-d", required=True, metavar="DATASET", help="data set name or id")
    p.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans to start from [nnUNetPlans]")
    p.add_argument("-plans_name", metavar="NAME", help="name of the new plans [<PLANS>_hiendmae]")
    p.add_argument("-patch_size", type=int, nargs=3, metavar="N", help="voxels, z y x [that of PLANS]")
    p.add_argument("-batch_size", type=int, metavar="N", help="[that of PLANS]")
    for f in fields(FineTuneSettings):
        if f.name in NOT_FLAGS:
            continue
        names = [f"-{f.name}", f"--{f.name}", *ALIASES.get(f.name, [])]
        if f.name == "window_hu":
            p.add_argument(*names, type=float, nargs=2, metavar="HU", help="[that of the weights]")
        elif str(f.type) == "bool":
            p.add_argument(*names, action="store_true", default=None, help=f"[{f.default}]")
        else:
            kind = {"int": int, "float": float}.get(str(f.type), str)
            p.add_argument(*names, type=kind, metavar="X", help=f"[{f.default}]")
    return p


def plan(args: argparse.Namespace) -> Path:
    """What the command does; ``ValueError`` for a user's mistake. Returns the new plans file."""
    folder = preprocessed_folder(args.d)
    source_file, plans_name = folder / f"{args.p}.json", args.plans_name or f"{args.p}_hiendmae"
    target = folder / f"{plans_name}.json"
    source = read_plans(source_file, f"Run 'nnUNetv2_plan_and_preprocess -d {args.d}' first.")
    written = read_plans(target, "Remove it, or choose another -plans_name.") if target.is_file() else None
    if written is not None and BLOCK not in str(written["configurations"]):
        raise ValueError(f"{target} exists and was not written by hiendmae_plan; choose another -plans_name.")
    given = {f.name: getattr(args, f.name, None) for f in fields(FineTuneSettings)}
    settings = {name: value for name, value in given.items() if value is not None}
    if args.weights is not None:
        weights = load_weights(args.weights)
        settings |= {"weights": str(weights.path.absolute()), "weights_sha256": weights.sha256}
    plans = make_plans(source, plans_name, settings, args.patch_size, args.batch_size)
    save_json(plans, str(target), sort_keys=False)
    return target


def plan_entry() -> NoReturn:
    """Entry point; exit 2 and one line for a user's mistake."""
    p = parser()
    args = p.parse_args()
    try:
        target = plan(args)
    except ValueError as error:
        p.exit(2, f"hiendmae_plan: error: {error}\n")
    name = target.stem
    print(f"Plans written to {target}")
    print(f"Train with: nnUNetv2_train {args.d} 3d_fullres 0 -p {name} -tr nnUNetTrainerHiEndMAE")
    p.exit(0)
