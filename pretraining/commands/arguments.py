"""Flags that say what is computed and how: for training, and for measuring its speed."""

from __future__ import annotations

import argparse
from typing import Any

from nnunetv2_hiendmae.checks import check_count
from pretraining.config import DECODERS, PRECISIONS, PRESETS, Runtime
from pretraining.data.corpus import Corpus
from pretraining.data.open import open_corpus
from pretraining.device import default_precision
from pretraining.processes import usable_cores


def add_data_and_model(p: argparse.ArgumentParser) -> None:
    """Data, model and machine. The destination of a flag is the config field that it sets."""
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("-d", nargs="+", metavar="DATASET", help="data set names or ids")
    source.add_argument("-packed", metavar="FOLDER", help="what hiendmae_pack wrote, instead of -d")
    p.add_argument("-c", metavar="CONFIGURATION", help="plans configuration [3d_fullres]")
    p.add_argument("-p", metavar="PLANS", help="plans name [HiEndMAEPlans where all have them, else nnUNetPlans]")
    p.add_argument("-preset", default="large_p12", choices=PRESETS, help="model and defaults [large_p12]")
    p.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="[cuda]")
    p.add_argument("-batch_size", type=int, help="crops a step, over all GPUs [by preset]")
    p.add_argument("-accumulate", type=int, default=1, help="micro-batches a step, for less memory [1]")
    p.add_argument(
        "-crop_size", dest="img_size", type=int, nargs=3, metavar="N", help="voxels, divisible by the patch [by preset]"
    )
    p.add_argument(
        "-vit_patch_size", dest="patch_size", type=int, nargs=3, metavar="N", help="voxels of a token [by preset]"
    )
    p.add_argument("-decoder", default="hierarchical", choices=DECODERS, help="others are controls [hierarchical]")
    p.add_argument("--no_augmentation", action="store_true", help="no flips, rotations, intensity changes")
    p.add_argument("-crops_per_case", type=int, help="crops from a case before the next [by preset]")
    p.add_argument("-mask_ratio", type=float, default=0.75, help="share of patches to rebuild [0.75]")
    p.add_argument("-window_hu", type=float, nargs=2, metavar="HU", help="[-175 250]")
    p.add_argument("-grad_clip", type=float, default=0.0, help="norm that gradients are clipped to, 0: not [0]")
    p.add_argument("-precision", choices=PRECISIONS, help="[bf16 or fp16 on CUDA, else fp32]")
    p.add_argument("--activation_checkpointing", action="store_true", help="less memory, about a third more time")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("-seed", type=int, default=41, help="[41]")
    p.add_argument("-num_workers", type=int, help="loader processes [half the cores, at most 12]")


def corpus_of(args: argparse.Namespace) -> Corpus:
    """The corpus that -d or -packed names. ``ValueError`` as ``open_corpus``."""
    return open_corpus(args.d, args.packed, args.p, args.c, args.window_hu and tuple(args.window_hu))


def config_fields(args: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """Fields of RunConfig: flags over the preset's defaults. ``ValueError`` for impossible values."""
    preset = PRESETS[args.preset]
    batch_size = preset.batch_size if args.batch_size is None else args.batch_size
    crops_per_case = preset.crops_per_case if args.crops_per_case is None else args.crops_per_case
    check_count("batch_size", batch_size)
    check_count("crops_per_case", crops_per_case)
    model = preset.model(
        crop_size=tuple(args.img_size or preset.crop_size),
        patch_size=tuple(args.patch_size or preset.encoder.patch_size),
        in_channels=corpus.in_channels,
        mask_ratio=args.mask_ratio,
        decoder=args.decoder,
    )
    return {
        **corpus.origin,
        "model": model,
        "batch_size": batch_size,
        "crops_per_case": crops_per_case,
        "grad_clip": args.grad_clip,
        "precision": args.precision or default_precision(args.device),
        "augment": not args.no_augmentation,
        "seed": args.seed,
    }


def make_runtime(args: argparse.Namespace, ranks_here: int, **run: Any) -> Runtime:
    """Flags over defaults; the processes of a node share its cores. ``ValueError`` for impossible values."""
    cores = usable_cores() // ranks_here
    return Runtime(
        device=args.device,
        num_workers=min(12, cores // 2) if args.num_workers is None else args.num_workers,
        accumulate=args.accumulate,
        activation_checkpointing=args.activation_checkpointing,
        compile=args.compile,
        **run,
    )
