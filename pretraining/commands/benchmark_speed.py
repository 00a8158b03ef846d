"""``hiendmae_benchmark_speed``: what this machine does, and what limits it."""

from __future__ import annotations

import argparse
import json
import math
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

from nnunetv2_hiendmae.checks import MAX_COUNT
from nnunetv2_hiendmae.command import CommandParser, run_command
from pretraining import speed
from pretraining.commands.arguments import add_data_and_model, config_fields, corpus_of, make_runtime
from pretraining.config import RunConfig
from pretraining.data.corpus import Corpus
from pretraining.data.open import open_corpus
from pretraining.device import pick_device
from pretraining.flops import matrix_product

EXAMPLES = """Examples:
  hiendmae_benchmark_speed -d 500                              the published model on one GPU
  hiendmae_benchmark_speed -d 500 -compare_packed HiEndMAE_packed_500 -preset tiny -device cpu
"""


def parser() -> CommandParser:
    """The flags of hiendmae_pretrain that speed depends on, and a few of its own."""
    p = CommandParser(
        prog="hiendmae_benchmark_speed",
        usage="hiendmae_benchmark_speed -d 500 [-compare_packed NAME] [-preset large_p12] [-device cuda] [-json FILE]",
        description="Measure loading, the training step, and training, as hiendmae_pretrain would do it with these "
        "flags.",
        examples=EXAMPLES,
    )
    add_data_and_model(p)
    p.add_argument("-compare_packed", metavar="FOLDER", help="packed corpus of the same data sets, measured beside -d")
    p.add_argument("-seconds", type=float, default=10.0, help="length of each measurement [10]")
    p.add_argument("-json", metavar="FILE", help="write the figures there as well")
    return p


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures. ``ValueError`` for a user's mistake."""
    if not 0 < args.seconds < math.inf:
        raise ValueError(f"-seconds {args.seconds} must be a positive number.")
    device = pick_device(args.device, 1)
    corpus = corpus_of(args)
    config = RunConfig(**config_fields(args, corpus), steps=MAX_COUNT)
    corpora: dict[str, Corpus] = {f"packed {config.packed_bits} bits" if config.packed_bits else ".b2nd": corpus}
    if args.compare_packed is not None:
        packed = open_corpus(None, args.compare_packed, None, None, None)
        corpora[f"packed {packed.origin['packed_bits']} bits"] = packed
    runtime = make_runtime(args, 1)
    runtime.micro_batch(config.batch_size, 1)
    how = (config, runtime, device, args.seconds)
    threads = torch.get_num_threads()
    nnunet = {"nnunet_read": speed.nnunet_read(corpus, config, args.seconds)} if args.packed is None else {}  # type: ignore[arg-type]
    return {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": threads, "device": args.device}
        | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        "torch": torch.__version__,
        "config": config.to_dict(),
        **asdict(runtime),
        **nnunet,
        "loading": {name: speed.loading(c, *how) for name, c in corpora.items()},
        "constant_patches": {name: speed.constant_share(c, config) for name, c in corpora.items()},
        "matrix_product_gflop_per_s": matrix_product(device, config.precision) / 1e9,
        "step": speed.step(*how),
        "training": {name: speed.training(c, *how) for name, c in corpora.items()},
    }


def run(args: argparse.Namespace) -> None:
    """What the command does."""
    figures = measure(args)
    if args.json is not None:
        Path(args.json).write_text(json.dumps(figures, indent=2), encoding="utf-8")
    print(speed.report(figures))


def main() -> NoReturn:
    """Entry point."""
    run_command(parser(), run, "nothing was written")
