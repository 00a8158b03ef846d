"""``hiendmae_benchmark_speed``: what this machine does, and what limits it."""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

from nnunetv2_hiendmae.command import CommandParser
from pretraining import speed
from pretraining.cli import add_data_and_model, find_corpus, make_config, make_runtime, pick_device
from pretraining.corpus import Corpus

EXAMPLES = """Examples:
  hiendmae_benchmark_speed -d 500                              the published model on one GPU
  hiendmae_benchmark_speed -d 500 -compare_packed HiEndMAE_packed_500 -preset tiny -device cpu
"""


def parser() -> CommandParser:
    """The flags of hiendmae_pretrain that speed depends on, and a few of its own."""
    p = CommandParser(
        prog="hiendmae_benchmark_speed",
        usage="hiendmae_benchmark_speed -d 500 [-compare_packed NAME] [-preset large_p12] [-device cuda] [-json FILE]",
        description="Measure data path, training step and both together. Flags mean what they do in hiendmae_pretrain.",
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
    corpus, source = find_corpus(args)
    config = make_config(args, corpus, source, steps=1)
    corpora: dict[str, Corpus] = {f"packed {config.packed_bits} bits" if config.packed_bits else ".b2nd": corpus}
    if args.compare_packed is not None:
        packed, packed_source = find_corpus(argparse.Namespace(packed=args.compare_packed, p=None, c=None, window=None))
        corpora[f"packed {packed_source['packed_bits']} bits"] = packed
    runtime = make_runtime(args, 1)
    runtime.micro_batch(config.batch_size, 1)
    step = speed.step(config, runtime, device, args.seconds)
    peak = speed.gemm_peak(device, config.precision)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    data = speed.data_path(corpora, config, args.seconds)
    shares = {name: speed.constant_share(c, config) for name, c in corpora.items()}
    torch.set_num_threads(threads)
    together = {name: speed.together(c, config, runtime, device, args.seconds) for name, c in corpora.items()}
    return {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": threads, "device": args.device}
        | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        "torch": torch.__version__,
        "config": config.to_dict(),
        **asdict(runtime),
        "data": data,
        "constant_patches": shares,
        "gemm_peak_gflop_per_s": peak,
        "step": step,
        "together": together,
    }


def main() -> NoReturn:
    """Entry point; exit 2 and one line for a user's mistake."""
    p = parser()
    args = p.parse_args()
    try:
        figures = measure(args)
        if args.json is not None:
            Path(args.json).write_text(json.dumps(figures, indent=2), encoding="utf-8")
    except (ValueError, OSError) as error:
        p.exit(2, f"{p.prog}: error: {error}\n")
    except torch.OutOfMemoryError:
        p.exit(1, f"{p.prog}: error: the memory of {args.device} is full; lower -batch_size.\n")
    except KeyboardInterrupt:
        p.exit(130, f"{p.prog}: interrupted\n")
    print(speed.report(figures))
    sys.exit(0)


if __name__ == "__main__":
    main()
