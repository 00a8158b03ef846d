"""``hiendmae_import_weights``: other programs' checkpoints to weights files, and weights files to nnssl's format."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import NoReturn

import torch

from nnunetv2_hiendmae.checks import Size
from nnunetv2_hiendmae.command import CommandParser, run_command
from nnunetv2_hiendmae.files import atomic_file, preprocessed_folder, read_json, read_plans
from nnunetv2_hiendmae.intensity import Window, check_window
from nnunetv2_hiendmae.weights.file import Weights, save_weights
from nnunetv2_hiendmae.weights.nnssl import to_nnssl
from nnunetv2_hiendmae.weights.official import Imported
from nnunetv2_hiendmae.weights.read import read_weights

EXAMPLES = """Examples:
  hiendmae_import_weights hi_end_mae_10k.pth -o weights.pth      the authors' released checkpoint
  hiendmae_import_weights nnssl_style.pth -o weights.pth         a checkpoint written with --nnssl
  hiendmae_import_weights openmind_primus_m.pth -o weights.pth   nnssl's or nnU-Net's Primus
  hiendmae_import_weights weights.pth -o nnssl_style.pth --nnssl
  hiendmae_import_weights weights.pth -o start.pth --nnunet -d 17    for nnU-Net's own Primus trainer
"""


def parser() -> CommandParser:
    p = CommandParser(
        prog="hiendmae_import_weights",
        description="Convert pre-trained weights for nnUNetTrainerHiEndMAE. Nothing is downloaded.",
        examples=EXAMPLES,
    )
    p.add_argument("source", type=Path, help="checkpoint to read (the authors', nnssl's, a Primus, or a weights file)")
    p.add_argument("-o", dest="output", type=Path, required=True, metavar="FILE", help="file to write")
    p.add_argument("-num_heads", type=int, metavar="N", help="attention heads, if the width is not a published one")
    p.add_argument("-img_size", type=int, nargs=3, metavar=("H", "W", "D"),
                   help="crop of the pre-training, if a learned position embedding is not on a cube")  # fmt: skip
    p.add_argument("-window_hu", type=float, nargs=2, metavar=("LOW", "HIGH"),
                   help="HU range that the pre-training scaled to [0, 1], if it was not -175 250")  # fmt: skip
    form = p.add_mutually_exclusive_group()
    form.add_argument("--nnssl", action="store_true", help="write nnssl's format instead of a weights file")
    form.add_argument("--nnunet", action="store_true",
                      help="write what starts nnU-Net's own Primus trainer; needs -d")  # fmt: skip
    p.add_argument("-d", metavar="DATASET", help="data set that nnU-Net's trainer will train on")
    p.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans it will train under [nnUNetPlans]")
    p.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="their configuration [3d_fullres]")
    return p


def report(imported: Imported) -> str:
    """What was used and dropped, by module, and what a segmentation network will have fresh."""
    parameters = sum(tensor.numel() for tensor in imported.encoder.values())
    modules = Counter(key.split(".")[0] for key in imported.dropped)
    single = [key for key in imported.dropped if modules[key.split(".")[0]] == 1]
    listed = ", ".join(single + [f"{name}.* ({n} tensors)" for name, n in sorted(modules.items()) if n > 1])
    architecture = ", ".join(f"{k} {v}" for k, v in imported.header["architecture"].items())
    return (
        f"Read {imported.kind}.\n"
        f"Used: {len(imported.encoder)} tensors, {parameters:,} parameters of the encoder ({architecture}).\n"
        f"Dropped: {listed or 'none'}.\n"
        f"Fresh: none of the encoder; the segmentation decoder is new in every fine-tuning."
    )


def convert(args: argparse.Namespace) -> None:
    """What the command does. ``ValueError`` or ``OSError`` for a user's mistake."""
    if not args.output.absolute().parent.is_dir():
        raise ValueError(f"The folder of -o {args.output} does not exist.")
    if args.output.exists() and args.source.exists() and args.output.samefile(args.source):
        raise ValueError(f"-o {args.output} is the source itself; name another file.")
    if args.window_hu is not None:
        check_window(args.window_hu)
    if args.nnunet != (args.d is not None):
        raise ValueError("--nnunet needs -d DATASET, whose plans say what network nnU-Net builds; nothing else does.")
    imported = read_weights(args.source, args.num_heads, size_of(args.img_size), window_of(args.window_hu))
    print(report(imported))
    if args.nnunet:
        write_for_nnunet(args, imported)
        return
    if args.nnssl:
        with atomic_file(args.output) as file:
            torch.save(to_nnssl(imported.encoder, imported.header), file)
        print(f"Wrote {args.output} in nnssl's format, with the position embedding and without the class token.")
        return
    sha256 = save_weights(args.output, imported.encoder, imported.header)
    print(f"Wrote {args.output}, sha256 {sha256}.")
    print(f"Use it: HIENDMAE_WEIGHTS={args.output} nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerHiEndMAE")


def write_for_nnunet(args: argparse.Namespace, imported: Imported) -> None:
    """The file that ``-pretrained_weights`` takes."""
    from nnunetv2_hiendmae.weights.nnunet import to_nnunet  # not above: it imports all of timm

    folder = preprocessed_folder(args.d)
    plans = read_plans(folder / f"{args.p}.json", f"Run 'nnUNetv2_plan_and_preprocess -d {args.d}' first.")
    weights = Weights(args.source, imported.encoder, imported.header)
    checkpoint, lines = to_nnunet(weights, plans, args.c, read_json(folder / "dataset.json"))
    with atomic_file(args.output) as file:
        torch.save(checkpoint, file)
    print(*lines, sep="\n")
    print(
        f"Wrote {args.output}.\nUse it: nnUNetv2_train {args.d} {args.c} 0 -p {args.p} "
        f"-tr {checkpoint['trainer_name']} -pretrained_weights {args.output}"
    )


def size_of(values: list[int] | None) -> Size | None:
    """Three numbers of a flag."""
    return values and tuple(values)  # type: ignore[return-value]


def window_of(values: list[float] | None) -> Window | None:
    """Two numbers of a flag."""
    return values and tuple(values)  # type: ignore[return-value]


def main() -> NoReturn:
    """Entry point."""
    run_command(parser(), convert)
