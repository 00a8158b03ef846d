"""``hiendmae_plan``: fine-tuning settings as nnU-Net plans of another name."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_hiendmae.channels import channel_names
from nnunetv2_hiendmae.command import CommandParser, run_command
from nnunetv2_hiendmae.files import preprocessed_folder, read_json, read_plans
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW, Window, channel_lines, plan_intensities
from nnunetv2_hiendmae.nnunet.plans import make_plans
from nnunetv2_hiendmae.nnunet.settings import BLOCK, FineTuneSettings
from nnunetv2_hiendmae.weights.file import load_weights

# Settings that are no single number or string on the command line, or that only the trainer writes.
ALIASES = {"num_epochs": ["--epochs"]}
NOT_FLAGS = ("weights_sha256",)

EXAMPLES = """Examples:
  hiendmae_plan -d 17 --weights weights.pth --epochs 100
  nnUNetv2_train 17 3d_fullres 0 -p nnUNetPlans_hiendmae -tr nnUNetTrainerHiEndMAE
"""


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
    p.add_argument(
        "-batch_dice",
        "--batch_dice",
        action="store_true",
        help="Dice loss over the batch: patches that lack an organ then do not unteach it [by nnU-Net's rule]",
    )
    for f in fields(FineTuneSettings):
        if f.name in NOT_FLAGS:
            continue
        names = [f"-{f.name}", f"--{f.name}", *ALIASES.get(f.name, [])]
        if f.name == "window_hu":
            p.add_argument(*names, type=float, nargs=2, metavar="HU", help="[that of the weights]")
        elif f.name == "vit_patch_size":
            p.add_argument(*names, type=int, nargs=3, metavar="N", help="voxels of a token [that of the weights]")
        elif str(f.type) == "bool":
            p.add_argument(*names, action="store_true", default=None, help=f"[{f.default}]")
        else:
            kind = {"int": int, "float": float}.get(str(f.type), str)
            p.add_argument(*names, type=kind, metavar="X", help=f"[{f.default}]")
    return p


def plan(args: argparse.Namespace) -> None:
    """What the command does; ``ValueError`` for a user's mistake."""
    folder = preprocessed_folder(args.d)
    source_file, plans_name = folder / f"{args.p}.json", args.plans_name or f"{args.p}_hiendmae"
    target = folder / f"{plans_name}.json"
    source = read_plans(source_file, f"Run 'nnUNetv2_plan_and_preprocess -d {args.d}' first.")
    written = read_plans(target, "Remove it, or choose another -plans_name.") if target.is_file() else None
    if written is not None and not any(BLOCK in configuration for configuration in written["configurations"].values()):
        raise ValueError(f"{target} exists and was not written by hiendmae_plan; choose another -plans_name.")
    given = {f.name: getattr(args, f.name, None) for f in fields(FineTuneSettings)}
    settings = {name: value for name, value in given.items() if value is not None}
    if args.weights is not None:
        weights = load_weights(args.weights)
        settings |= {"weights": str(weights.path.absolute()), "weights_sha256": weights.sha256}
    plans = make_plans(source, plans_name, settings, args.patch_size, args.batch_size, args.batch_dice)
    save_json(plans, str(target), sort_keys=False)
    print(f"Plans written to {target}")
    print_channels(folder, plans, settings.get("window_hu"))
    trainer = "nnUNetTrainerHiEndMAE_scratch" if settings.get("identity_blocks") else "nnUNetTrainerHiEndMAE"
    print(f"Train with: nnUNetv2_train {args.d} 3d_fullres 0 -p {plans_name} -tr {trainer}")


def print_channels(folder: Path, plans: dict[str, Any], window: Window | None) -> None:
    """What an encoder gets of each image channel, one line each, whatever configuration says it."""
    description, manager = folder / "dataset.json", PlansManager(plans)
    names = channel_names(read_json(description)) if description.is_file() else []
    lines: dict[str, None] = {}
    for name in manager.available_configurations:
        configuration = manager.get_configuration(name).configuration
        if len(configuration["spacing"]) == 3:
            channels = plan_intensities(plans, configuration, window or DEFAULT_WINDOW, names)
            lines |= dict.fromkeys(channel_lines(channels, names))
    print(*lines, sep="\n")


def main() -> NoReturn:
    """Entry point."""
    run_command(parser(), plan)
