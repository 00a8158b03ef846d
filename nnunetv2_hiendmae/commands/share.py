"""``hiendmae_share``: weights to and from the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from nnunetv2_hiendmae.command import CommandParser, run_command
from nnunetv2_hiendmae.weights.hub import pull, push

EXAMPLES = """Examples:
  hiendmae_share push -i encoder_weights.pth -repo USER/NAME --private
  hiendmae_share pull -repo USER/NAME -o weights.pth

Log in once with 'hf auth login' (pip install huggingface_hub).
"""


def parser() -> CommandParser:
    """Two verbs."""
    p = CommandParser(
        prog="hiendmae_share",
        description="Push pre-trained weights to the Hugging Face hub with a model card, or pull them from there.",
        examples=EXAMPLES,
    )
    verbs = p.add_subparsers(dest="verb", required=True, metavar="{push,pull}")
    up = verbs.add_parser("push", help="upload a weights file and its model card")
    up.add_argument("-i", type=Path, required=True, metavar="FILE", help="weights file")
    up.add_argument("-licence", default="other", metavar="ID", help="of the weights, as the hub names it [other]")
    up.add_argument("--private", action="store_true", help="a new repository is private")
    down = verbs.add_parser("pull", help="download a weights file, check it, and keep it")
    down.add_argument("-o", type=Path, required=True, metavar="FILE", help="file to write")
    down.add_argument("-revision", metavar="COMMIT", help="commit, branch or tag [newest]")
    for verb in (up, down):
        verb.add_argument("-repo", required=True, metavar="USER/NAME", help="repository on the hub")
    return p


def share(args: argparse.Namespace) -> None:
    """What the command does. ``ValueError`` for a user's mistake, ``HubError`` where the hub refuses."""
    if args.verb == "push":
        print(f"Pushed to {push(args.i, args.repo, args.private, args.licence)}")
        return
    if not args.o.absolute().parent.is_dir():
        raise ValueError(f"The folder of -o {args.o} does not exist.")
    weights = pull(args.repo, args.o, args.revision)
    print(f"{args.o}: {weights.header['architecture']}, sha256 {weights.sha256}")


def main() -> NoReturn:
    """Entry point."""
    run_command(parser(), share)
