"""``hiendmae_import_weights``: other programs' checkpoints to weights files, and weights files to nnssl's format."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import NoReturn

import torch

from nnunetv2_hiendmae.command import CommandParser
from nnunetv2_hiendmae.foreign import Imported, import_official
from nnunetv2_hiendmae.intensity import DEFAULT_WINDOW
from nnunetv2_hiendmae.nnssl import PLAN, from_nnssl, to_nnssl
from nnunetv2_hiendmae.weights import FORMAT, atomic_file, load_tensors, load_weights, save_weights

EXAMPLES = """Examples:
  hiendmae_import_weights hi_end_mae_10k.pth -o weights.pth      the authors' released checkpoint
  hiendmae_import_weights nnssl_style.pth -o weights.pth         a checkpoint written with --nnssl
  hiendmae_import_weights weights.pth -o nnssl_style.pth --nnssl
"""


def parser() -> CommandParser:
    p = CommandParser(
        prog="hiendmae_import_weights",
        description="Convert pre-trained weights for nnUNetTrainerHiEndMAE. Nothing is downloaded.",
        examples=EXAMPLES,
    )
    p.add_argument("source", type=Path, help="checkpoint to read (the authors', nnssl-style, or a weights file)")
    p.add_argument("-o", dest="output", type=Path, required=True, metavar="FILE", help="file to write")
    p.add_argument("-num_heads", type=int, metavar="N", help="attention heads, if the width is not a published one")
    p.add_argument("-img_size", type=int, nargs=3, metavar=("H", "W", "D"),
                   help="crop of the pre-training, if a learned position embedding is not on a cube")  # fmt: skip
    p.add_argument("-window_hu", type=float, nargs=2, metavar=("LOW", "HIGH"),
                   help="HU range that the pre-training scaled to [0, 1], if it was not -175 250")  # fmt: skip
    p.add_argument("--nnssl", action="store_true", help="write nnssl's format instead of a weights file")
    return p


def read(args: argparse.Namespace) -> Imported:
    """The encoder in the source, whichever of the three formats it has. ``ValueError`` if it has none of them."""
    checkpoint = load_tensors(args.source)
    ours = isinstance(checkpoint, dict) and checkpoint.get("format") == FORMAT
    if not ours and not (isinstance(checkpoint, dict) and PLAN in checkpoint):
        return import_official(checkpoint, args.num_heads, args.img_size, tuple(args.window_hu or DEFAULT_WINDOW))
    given = [f"-{name}" for name in ("num_heads", "img_size", "window_hu") if getattr(args, name) is not None]
    if given:
        raise ValueError(f"{args.source} has a header that says what {', '.join(given)} would; leave it out.")
    if ours:
        weights = load_weights(args.source)
        return Imported("a Hi-End-MAE weights file", weights.encoder, weights.header, [])
    return from_nnssl(checkpoint)


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
    if args.window_hu is not None and not args.window_hu[0] < args.window_hu[1]:
        raise ValueError(f"-window_hu {args.window_hu[0]:g} {args.window_hu[1]:g}: the first must be below the second.")
    imported = read(args)
    print(report(imported))
    if args.nnssl:
        with atomic_file(args.output) as file:
            torch.save(to_nnssl(imported.encoder, imported.header), file)
        print(f"Wrote {args.output} in nnssl's format, with the position embedding and without the class token.")
        return
    sha256 = save_weights(args.output, imported.encoder, imported.header)
    print(f"Wrote {args.output}, sha256 {sha256}.")
    print(f"Use it: HIENDMAE_WEIGHTS={args.output} nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerHiEndMAE")


def main() -> NoReturn:
    """Entry point; exit 2 and one line for a user's mistake."""
    p = parser()
    args = p.parse_args()
    try:
        convert(args)
    except (ValueError, OSError) as error:
        p.exit(2, f"{p.prog}: error: {' '.join(str(error).split())}\n")
    p.exit(0)
